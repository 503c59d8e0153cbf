# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, against the reference path in float64 on the CPU: values and two derivatives."""

import itertools

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.ops import spatial_modulation, upfirdn2d
from torch_utils.ops.bias_act import activation_funcs, bias_act

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
FOUR = upfirdn2d.setup_filter([1, 3, 4, 2])
TWELVE = upfirdn2d.setup_filter([1, 2, 5, 3, 2, 7, 3, 1, 9, 2, 1, 3])


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels, or an error; and the mode as it was."""
    mode, decision = custom_ops._mode, custom_ops._decision
    custom_ops.select("cuda")
    yield custom_ops.kernels(torch.zeros(1, device="cuda"))
    custom_ops._mode, custom_ops._decision = mode, decision


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def derivatives(op, tensors, dtype, layout, impl, device):
    """[y, first derivatives, second derivatives] of op(*tensors, impl=impl), along fixed random directions."""
    leaves = []
    for t in tensors:
        t = t.detach().clone().to(dtype).to(device=device, dtype=dtype if impl == "cuda" else torch.float64)
        leaves.append((t.contiguous(memory_format=layout) if t.ndim == 4 else t).requires_grad_())
    y = op(*leaves, impl=impl)
    v = draw(*y.shape, seed=8).to(dtype).to(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, v, create_graph=True)
    directions = [draw(*d.shape, seed=9).to(dtype).to(d) for d in first]
    second = torch.autograd.grad(first, [v, *leaves], directions, allow_unused=True)
    return [y, *first, *second]


def check(op, tensors, dtype, layout):
    results = derivatives(op, tensors, dtype, layout, "cuda", "cuda")
    expected = derivatives(op, tensors, dtype, layout, "ref", "cpu")
    for result, exact in zip(results, expected, strict=True):
        if result is None or exact is None:
            assert all(t is None or not t.any() for t in (result, exact))
            continue
        scale = exact.abs().max().clamp(min=1)
        error = ((result.detach().double().cpu() - exact.detach()).abs().max() / scale).item()
        assert error < 20 * max(torch.finfo(dtype).eps, 1e-7)
    y = results[0]
    assert y.dtype == dtype and (y.ndim != 4 or y.is_contiguous(memory_format=layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act(act, dtype, layout):
    x, b = (t.to(dtype).double() for t in (draw(3, 24, 17, 9), draw(24, seed=1)))
    for clamp in (None, 1.25):
        if clamp is not None:  # rounding may put an output on the clamp or beside it: leave those out
            near = (bias_act(x, b, act=act, impl="ref").abs() - clamp).abs() < 0.02
            x = torch.where(near, -b[:, None, None], x)

        def op(x, b, impl, clamp=clamp):
            return bias_act(x, b, act=act, clamp=clamp, impl=impl)

        check(op, [x, b], dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [{"padding": [6, 7, 7, 6]}, {"up": 2, "gain": 4}, {"down": 2, "flip_filter": True}, {"up": 5, "down": 3}],
    ids=str,
)
def test_upfirdn2d(settings, dtype, layout):
    for f, channels in itertools.product((FOUR, TWELVE), (3, 16)):

        def op(x, impl, f=f):
            return upfirdn2d.upfirdn2d(x, f.to(x.device), **{"padding": 6, **settings}, impl=impl)

        check(op, [draw(2, channels, 19, 13)], dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[(4, 4)], [(3, 5)], [(4, 4), (8, 16)], [(64, 2)]], ids=str)
def test_modulate(sizes, dtype, layout):
    tensors = [draw(2, 16, 32, 24), *(draw(2, 16, *size, seed=i + 1) for i, size in enumerate(sizes))]
    check(spatial_modulation.modulate, tensors, dtype, layout)


def test_the_kernels_are_used(kernels):
    assert isinstance(kernels, (custom_ops.RuntimeKernels, custom_ops.Plugins))
    assert custom_ops.status().startswith("Operations: own CUDA kernels")


def test_streams_and_threads():
    """Launches go to the current stream; backward passes run in autograd's own threads."""
    x = draw(64, 64, 32, 32).float().cuda().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = bias_act(x * 2, act="lrelu")
        y.sum().backward()
    stream.synchronize()
    torch.testing.assert_close(y, bias_act(x * 2, act="lrelu", impl="ref"))
    assert x.grad.isfinite().all()


def test_every_device():
    for device in range(torch.cuda.device_count()):
        x = draw(2, 8, 8, 8).float().cuda(device)
        torch.testing.assert_close(bias_act(x, act="swish"), bias_act(x, act="swish", impl="ref"))


def test_odd_sizes():
    for shape in ((0, 3, 4, 4), (1, 1, 1, 1), (1, 5, 1, 7), (257, 1, 3, 3)):
        x = draw(*shape).float().cuda()
        torch.testing.assert_close(bias_act(x, act="relu"), bias_act(x, act="relu", impl="ref"))
        y = upfirdn2d.upsample2d(x, FOUR.cuda())
        torch.testing.assert_close(y, upfirdn2d.upsample2d(x, FOUR.cuda(), impl="ref"))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.zeros(2**31 + 8, dtype=torch.float16, device="cuda")
    x[-1] = -1
    assert bias_act(x, act="lrelu", gain=1, dim=0)[-1].item() == pytest.approx(-0.2, rel=1e-3)


@pytest.mark.slow
def test_plugins(monkeypatch):
    """The second way, where there is a toolkit."""
    try:
        plugins = custom_ops.Plugins()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(custom_ops, "_decision", (plugins, "test"))
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        for act in activation_funcs:
            test_bias_act(act, dtype, layout)
        test_upfirdn2d({"up": 2, "down": 3}, dtype, layout)
