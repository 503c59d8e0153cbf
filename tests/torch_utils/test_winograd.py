# SPDX-License-Identifier: Apache-2.0
"""Winograd's convolution against PyTorch's, which knows nothing of it."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from torch_utils import custom_ops
from torch_utils.ops import conv2d_gradfix, winograd


def drawn(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), **options)


@pytest.mark.parametrize(
    ("padding", "height", "width"),
    [
        ((1, 1), 8, 9),
        ((0, 0), 7, 10),
        ((2, 2), 8, 9),
        ((0, 1), 9, 13),
        ((2, 1), 10, 12),
        ((1, 1), 1, 1),
        ((1, 1), 4, 4),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_two_derivatives(padding, height, width, layout):
    x = drawn(3, 5, height, width, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w = drawn(7, 5, 3, 3, dtype=torch.float64).requires_grad_()
    b = drawn(7, dtype=torch.float64).requires_grad_()
    inputs, results = [x, w, b], []
    for y in (F.conv2d(x, w, b, padding=padding), winograd.conv2d(x, w, b, padding)):
        upstream = drawn(*y.shape, dtype=torch.float64).cos().requires_grad_()
        first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), [x, w, upstream])
        results.append([y, *first, *second])
    for plain, fast in zip(*results, strict=True):
        assert fast.shape == plain.shape
        torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(winograd.conv2d(x, w, b, padding), results[0][0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_the_tiles_worked_on_at_a_time_do_not_matter(most, monkeypatch):
    x, w = drawn(3, 4, 13, 18, dtype=torch.float64), drawn(5, 4, 3, 3, dtype=torch.float64).requires_grad_()
    chunks = winograd._chunks
    monkeypatch.setattr(winograd, "_chunks", lambda num, counts, _: chunks(num, counts, most))
    y = winograd.conv2d(x, w, None, 1)
    expected = F.conv2d(x, w, padding=1)
    torch.testing.assert_close(y, expected)
    upstream = y.detach().sin()
    for each in zip(*(torch.autograd.grad(out, w, upstream) for out in (y, expected)), strict=True):
        torch.testing.assert_close(*each)


def test_views_that_are_not_dense():
    whole = drawn(2, 6, 20, 24, dtype=torch.float64)
    w = drawn(4, 6, 3, 3, dtype=torch.float64)
    for x in (whole[:, :, 1:15, ::2], whole[:1].expand(3, -1, -1, -1), whole.transpose(2, 3)):
        torch.testing.assert_close(winograd.conv2d(x, w, None, 1), F.conv2d(x, w, padding=1))


def test_rounding_is_that_of_float32():
    """The bounds that the module states, of the result's standard deviation, for values and gradients."""
    x, w = drawn(4, 256, 32, 32), drawn(256, 256, 3, 3) / 48
    upstream = drawn(4, 256, 32, 32)
    results = []
    for dtype, conv in ((torch.float64, F.conv2d), (torch.float32, winograd.conv2d)):
        a, b, g = (each.to(dtype).requires_grad_() for each in (x, w, upstream))
        y = conv(a, b, None, padding=1)
        results.append([y, *torch.autograd.grad(y, [a, b], g)])
    for exact, rounded in zip(*results, strict=True):
        error = (rounded - exact) / exact.std()
        assert error.square().mean().sqrt() < 3e-6
        assert error.abs().max() < 3e-5


WIDE = dict(x=(1, 128, 32, 32), w=(128, 128, 3, 3), padding=1)


def wide(x=WIDE["x"], w=WIDE["w"], **options):
    return winograd.pays(drawn(*x), drawn(*w), **dict(dict(padding=WIDE["padding"]), **options))


def test_it_is_used_where_it_saves_time():
    assert wide()
    assert wide(x=(4, 512, 16, 16), w=(512, 512, 3, 3))
    assert not wide(x=(1, 127, 32, 32), w=(128, 127, 3, 3))
    assert not wide(x=(1, 128, 32, 31))  # 8 x 7 whole tiles
    assert not wide(x=(64, 128, 5, 5), padding=0)
    assert not wide(w=(128, 128, 1, 1), padding=0)
    assert not wide(stride=2) and not wide(stride=(1, 2)) and not wide(dilation=2) and not wide(padding=3)
    assert not wide(x=(1, 256, 32, 32), groups=2)
    assert not wide(padding="same")
    assert not winograd.pays(drawn(*WIDE["x"]).double(), drawn(*WIDE["w"]).double(), padding=1)
    assert not winograd.pays(drawn(*WIDE["x"]).bfloat16(), drawn(*WIDE["w"]).bfloat16(), padding=1)
    assert not winograd.pays(drawn(*WIDE["x"]).to("meta"), drawn(*WIDE["w"]).to("meta"), padding=1)


def test_conv2d_takes_it_and_the_reference_path_does_not(monkeypatch):
    x, w, b = drawn(*WIDE["x"]), drawn(*WIDE["w"]), drawn(128)
    calls = []
    inner = winograd._convolve
    monkeypatch.setattr(winograd, "_convolve", lambda *args: calls.append(1) or inner(*args))
    exact = F.conv2d(x.double(), w.double(), b.double(), padding=1)
    for number, gradients in enumerate((False, True), 1):
        with torch.set_grad_enabled(gradients):
            y = conv2d_gradfix.conv2d(x, w, b, padding=1)
        assert len(calls) == number and (y - exact).std() < 3e-6 * exact.std()
    with custom_ops.reference_only():
        assert torch.equal(conv2d_gradfix.conv2d(x, w, b, padding=1), F.conv2d(x, w, b, padding=1))
    assert len(calls) == 2 and not custom_ops.is_reference()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_onlookers_see_pytorchs_own_operation():
    x, w = drawn(*WIDE["x"]), drawn(*WIDE["w"])

    def conv(image):
        return conv2d_gradfix.conv2d(image, w, padding=1)

    derivative = F.conv2d(x, w, padding=1)  # linear: its own derivative
    assert "aten::_convolution" in str(torch.jit.trace(conv, x, check_trace=False).inlined_graph)
    torch.testing.assert_close(torch.func.jvp(conv, (x,), (x,))[1], derivative)
    torch.testing.assert_close(torch.func.vmap(conv)(x[None])[0], derivative)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(conv(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, derivative)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert wide()  # none of them leaves anything behind
