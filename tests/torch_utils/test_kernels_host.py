# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' arithmetic, indexing and derivatives, run on the host from the very sources that a GPU runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ssn_ext.networks import SpatialSynthesisLayer
from torch_utils import custom_ops
from torch_utils.ops import bias_act as bias_act_module
from torch_utils.ops import spatial_modulation, upfirdn2d
from torch_utils.ops.bias_act import activation_funcs, bias_act
from training import networks

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ops.npz")
CASES = json.loads(str(GOLDEN["cases"]))
FILTERED = ("upfirdn2d", "filter2d", "upsample2d", "downsample2d")
CHANNELS_LAST = torch.channels_last
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FOUR = upfirdn2d.setup_filter([1, 3, 4, 2])  # not symmetric, 4 x 4
TWELVE = upfirdn2d.setup_filter([1, 2, 5, 3, 2, 7, 3, 1, 9, 2, 1, 3])  # 1-D


def draw(*shape, seed=0, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def amid_nan(x):
    """The same values and strides, with NaN before and after them in memory: what reads there shows."""
    room = 64
    flat = torch.full([x.untyped_storage().nbytes() // x.element_size() + 2 * room], math.nan, dtype=x.dtype)
    inside = torch.as_strided(flat, x.shape, x.stride(), room)
    inside.copy_(x)
    return inside


def check_rounded_once(y, exact):
    """y is `exact` (float64) up to one rounding to y's type, and what float32 arithmetic adds."""
    error = (y.double() - exact).abs()
    unit = torch.finfo(y.dtype).eps / 2
    assert (error <= exact.abs() * unit * 1.001 + 2e-6).all(), error.max()


@pytest.mark.parametrize(
    "layout",
    [torch.contiguous_format, pytest.param(CHANNELS_LAST, marks=pytest.mark.slow)],
    ids=["first", "last"],
)
def test_golden(host_kernels, layout):
    """The reference implementation's numbers."""
    for index, case in enumerate(CASES):
        if case["op"] not in ("bias_act", *FILTERED):
            continue
        op = bias_act if case["op"] == "bias_act" else getattr(upfirdn2d, case["op"])
        tensors = {name: torch.from_numpy(GOLDEN[f"{index:03d}.{name}"]) for name in case["tensors"]}
        if case["op"] in FILTERED:
            tensors.setdefault("f", None)
        expected = torch.from_numpy(GOLDEN[f"{index:03d}.out"])
        if tensors["x"].ndim == 4:
            tensors["x"] = tensors["x"].contiguous(memory_format=layout)
        result = op(**tensors, **case["kwargs"])
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        assert result.ndim != 4 or result.is_contiguous(memory_format=layout)
    assert {name for name, _ in host_kernels.launched} == {"bias_act", "upfirdn2d_tile"}


# --------------------------------------------------------------------------------------------------
# bias_act


@pytest.mark.parametrize("options", [{}, {"gain": -2.5, "clamp": 0.9}], ids=["plain", "gain_clamp"])
@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act_gradients(host_kernels, act, options):
    x, b = draw(2, 3, 3, 3, grad=True), draw(3, seed=1, grad=True)
    y = bias_act(x, b, act=act, **options)
    expected = bias_act(x, b, act=act, impl="ref", **options)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda x, b: bias_act(x, b, act=act, **options), (x, b))
    assert gradgradcheck(lambda x, b: bias_act(x, b, act=act, **options), (x, b))
    grads = {int(defines["GRAD"]) for _, defines in host_kernels.launched}
    assert grads == ({0, 1, 2} if activation_funcs[act].has_2nd_grad else {0, 1})


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=["first", "last"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bias_act_types(host_kernels, dtype, layout):
    """Forward, gradient and gradient of the gradient; 5 x 7 pixels, so that the last pack is not full."""
    x, v, w = (draw(2, 3, 5, 7, seed=s, dtype=dtype).contiguous(memory_format=layout) for s in (0, 1, 2))
    b = draw(3, seed=3, dtype=dtype)
    for act in activation_funcs:
        results = []
        for impl, cast in (("cuda", torch.clone), ("ref", torch.Tensor.double)):
            x_, v_ = cast(x).requires_grad_(), cast(v).requires_grad_()
            y = bias_act(x_, cast(b), act=act, clamp=1.2, impl=impl)
            (dx,) = torch.autograd.grad(y, x_, v_, create_graph=True)
            second = torch.autograd.grad(dx, [v_, x_], cast(w), allow_unused=True)
            results.append((y, dx, *second))
        for result, exact in zip(*results, strict=True):
            if result is None:
                assert not activation_funcs[act].has_2nd_grad and (exact is None or not exact.any())
                continue
            assert result.dtype == dtype and result.is_contiguous(memory_format=layout)
            if result is results[0][0]:
                check_rounded_once(result, exact)
            else:  # derivatives are computed from the rounded output
                torch.testing.assert_close(
                    result.double(), exact, rtol=0, atol=6 * torch.finfo(dtype).eps + 1e-6
                )
    assert {defines["VEC"] for _, defines in host_kernels.launched} == {str(16 // x.element_size())}


@pytest.mark.parametrize(
    "shape, dim", [((7,), 0), ((5, 6), 1), ((5, 6), 0), ((3, 4, 5), -1), ((2, 3, 2, 3, 2), 1)]
)
def test_bias_act_dimensions(host_kernels, shape, dim):
    x, b = draw(*shape, dtype=torch.float32), draw(shape[dim], seed=1, dtype=torch.float32)
    views = [x, x.flip(0), x.mT.contiguous().mT if x.ndim > 1 else x[:]]
    if x.ndim == 5:
        views.append(x.contiguous(memory_format=torch.channels_last_3d))
    for x in views:
        y = bias_act(x, b, dim=dim, act="lrelu")
        expected = bias_act(x.double(), b.double(), dim=dim, act="lrelu", impl="ref")
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
        assert y.is_contiguous(
            memory_format=torch.channels_last_3d
            if x is views[-1] and x.ndim == 5
            else torch.contiguous_format
        )
    assert len(host_kernels.launched) == len(views)


def test_bias_act_reads_its_operands_only(host_kernels):
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        x, b = (
            draw(1, 3, 5, 5, dtype=torch.float32).contiguous(memory_format=layout),
            draw(3, dtype=torch.float32),
        )
        for act in ("lrelu", "swish"):
            guarded = amid_nan(x).requires_grad_(), amid_nan(b)
            y = bias_act(*guarded, act=act)
            (dx,) = torch.autograd.grad(y, guarded[0], amid_nan(x), create_graph=True)
            assert torch.equal(y, bias_act(x, b, act=act)) and dx.isfinite().all()


def test_bias_act_misaligned(host_kernels):
    x = draw(41, dtype=torch.float32)[1:]
    torch.testing.assert_close(bias_act(x, act="relu", dim=0), bias_act(x.clone(), act="relu", dim=0))
    assert [defines["VEC"] for _, defines in host_kernels.launched] == ["1", "4"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_act_clamp_that_the_type_rounds(host_kernels, dtype):
    """0.3 is stored as 0.30005 or 0.2998: what was clamped to it has no gradient all the same."""
    for clamp in (0.3, 0.7, 0.9, 1.1):
        x = torch.tensor([-4.0, -0.2, 0.1, 5.0], dtype=dtype, requires_grad=True)
        (dx,) = torch.autograd.grad(bias_act(x, dim=0, clamp=clamp).sum(), x)
        assert dx.tolist() == [0, 1, 1, 0]


def test_bias_act_special_numbers(host_kernels):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 90.0, -90.0])
    for act in activation_funcs:
        for clamp in (None, 2.0):
            y = bias_act(x, dim=0, act=act, clamp=clamp)
            reference = bias_act(x, dim=0, act=act, clamp=clamp, impl="ref")
            torch.testing.assert_close(y, reference, equal_nan=True)


@pytest.mark.parametrize("act", ["tanh", "swish", "softplus"])
def test_bias_act_third_order(host_kernels, act):
    x, b = draw(5, grad=True), draw(5, seed=1, grad=True)
    results = []
    for impl in ("ref", "cuda"):
        y = bias_act(x, b, dim=0, act=act, impl=impl) ** 2
        for seed in (2, 3, 4):
            y = sum(torch.autograd.grad((y * draw(5, seed=seed)).sum(), [x, b], create_graph=True))
        results.append(y)
    torch.testing.assert_close(*results)
    assert results[0].abs().min() > 0


@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act_derivatives_at_zero(host_kernels, act):
    """At a kink PyTorch's choice of the two sides."""
    derivatives = []
    for impl in ("ref", "cuda"):
        x, v = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
        (dx,) = torch.autograd.grad(bias_act(x, dim=0, act=act, impl=impl), x, v, create_graph=True)
        second = torch.autograd.grad(dx.sum(), [v, x], allow_unused=True)
        derivatives.append([dx, *(torch.zeros(3) if d is None else d for d in second)])
    torch.testing.assert_close(derivatives[1], derivatives[0])


def test_bias_act_left_to_the_reference_path(host_kernels):
    """Where the output does not tell the side of the kink, and for nothing at all."""
    x = draw(4, grad=True)
    for options in ({"act": "lrelu", "alpha": -0.3}, {"act": "lrelu", "gain": 0.0}):
        assert gradcheck(lambda x, options=options: bias_act(x, dim=0, **options), x)
    assert bias_act(torch.zeros(0, 3), torch.zeros(3)).shape == (0, 3)
    assert host_kernels.launched == []


def test_bias_act_keeps_what_its_derivatives_refer_to(host_kernels):
    expected = {"linear": 0, "lrelu": 1, "swish": 2, "tanh": 3}  # none, y, x and b, all
    for act, count in expected.items():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            bias_act(draw(2, 3, 4, 4, grad=True), draw(3, grad=True), act=act)
        assert len(saved) == count, act


# --------------------------------------------------------------------------------------------------
# upfirdn2d

SETTINGS = [
    {},
    {"padding": [1, 2, 2, 1]},
    {"padding": [-1, 3, 2, -2], "flip_filter": True, "gain": 1.5},
    {"up": 2, "padding": [2, 1, 2, 1], "gain": 4},
    {"up": 2, "padding": [1, 0, 3, 2], "flip_filter": True},
    {"down": 2, "padding": 1},
    {"up": [2, 3], "down": [3, 2], "padding": [3, 5, -1, 7]},
    {"up": [1, 4], "down": [2, 1], "padding": [2, 3, 5, 0], "gain": -1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_upfirdn2d(host_kernels, settings):
    """Values and derivatives in both layouts; the input's neighbours in memory are NaN."""
    x = draw(2, 4, 7, 6)
    expected = upfirdn2d_reference(x, FOUR, **settings)
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        host_kernels.launched.clear()
        y = upfirdn2d.upfirdn2d(amid_nan(x.contiguous(memory_format=layout)), FOUR, **settings)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        assert y.is_contiguous(memory_format=layout)
        ((name, defines),) = host_kernels.launched
        assert name == "upfirdn2d_tile" and defines["VEC"] == ("2" if layout is CHANNELS_LAST else "1")
    small = draw(1, 2, 4, 3, grad=True)
    assert gradcheck(lambda x: upfirdn2d.upfirdn2d(x, FOUR, **{"padding": 3, **settings}), small)
    assert gradgradcheck(lambda x: upfirdn2d.upfirdn2d(x, FOUR, **{"padding": 3, **settings}), small)


def upfirdn2d_reference(x, f, **settings):
    return upfirdn2d.upfirdn2d(x, f, impl="ref", **settings)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_upfirdn2d_types(host_kernels, dtype):
    """One rounding of the exact result for a 2-D filter, two for a 1-D one."""
    for f, up in ((FOUR, 2), (TWELVE, 1)):
        x = draw(2, 16, 9, 5, dtype=dtype)
        exact = upfirdn2d_reference(x.double(), f, up=up, padding=6, gain=1.5)
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            y = upfirdn2d.upfirdn2d(x.contiguous(memory_format=layout), f, up=up, padding=6, gain=1.5)
            assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
            if f.ndim == 2:
                check_rounded_once(y, exact)
            else:
                torch.testing.assert_close(y.double(), exact, rtol=0, atol=3 * torch.finfo(dtype).eps + 1e-6)
    packs = {defines["VEC"] for _, defines in host_kernels.launched}
    assert packs == {"1", str(128 // torch.finfo(dtype).bits)}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "f",
    [TWELVE, None, torch.ones(1, 1), torch.arange(10.0).reshape(2, 5), torch.linspace(-1, 1, 24)],
    ids=["12", "none", "1x1", "2x5", "24"],
)
def test_upfirdn2d_filters(host_kernels, f, channels):
    """Long, odd and trivial filters, with channel counts that fill no pack."""
    for settings in ({"padding": 12}, {"up": 2, "padding": 11}, {"down": 2, "padding": [12, 11, 11, 13]}):
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            x = draw(2, channels, 9, 5, dtype=torch.float32).contiguous(memory_format=layout)
            y = upfirdn2d.upfirdn2d(x, f, **settings)
            torch.testing.assert_close(
                y.double(), upfirdn2d_reference(x.double(), f, **settings), rtol=1e-5, atol=1e-5
            )


def test_upfirdn2d_general_kernel(host_kernels):
    """Filters and factors beyond the tiles'."""
    x = draw(2, 3, 12, 10, grad=True)
    for f, settings in (
        (
            torch.linspace(-1, 1, 108).reshape(12, 9),
            {"padding": [4, 5, 6, 7], "flip_filter": True, "gain": 2.0},
        ),
        (
            torch.linspace(-1, 1, 240).reshape(16, 15),
            {"up": [2, 1], "down": [1, 3], "padding": [3, -1, 2, 9]},
        ),
        (FOUR, {"up": 5, "down": 2, "padding": [-3, 2, 7, -4]}),
    ):
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            host_kernels.launched.clear()
            guarded = amid_nan(x.detach().contiguous(memory_format=layout))
            y = upfirdn2d.upfirdn2d(guarded, f, **settings)
            torch.testing.assert_close(
                y, upfirdn2d_reference(x, f, **settings).detach(), rtol=1e-6, atol=1e-6
            )
            assert [name for name, _ in host_kernels.launched] == ["upfirdn2d_any"]
    small = draw(1, 1, 3, 3, grad=True)
    assert gradgradcheck(lambda x: upfirdn2d.upfirdn2d(x, FOUR, up=5, down=3, padding=4), small)


def test_upfirdn2d_reads_any_layout(host_kernels):
    base = draw(4, 8, 10, 3, dtype=torch.float32)
    views = (
        base.permute(0, 3, 1, 2),
        base[::2, 1:, :, :2],
        base[:1].expand(3, -1, -1, -1),
        base.transpose(2, 3),
    )
    for x in (*views, base.permute(3, 1, 0, 2)):
        y = upfirdn2d.upfirdn2d(x, FOUR, padding=3)
        torch.testing.assert_close(
            y.double(), upfirdn2d_reference(x.double(), FOUR, padding=3), rtol=1e-5, atol=1e-5
        )


def test_upfirdn2d_third_order(host_kernels):
    x = draw(1, 2, 4, 4, grad=True)
    results = []
    for impl in ("ref", "cuda"):
        y = upfirdn2d.upfirdn2d(x, FOUR, up=2, padding=1, impl=impl) ** 4
        for _ in range(3):
            (y,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        results.append(y)
    torch.testing.assert_close(*results)


# --------------------------------------------------------------------------------------------------
# Spatial modulation

GRIDS = [[(4, 4)], [(1, 1)], [(3, 5)], [(8, 12)], [(4, 4), (8, 6)], [(2, 3), (2, 3)], [(16, 4), (1, 12)]]


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_modulate(host_kernels, sizes):
    """Against the definition in float64, with all gradients; the operands' neighbours in memory are NaN."""
    x = draw(2, 4, 8, 12)
    grids = [draw(2, 4, *size, seed=i + 1) for i, size in enumerate(sizes)]
    expected = spatial_modulation.modulate(x, *grids, impl="ref")
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        operands = [amid_nan(t.contiguous(memory_format=layout)) for t in (x, *grids)]
        result = spatial_modulation.modulate(*operands)
        torch.testing.assert_close(result, expected)
        assert result.is_contiguous(memory_format=layout)
        v = draw(2, 4, 8, 12, seed=9)
        gradients = []
        for impl in ("ref", "cuda"):
            leaves = [t.clone().requires_grad_() for t in operands]
            y = spatial_modulation.modulate(*leaves, impl=impl)
            gradients.append(torch.autograd.grad(y, leaves, v))
        for fast, reference in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(fast, reference)
    assert {name for name, _ in host_kernels.launched} == {"modulate", "project"}


@pytest.mark.parametrize("sizes", [[(2, 2)], [(2, 1), (3, 4)]], ids=str)
def test_modulate_gradients(host_kernels, sizes):
    inputs = [draw(1, 2, 3, 4, grad=True), *(draw(1, 2, *size, seed=5, grad=True) for size in sizes)]
    assert gradcheck(spatial_modulation.modulate, inputs)
    assert gradgradcheck(spatial_modulation.modulate, inputs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_modulate_types(host_kernels, dtype):
    for layout, shape in ((torch.contiguous_format, (2, 3, 5, 16)), (CHANNELS_LAST, (2, 16, 5, 7))):
        x = draw(*shape, dtype=dtype).contiguous(memory_format=layout)
        grid = draw(*shape[:2], 2, 3, seed=1, dtype=torch.float32)
        exact = spatial_modulation.modulate(x.double(), grid.double(), impl="ref")
        x.requires_grad_()
        y = spatial_modulation.modulate(x, grid.requires_grad_())
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        check_rounded_once(y.detach(), exact)
        dx, dg = torch.autograd.grad(y, [x, grid], x)
        assert dx.dtype == dtype and dg.dtype == torch.float32
        g = grid.detach().double().requires_grad_()
        product = x.detach().double().square()
        (exact,) = torch.autograd.grad(spatial_modulation.resize(g, *shape[2:]), g, product)
        torch.testing.assert_close(dg.double(), exact, rtol=1e-5, atol=1e-5)
        assert host_kernels.launched[-1][1]["VEC"] == str(16 // x.element_size())


# --------------------------------------------------------------------------------------------------
# Wide indices


def test_wide_indices_give_the_same(host_kernels, monkeypatch):
    """The variants for tensors of 2^31 elements and more, on small ones."""
    plain = host_kernels.launch
    x, b, grid = draw(2, 4, 6, 8, dtype=torch.float32), draw(4, dtype=torch.float32), draw(2, 4, 2, 2)
    operations = [
        lambda: bias_act(x, b, act="swish"),
        lambda: upfirdn2d.upfirdn2d(x, FOUR, padding=2),
        lambda: upfirdn2d.upfirdn2d(x, FOUR, up=5),
        lambda: spatial_modulation.modulate(x, grid),
        lambda: spatial_modulation.run_project(host_kernels, x, x, 2, 2),
    ]
    narrow = [operation() for operation in operations]

    def widened(file, name, defines, *rest):
        plain(file, name, tuple(d.replace("int", "long long") if "INDEX" in d else d for d in defines), *rest)

    monkeypatch.setattr(host_kernels, "launch", widened)
    for operation, expected in zip(operations, narrow, strict=True):
        assert torch.equal(operation(), expected)


def test_wide_indices_are_chosen_by_size(recorder):
    for samples in (7, 8):  # 7 or 8 times 2^28 values
        x = torch.empty(samples, 2**8, 2**10, 2**10, device="meta")
        f = torch.ones(1, 1, device="meta")
        bias_act_module.run_kernel(recorder, 0, x, None, None, None, None, 1, "relu", 0.0, 1.0, None)
        upfirdn2d.run_kernel(recorder, x, f, 1, 1, 1, 1, 0, 0, 0, 0, False, 1.0)
        spatial_modulation.run_modulate(recorder, x, torch.empty(samples, 2**8, 4, 4, device="meta"))
    numbers = ["unsigned int", "int", "int", "unsigned long long", "long long", "long long"]
    indices = [dict(define.split("=") for define in launch[2])["INDEX"] for launch in recorder.launches]
    assert indices == numbers
    assert [launch[3] for launch in recorder.launches[3:]] == [2**29, 2**29, 2**29]


# --------------------------------------------------------------------------------------------------
# Whole networks


def test_networks(host_kernels, monkeypatch):
    """Pictures, scores and the gradients of both regularisers, which differentiate twice."""
    torch.manual_seed(0)
    shared = {"channel_base": 128, "channel_max": 8}
    G = networks.Generator(8, 0, 8, 16, 3, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=shared)
    D = networks.Discriminator(0, 16, 3, epilogue_kwargs={"mbstd_group_size": None}, **shared)
    z = draw(2, 8, dtype=torch.float32)

    def run():
        ws = G.mapping(z, None, skip_w_avg_update=True)
        images = G.synthesis(ws, noise_mode="const")
        direction = draw(*images.shape, seed=1, dtype=torch.float32)
        (path,) = torch.autograd.grad((images * direction).sum(), ws, create_graph=True)
        scores = D(images, None)
        (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        loss = path.square().sum() + slope.square().sum() + scores.sum()
        parameters = [*G.parameters(), *D.parameters()]
        return [images, scores, *torch.autograd.grad(loss, parameters, allow_unused=True)]

    results = run()
    used = {name for name, _ in host_kernels.launched}
    assert used == {"bias_act", "upfirdn2d_tile"}
    monkeypatch.setattr(custom_ops, "kernels", lambda x: None)
    for result, expected in zip(results, run(), strict=True):
        if expected is None:
            assert result is None
            continue
        scale = expected.abs().max().clamp(min=1e-3)
        assert ((result - expected).abs().max() / scale).item() < 1e-3


# --------------------------------------------------------------------------------------------------
# Whole layers


@pytest.mark.parametrize("demodulation", ["circular", "local", "zero_padded"])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("size", [(4, 4), (12, 12)], ids=["coarse", "fine"])
def test_spatial_layers_use_the_modulation(host_kernels, monkeypatch, demodulation, up, size):
    """The same values and gradients as without kernels; no style map is made where the mean square or cells do."""
    torch.manual_seed(0)
    layer = SpatialSynthesisLayer(
        4,
        6,
        w_dim=5,
        resolution=16 * up,
        up=up,
        demodulation=demodulation,
        encoder_channels=3,
        use_noise=False,
    )
    layer.encoder_style.weight.data.normal_()
    layer, weight = layer.double(), draw(2, 6, 16 * up, 16 * up)
    layer.resample_filter = layer.resample_filter.float()  # filters are float32 always
    x, w, e = draw(2, 4, 16, 16, grad=True), draw(2, 5, 4, 4, grad=True), draw(2, 3, *size, grad=True)
    tensors = [x, w, e, *layer.parameters()]

    def derivatives():
        y = layer(x, w, e)
        first = torch.autograd.grad((y * weight).sum(), tensors, create_graph=True)
        curved = [x, w, e, layer.weight]  # the rest enters piecewise linearly
        second = torch.autograd.grad(sum((g * g).sum() for g in first), curved)
        return [y, *first, *second]

    found = derivatives()
    launched = [name for name, _ in host_kernels.launched]
    assert launched.count("modulate") >= 2 + (demodulation == "local") and "project" in launched
    monkeypatch.setattr(custom_ops, "kernels", lambda x: None)
    for one, other in zip(found, derivatives(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
