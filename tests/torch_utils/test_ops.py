# SPDX-License-Identifier: Apache-2.0
"""torch_utils.ops against golden numbers, brute force, definitions and numerical derivatives."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix, upfirdn2d
from torch_utils.ops import conv2d_resample as resampled_convolution
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.fma import fma

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ops.npz")
CASES = json.loads(str(GOLDEN["cases"]))
OPS = {
    "bias_act": bias_act,
    "conv2d_resample": conv2d_resample,
    "setup_filter": upfirdn2d.setup_filter,
    "upfirdn2d": upfirdn2d.upfirdn2d,
    "filter2d": upfirdn2d.filter2d,
    "upsample2d": upfirdn2d.upsample2d,
    "downsample2d": upfirdn2d.downsample2d,
}
FILTERED = ("upfirdn2d", "filter2d", "upsample2d", "downsample2d")
CHANNELS_LAST = torch.channels_last


def draw(*shape, seed=0, dtype=torch.float64, grad=False):
    """Reproducible normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


def differs(a, b):
    """Norm of the difference over norm of the reference."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def check_gradients(fn, *inputs):
    assert gradcheck(fn, inputs)
    assert gradgradcheck(fn, inputs)


# --------------------------------------------------------------------------------------------------
# Golden numbers


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if case["op"] in OPS])
def test_golden(index):
    case = CASES[index]
    tensors = {name: torch.from_numpy(GOLDEN[f"{index:03d}.{name}"]) for name in case["tensors"]}
    if case["op"] in FILTERED:
        tensors.setdefault("f", None)
    expected = torch.from_numpy(GOLDEN[f"{index:03d}.out"])
    assert differs(OPS[case["op"]](**tensors, **case["kwargs"]), expected) < 1e-5
    if "x" in tensors and expected.ndim == 4:
        tensors["x"] = tensors["x"].contiguous(memory_format=CHANNELS_LAST)
        result = OPS[case["op"]](**tensors, **case["kwargs"])
        assert differs(result, expected) < 1e-5
        assert result.is_contiguous(memory_format=CHANNELS_LAST)


# --------------------------------------------------------------------------------------------------
# bias_act


def test_activation_table():
    names = ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
    assert list(activation_funcs) == names
    assert [spec.cuda_idx for spec in activation_funcs.values()] == list(range(1, 10))
    for name, spec in activation_funcs.items():
        assert spec.def_alpha == (0.2 if name == "lrelu" else 0)
        assert spec.def_gain == (math.sqrt(2) if name in ("relu", "lrelu", "swish") else 1)
        assert type(spec.def_gain) in (int, float)  # not a NumPy scalar: layers pickle it
        assert spec.ref == {"linear": "", "swish": "x"}.get(name, "y")
        assert spec.has_2nd_grad == (name not in ("linear", "relu", "lrelu"))


def test_bias_act_example():
    x = torch.tensor([[-1.0, 1.0, 300.0]])
    expected = torch.tensor([[-0.2 * math.sqrt(2), math.sqrt(2), 256]])
    torch.testing.assert_close(bias_act(x, act="lrelu", clamp=256), expected)


@pytest.mark.parametrize("impl", ["ref", "cuda"])
@pytest.mark.parametrize("options", [{}, {"gain": 2.5, "clamp": 0.9}], ids=["plain", "gain_clamp"])
@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act_gradients(act, options, impl):
    x, b = draw(2, 3, 2, 2, grad=True), draw(3, seed=1, grad=True)
    check_gradients(lambda x, b: bias_act(x, b, act=act, impl=impl, **options), x, b)


@pytest.mark.parametrize(
    "options",
    [
        {"act": "lrelu", "alpha": 0.0},
        {"act": "lrelu", "alpha": -0.3},
        {"act": "lrelu", "gain": -1.5},
        {"act": "relu", "gain": -1.5, "clamp": 0.7},
        {"act": "lrelu", "gain": 0.0},
        {"act": "lrelu", "clamp": 0},
        {"act": "lrelu", "clamp": 0.4, "dim": 2},
        {"act": "relu", "dim": -1},
    ],
    ids=str,
)
def test_bias_act_unusual_options(options):
    x = draw(2, 3, 4, 5, grad=True)
    b = draw(x.shape[options.get("dim", 1)], seed=1, grad=True)
    results = []
    for impl in ("ref", "cuda"):
        y = bias_act(x, b, impl=impl, **options)
        dx, db = torch.autograd.grad((y * draw(2, 3, 4, 5, seed=2)).sum(), [x, b])
        results.append((y, dx, db))
    for fast, reference in zip(*reversed(results), strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
def test_bias_act_without_bias(act):
    x = draw(3, 4, grad=True)
    check_gradients(lambda x: bias_act(x, act=act, clamp=0.8), x)
    with torch.no_grad():
        torch.testing.assert_close(
            bias_act(x, act=act, clamp=0.8), bias_act(x, act=act, clamp=0.8, impl="ref")
        )


@pytest.mark.parametrize("impl", ["ref", "cuda"])
def test_bias_act_gradient_is_zero_from_the_clamp_on(impl):
    x = torch.tensor([-8.0, -5.0, -1.0, 0.5, 1.0, 2.0], requires_grad=True)
    y = bias_act(x, dim=0, act="lrelu", gain=1, clamp=1, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.tolist() == pytest.approx([0, 0, 0.2, 1, 0, 0])


def test_bias_act_gradient_for_the_bias_alone():
    x, b = draw(2, 3, 4, 4), draw(3, seed=1, grad=True)
    check_gradients(lambda b: bias_act(x, b, act="lrelu"), b)


def test_bias_act_third_order():
    x, v = draw(5, grad=True), draw(5, seed=3)
    results = []
    for impl in ("ref", "cuda"):
        y = bias_act(x, dim=0, act="lrelu", impl=impl) ** 3
        for _ in range(3):
            (y,) = torch.autograd.grad((y * v).sum(), x, create_graph=True)
        results.append(y)
    torch.testing.assert_close(*results)
    assert results[0].abs().min() > 0


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 6), (2, 4, 3)], ids=str)
def test_bias_act_leaves_its_input_alone(shape):
    x, b = draw(*shape), draw(shape[1], seed=1)
    before = x.clone(), b.clone()
    for act in activation_funcs:
        bias_act(x, b, act=act, clamp=0.3)
        bias_act(x, act=act, gain=1, clamp=0.3)
    assert torch.equal(x, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act_types_and_layout(act, dtype):
    x = draw(2, 3, 4, 5, dtype=torch.float32).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    b = draw(3, seed=1, dtype=torch.float32).to(dtype)
    exact = bias_act(x.double(), b.double(), act=act, clamp=1)
    for inputs in ((x, b), (x.requires_grad_(), b)):
        y = bias_act(*inputs, act=act, clamp=1)
        assert y.dtype == dtype and y.is_contiguous(memory_format=CHANNELS_LAST)
        assert differs(y.double(), exact) < {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.is_contiguous(memory_format=CHANNELS_LAST)


def test_bias_act_keeps_one_tensor_for_the_backward_pass():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        bias_act(draw(2, 3, 4, 4, grad=True), draw(3, seed=1, grad=True), act="lrelu", clamp=1)
    assert saved == [(2, 3, 4, 4)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"act": "gelu"}, "act is 'gelu'; accepted: linear, relu"),
        ({"impl": "fast"}, "impl is 'fast'"),
        ({"clamp": -1}, "clamp is -1"),
        ({"b": torch.zeros(4)}, "bias has 4 values, dimension 1 of x has 3"),
        ({"b": torch.zeros(3), "dim": 4}, "dim 4 does not exist"),
        ({"b": torch.zeros(3, dtype=torch.float64)}, "bias is torch.float64, x is torch.float32"),
        ({"b": torch.zeros(3, 1)}, "one dimension"),
    ],
    ids=str,
)
def test_bias_act_mistakes(options, message):
    with pytest.raises(AssertionError, match=message):
        bias_act(torch.zeros(2, 3, 4, 4), **options)


# --------------------------------------------------------------------------------------------------
# setup_filter and upfirdn2d


def test_setup_filter_rules():
    setup = upfirdn2d.setup_filter
    assert setup(range(7)).shape == (7, 7) and setup(range(8)).shape == (8,)
    assert setup([1, 2, 3], separable=True, gain=4).sum().item() == pytest.approx(2)  # sqrt(4) for each axis
    assert setup([1, 2, 3], gain=4).sum().item() == pytest.approx(4)
    assert setup([1, 2], normalize=False).tolist() == [[1, 2], [2, 4]]
    assert setup([[1, 2], [3, 4]], normalize=False, flip_filter=True).tolist() == [[4, 3], [2, 1]]
    assert setup(None).dtype == torch.float32 and setup(None).tolist() == [[1]]
    mine = torch.tensor([[1.0, 3.0]])
    setup(mine)
    assert mine.tolist() == [[1, 3]]  # the caller's tensor stays as it was
    for wrong in ([[[1.0]]], []):
        with pytest.raises(AssertionError, match="a filter"):
            setup(wrong)
    with pytest.raises(AssertionError, match="one dimension can be separable"):
        setup([[1, 2], [3, 4]], separable=True)


def brute_force(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1):
    """Zero insertion, padding or cropping, true convolution, decimation: each as written."""
    up, down = upfirdn2d._parse_scaling(up), upfirdn2d._parse_scaling(down)
    px0, px1, py0, py1 = upfirdn2d._parse_padding(padding)
    f = np.ones([1, 1]) if f is None else f.double().numpy()
    f = np.outer(f, f) if f.ndim == 1 else f
    n, c, h, w = x.shape
    z = np.zeros([n, c, h * up[1], w * up[0]])
    z[:, :, :: up[1], :: up[0]] = x.double().numpy()
    z = np.pad(z, [(0, 0), (0, 0), (max(py0, 0), max(py1, 0)), (max(px0, 0), max(px1, 0))])
    z = z[:, :, max(-py0, 0) : z.shape[2] - max(-py1, 0), max(-px0, 0) : z.shape[3] - max(-px1, 0)]
    kernel = f if flip_filter else f[::-1, ::-1]
    out = np.einsum("nchwij,ij->nchw", sliding_window_view(z, f.shape, axis=(2, 3)), kernel)
    return torch.from_numpy(out[:, :, :: down[1], :: down[0]] * gain).to(x.dtype)


RESAMPLINGS = [
    {},
    {"padding": [2, 1]},
    {"up": 2, "padding": [2, 1, 2, 1], "gain": 4},
    {"down": 2, "padding": 1},
    {"up": [2, 1], "padding": [1, 2, 0, 3]},
    {"down": [1, 3], "padding": [3, 2, 1, 0], "flip_filter": True},
    {"up": [3, 2], "down": [2, 3], "padding": 4, "gain": -1.7},
    {"padding": [-1, 2, 1, -2]},
    {"up": 2, "padding": [-2, -1, 7, 8], "flip_filter": True},
    {"up": 2, "down": 2, "padding": [5, -3, -1, 6]},
    {"down": 2, "padding": [-1, 1, 0, -1], "flip_filter": True},
]
FILTERS = {
    "none": None,
    "4x4": torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 2, 4, 1])) / 16,
    "not_separable": draw(2, 3, dtype=torch.float32),
    "1-D": draw(5, seed=1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("options", RESAMPLINGS, ids=str)
def test_upfirdn2d_brute_force(options, name):
    f = FILTERS[name]
    for shape in ((2, 3, 8, 9), (1, 17, 7, 6)):
        x = draw(*shape)
        expected = brute_force(x, f, **options)
        assert differs(upfirdn2d.upfirdn2d(x, f, **options), expected) < 1e-12
        assert differs(upfirdn2d.upfirdn2d(x.float(), f, **options), expected.float()) < 1e-6
        assert differs(upfirdn2d.upfirdn2d(x.float(), f, impl="ref", **options), expected.float()) < 1e-6


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("options", RESAMPLINGS, ids=str)
def test_upfirdn2d_gradients(options, name):
    x = draw(2, 1, 6, 5, grad=True)
    check_gradients(lambda x: upfirdn2d.upfirdn2d(x, FILTERS[name], **options), x)


@pytest.mark.parametrize("padding", [0, 1, -1, [1, 0, 2, 1]], ids=str)
@pytest.mark.parametrize("fn", ["filter2d", "upsample2d", "downsample2d"])
def test_wrapper_gradients(fn, padding):
    x, f = draw(1, 2, 6, 6, grad=True), upfirdn2d.setup_filter([1, 3, 4, 2])
    check_gradients(lambda x: getattr(upfirdn2d, fn)(x, f, padding=padding, gain=1.5), x)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 12])
def test_wrappers_keep_their_promise_of_size_and_level(taps):
    x, f = torch.ones(1, 1, 30, 24), upfirdn2d.setup_filter([1] * taps)
    pairs = [(upfirdn2d.filter2d(x, f), [30, 24])]
    pairs += [(upfirdn2d.upsample2d(x, f, up=[2, 3]), [90, 48])] if taps % 6 == 0 else []
    pairs += [(upfirdn2d.upsample2d(x, f), [60, 48])] if taps % 2 == 0 else []
    pairs += [(upfirdn2d.downsample2d(x, f, down=[3, 2]), [15, 8])]
    for y, size in pairs:
        assert list(y.shape[2:]) == size
        middle = y[:, :, size[0] // 2 - 1 : size[0] // 2 + 1, size[1] // 2 - 1 : size[1] // 2 + 1]
        torch.testing.assert_close(middle, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 20, 8, 8)], ids=str)
@pytest.mark.parametrize("options", RESAMPLINGS, ids=str)
def test_upfirdn2d_layout(options, shape):
    for name in ("4x4", "1-D", "none"):
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            x = draw(*shape, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
            with torch.no_grad():
                assert upfirdn2d.upfirdn2d(x, FILTERS[name], **options).is_contiguous(memory_format=layout)
            y = upfirdn2d.upfirdn2d(x, FILTERS[name], **options)
            assert y.is_contiguous(memory_format=layout)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert dx.is_contiguous(memory_format=layout)


def test_upfirdn2d_half_precision():
    x, f = draw(2, 3, 8, 8, dtype=torch.float32), FILTERS["4x4"]
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        y = upfirdn2d.upfirdn2d(x.to(dtype), f, up=2, padding=2)
        assert y.dtype == dtype
        assert differs(y.float(), upfirdn2d.upfirdn2d(x.to(dtype).float(), f, up=2, padding=2)) < tolerance


def test_upfirdn2d_result_is_never_the_input():
    x = torch.zeros(1, 1, 2, 2)
    upfirdn2d.upfirdn2d(x, None).add_(1)
    assert x.abs().sum() == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"padding": np.int64(1)}, "padding is"),
        ({"padding": [np.int64(1), 2]}, "padding is"),
        ({"padding": [1, 2, 3]}, "one, two or four Python ints"),
        ({"padding": 1.5}, "padding is 1.5"),
        ({"up": 0}, "scaling is 0; accepted: a Python int >= 1"),
        ({"down": [1, 2, 3]}, "scaling is"),
        ({"down": 2.0}, "scaling is 2.0"),
        ({"up": np.int64(2)}, "scaling is"),
        ({"impl": "fast"}, "impl is 'fast'"),
        ({"x": torch.zeros(3, 4, 4)}, r"x must be a tensor \[N,C,H,W\]"),
        ({"f": torch.ones(2, 2, dtype=torch.float64)}, "the filter must be float32, not torch.float64"),
        ({"f": torch.ones(2, 2, requires_grad=True)}, "gradients with respect to the filter"),
        ({"f": torch.ones(1, 2, 2)}, "1 or 2 dimensions"),
        ({"f": torch.ones(2, 7), "padding": [1, 1]}, "a filter of 7 taps does not fit into 4 . 1 . 1 pixels"),
    ],
    ids=str,
)
def test_upfirdn2d_mistakes(options, message):
    with pytest.raises(AssertionError, match=message):
        upfirdn2d.upfirdn2d(**{"x": torch.zeros(1, 1, 4, 4), "f": None, **options})


def test_private_helpers_that_other_modules_import():
    assert upfirdn2d._parse_scaling(2) == (2, 2) and upfirdn2d._parse_scaling([2, 3]) == (2, 3)
    assert upfirdn2d._parse_padding(2) == (2, 2, 2, 2)
    assert upfirdn2d._parse_padding([1, 2]) == (1, 1, 2, 2)
    assert upfirdn2d._parse_padding([1, 2, 3, 4]) == (1, 2, 3, 4)
    assert upfirdn2d._get_filter_size(None) == (1, 1)
    assert upfirdn2d._get_filter_size(torch.ones(12)) == (12, 12)
    assert upfirdn2d._get_filter_size(torch.ones(2, 3)) == (3, 2)  # width first


# --------------------------------------------------------------------------------------------------
# conv2d_resample


def resample_by_definition(x, w, f, up, down, padding, groups, flip_weight, flip_filter):
    """Pad once, filter the up-sampled image, convolve, filter and decimate."""
    pads = list(upfirdn2d._parse_padding(padding))
    fw, fh = upfirdn2d._get_filter_size(f)
    for axis, taps in ((0, fw), (2, fh)):
        if up > 1:
            pads[axis] += (taps + up - 1) // 2
            pads[axis + 1] += (taps - up) // 2
        if down > 1:
            pads[axis] += (taps - down + 1) // 2
            pads[axis + 1] += (taps - down) // 2
    x = brute_force(x, f if up > 1 else None, up=up, padding=pads, gain=up**2, flip_filter=flip_filter)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return brute_force(x, f if down > 1 else None, down=down, flip_filter=flip_filter)


@pytest.mark.parametrize("flip_weight", [True, False])
@pytest.mark.parametrize("padding", [1, 0, -1, [2, 0, 1, 3]], ids=str)
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (1, 2)], ids=str)
def test_conv2d_resample_definition(kernel, up, down, padding, flip_weight):
    for name, groups, flip_filter in (("4x4", 1, False), ("not_separable", 2, True), ("none", 2, False)):
        x, w, f = draw(2, 4, 9, 8), draw(6, 4 // groups, *kernel, seed=1), FILTERS[name]
        args = (x, w, f, up, down, padding, groups, flip_weight, flip_filter)
        assert differs(conv2d_resample(*args), resample_by_definition(*args)) < 1e-12


@pytest.mark.parametrize(
    "kernel, options",
    [
        (3, {"padding": 1}),
        (3, {"padding": [1, 0, 2, -1]}),
        (3, {"padding": 1, "up": 2, "flip_weight": False}),
        (3, {"padding": 1, "down": 2}),
        (3, {"padding": 1, "up": 2, "down": 2, "groups": 2}),
        (1, {"up": 2}),
        (1, {"down": 2}),
        (1, {"groups": 2, "flip_weight": False}),
        (3, {"padding": 1, "up": 2, "groups": 2}),
        (2, {"padding": 0, "up": 3}),
    ],
    ids=str,
)
def test_conv2d_resample_gradients(kernel, options):
    f = FILTERS["4x4"] if kernel != 2 else None
    x, w = (
        draw(1, 2, 4, 4, grad=True),
        draw(2, 2 // options.get("groups", 1), kernel, kernel, seed=1, grad=True),
    )
    check_gradients(lambda x, w: conv2d_resample(x, w, f, **options), x, w)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("options", [{}, {"up": 2}, {"down": 2}, {"up": 2, "down": 2}], ids=str)
def test_conv2d_resample_layout(options, kernel):
    w, f = draw(6, 20, kernel, kernel, seed=1, dtype=torch.float32), FILTERS["4x4"]
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        x = draw(2, 20, 8, 8, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
        y = conv2d_resample(x, w, f, padding=kernel // 2, **options)
        assert y.is_contiguous(memory_format=layout)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"w": torch.zeros(2, 3, 3, 3).double()}, "w is torch.float64, x is torch.float32"),
        ({"w": torch.zeros(2, 3, 3)}, "w must be a tensor"),
        ({"x": torch.zeros(3, 4, 4)}, "x must be a tensor"),
        ({"up": 0}, "up is 0; accepted: an int >= 1"),
        ({"down": [2, 2]}, "down is"),
        ({"groups": 0}, "groups is 0"),
        ({"padding": "same"}, "padding is 'same'"),
    ],
    ids=str,
)
def test_conv2d_resample_mistakes(options, message):
    with pytest.raises(AssertionError, match=message):
        conv2d_resample(**{"x": torch.zeros(1, 3, 4, 4), "w": torch.zeros(2, 3, 3, 3), **options})


# --------------------------------------------------------------------------------------------------
# conv2d_gradfix


def test_convolutions_are_torchs():
    x, w, b = draw(2, 4, 6, 7), draw(6, 2, 3, 3, seed=1), draw(6, seed=2)
    options = {"stride": 2, "padding": [1, 2], "dilation": 1, "groups": 2}
    assert torch.equal(
        conv2d_gradfix.conv2d(input=x, weight=w, bias=b, **options), F.conv2d(x, w, b, **options)
    )
    w, b = draw(4, 3, 3, 3, seed=1), draw(6, seed=2)
    options["output_padding"] = 1
    result = conv2d_gradfix.conv_transpose2d(input=x, weight=w, bias=b, **options)
    assert torch.equal(result, F.conv_transpose2d(x, w, b, **options))


def test_convolution_gradients():
    x, w = draw(1, 2, 4, 4, grad=True), draw(2, 2, 3, 3, seed=1, grad=True)
    check_gradients(lambda x, w: conv2d_gradfix.conv2d(x, w, padding=1), x, w)
    check_gradients(lambda x, w: conv2d_gradfix.conv_transpose2d(x, w, stride=2, padding=1), x, w)


def test_no_weight_gradients_restores_its_flag():
    assert conv2d_gradfix.enabled is False and conv2d_gradfix.weight_gradients_disabled is False
    with conv2d_gradfix.no_weight_gradients(disable=False):
        assert conv2d_gradfix.weight_gradients_disabled is False
    with pytest.raises(KeyError), conv2d_gradfix.no_weight_gradients():
        assert conv2d_gradfix.weight_gradients_disabled is True
        with conv2d_gradfix.no_weight_gradients(False):
            assert conv2d_gradfix.weight_gradients_disabled is True
        raise KeyError
    assert conv2d_gradfix.weight_gradients_disabled is False


class _RecordConvolutionBackward(TorchDispatchMode):
    """Writes down which of (input, weight, bias) each convolution computes a gradient for."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def test_r1_computes_no_weight_gradients_in_its_first_pass_and_right_ones_in_its_second():
    x, w = draw(1, 2, 5, 5, grad=True), draw(3, 2, 3, 3, seed=1, grad=True)

    def penalty():
        with conv2d_gradfix.no_weight_gradients(), _RecordConvolutionBackward() as record:
            y = conv2d_gradfix.conv2d(x, w, padding=1).square().sum()
            (dx,) = torch.autograd.grad(y, x, create_graph=True)
        assert record.masks == [[True, False, False]]
        return dx.square().sum()

    (dw,) = torch.autograd.grad(penalty(), w)
    step = draw(3, 2, 3, 3, seed=5) * 1e-5
    base = w.detach().clone()
    w.data.copy_(base + step)
    above = penalty().item()
    w.data.copy_(base - step)
    below = penalty().item()
    assert (above - below) / 2 == pytest.approx((dw * step).sum().item(), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# grid_sample_gradfix and fma


def sample_by_hand(image, grid):
    """Bilinear sampling, pixel by pixel; zeros outside."""
    n, c, h, w = image.shape
    out = torch.zeros(n, c, *grid.shape[1:3], dtype=image.dtype)
    for k, i, j in np.ndindex(n, *grid.shape[1:3]):
        x = (grid[k, i, j, 0].item() + 1) * w / 2 - 0.5
        y = (grid[k, i, j, 1].item() + 1) * h / 2 - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    out[k, :, i, j] += (1 - abs(y - row)) * (1 - abs(x - column)) * image[k, :, row, column]
    return out


@pytest.fixture(params=["native", "own"])
def grid_sample(request, monkeypatch):
    """The public function, once as this PyTorch allows and once as where PyTorch differentiates only once."""
    if request.param == "own":
        monkeypatch.setattr(grid_sample_gradfix, "_twice_differentiable", lambda device_type: False)
    elif not grid_sample_gradfix._twice_differentiable("cpu"):
        pytest.skip("this PyTorch has no second derivative of grid_sample")
    return grid_sample_gradfix.grid_sample


def test_grid_sample_by_hand(grid_sample):
    image, grid = draw(2, 3, 5, 4, grad=True), draw(2, 3, 6, 2, seed=1) * 0.8
    expected = sample_by_hand(image.detach(), grid)
    torch.testing.assert_close(grid_sample(image, grid), expected)
    torch.testing.assert_close(grid_sample(image.detach(), grid), expected)


def test_grid_sample_gradients(grid_sample):
    image, grid = draw(2, 2, 4, 3, grad=True), draw(2, 3, 2, 2, seed=1) * 0.7
    check_gradients(lambda image: grid_sample(image, grid), image)
    grid.requires_grad_()
    assert gradcheck(grid_sample, (image, grid))


def test_grid_sample_third_order(grid_sample):
    image, grid = draw(1, 1, 3, 3, grad=True), draw(1, 3, 3, 2, seed=1) * 0.5
    results = []
    for fn in (grid_sample, sample_by_hand_differentiably):
        y = fn(image, grid) ** 4
        for _ in range(3):
            (y,) = torch.autograd.grad((y**2).sum(), image, create_graph=True)
        results.append(y)
    torch.testing.assert_close(*results)


def sample_by_hand_differentiably(image, grid):
    """The same map as a matrix, which autograd differentiates any number of times."""
    unit = torch.eye(image[0].numel(), dtype=image.dtype).reshape(-1, *image.shape[1:])
    columns = [sample_by_hand(one[None], grid).flatten() for one in unit]
    return (torch.stack(columns, dim=1) @ image.flatten()).reshape(1, 1, *grid.shape[1:3])


def test_own_grid_sample_refuses_second_order_in_the_grid(monkeypatch):
    monkeypatch.setattr(grid_sample_gradfix, "_twice_differentiable", lambda device_type: False)
    image, grid = draw(1, 1, 3, 3, grad=True), (draw(1, 2, 2, 2, seed=1) * 0.5).requires_grad_()
    y = grid_sample_gradfix.grid_sample(image, grid)
    (d_grid,) = torch.autograd.grad(y.sum(), grid, create_graph=True)
    with pytest.raises(AssertionError, match="with respect to the grid are not supported"):
        torch.autograd.grad(d_grid.sum(), image)


def test_grid_sample_is_tried_at_first_use_only():
    grid_sample_gradfix._twice_differentiable.cache_clear()
    for _ in range(2):
        grid_sample_gradfix.grid_sample(draw(1, 1, 2, 2), torch.zeros(1, 1, 1, 2).double())
    assert grid_sample_gradfix._twice_differentiable.cache_info().misses == 0  # nobody asked for a gradient
    for _ in range(2):
        grid_sample_gradfix.grid_sample(draw(1, 1, 2, 2, grad=True), torch.zeros(1, 1, 1, 2).double())
    assert grid_sample_gradfix._twice_differentiable.cache_info().misses == 1
    assert grid_sample_gradfix.enabled is False


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 4, 4), (2, 3, 1, 1), (2, 1, 4, 4)],
        [(2, 3), (3,), (1,)],
        [(1, 3), (2, 1), (2, 3)],
        [(2, 2), (2, 2), (2, 2)],
    ],
    ids=str,
)
def test_fma(shapes):
    a, b, c = (draw(*shape, seed=i, grad=True) for i, shape in enumerate(shapes))
    torch.testing.assert_close(fma(a, b, c), a * b + c)
    check_gradients(fma, a, b, c)
    grads = torch.autograd.grad(fma(a, b, c).sum(), [a, b, c])
    assert [grad.shape for grad in grads] == [t.shape for t in (a, b, c)]


def test_fma_keeps_the_layout():
    a = draw(2, 3, 4, 5).contiguous(memory_format=CHANNELS_LAST)
    assert fma(a, draw(2, 3, 1, 1), draw(2, 1, 4, 5)).is_contiguous(memory_format=CHANNELS_LAST)


# --------------------------------------------------------------------------------------------------
# Recorded as a graph


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [dict(up=2), dict(down=2), dict(up=2, flip_weight=False), dict(), dict(padding=1)]
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_graphs_hold_for_any_batch_size(kernel, options):
    """Of few-channel pictures, which run in one piece otherwise. Sizes become constants without a remark."""
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    w = torch.randn(2, 3, kernel, kernel)

    def call(x):
        return upfirdn2d.upsample2d(conv2d_resample(x, w, f, **options), f)

    traced = torch.jit.trace(call, torch.randn(2, 3, 8, 8))
    module = torch.nn.Module()
    module.forward = call
    dynamic = {0: torch.export.Dim("N")}
    exported = torch.export.export(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=[dynamic]).module()
    for num in [1, 2, 5]:
        x = torch.randn(num, 3, 8, 8)
        torch.testing.assert_close(traced(x), call(x))
        torch.testing.assert_close(exported(x), call(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_graphs_of_grouped_convolutions():
    """The number of groups may be a traced size; it holds for that size only."""
    w = torch.randn(2, 4, 3, 3, 3)

    def call(x):
        y = conv2d_resample(
            x.reshape(1, -1, 8, 8), w[: x.shape[0]].flatten(0, 1), groups=x.shape[0], padding=1
        )
        return y.reshape(x.shape[0], -1, 8, 8)

    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.jit.trace(call, torch.randn(2, 3, 8, 8))(x), call(x))


@pytest.mark.parametrize("up, down", [(2, 1), (1, 2)])
def test_convolutions_of_few_positions_are_those_of_many(up, down, monkeypatch):
    """The product of matrices against torch's convolution: values, and gradients of both orders."""
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, w):
        return conv2d_resample(x, w, f, up=up, down=down, padding=1, flip_weight=up == 1)

    monkeypatch.setattr(resampled_convolution, "_few_positions", lambda *_: False)
    want = run(x, w)
    wanted = torch.autograd.grad(want.square().sum(), [x, w])
    monkeypatch.setattr(resampled_convolution, "_few_positions", lambda *_: True)
    got = run(x, w)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), [x, w]), wanted)
    assert torch.autograd.gradcheck(run, [x, w]) and torch.autograd.gradgradcheck(run, [x, w])


@pytest.mark.parametrize("stride, kernel", [(2, (3, 3)), (2, (2, 5)), (3, (4, 3)), (1, (3, 1))])
def test_transposed_convolutions_by_phases(stride, kernel):
    x, w = torch.randn(2, 5, 4, 6, dtype=torch.float64), torch.randn(5, 3, *kernel, dtype=torch.float64)
    got = resampled_convolution._conv_transpose_phases(x, w, stride)
    torch.testing.assert_close(got, torch.nn.functional.conv_transpose2d(x, w, stride=stride))


def test_phases_are_taken_in_bfloat16_without_gradients(monkeypatch):
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    x, w = torch.randn(2, 8, 16, 16).bfloat16(), torch.randn(4, 8, 3, 3).bfloat16()
    taken, real = [], resampled_convolution._conv_transpose_phases
    monkeypatch.setattr(
        resampled_convolution, "_conv_transpose_phases", lambda *args: taken.append(1) or real(*args)
    )

    def run(x, w):
        return conv2d_resample(x, w, f, up=2, padding=1, flip_weight=False)

    want = run(x, w)
    assert not taken
    with torch.no_grad():
        got, exact = run(x, w), run(x.double(), w.double())
    assert len(taken) == 1
    assert (got - exact).std() < 1.05 * (want - exact).std()


def test_few_positions_are_counted_against_channels():
    x, w = torch.randn(2, 5, 4, 4), torch.randn(32, 5, 3, 3)
    assert resampled_convolution._few_positions(x, w, [4, 4]) and not resampled_convolution._few_positions(
        x, w, [5, 4]
    )
    assert not resampled_convolution._few_positions(x.bfloat16(), w.bfloat16(), [4, 4])
