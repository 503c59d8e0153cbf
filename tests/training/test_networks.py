# SPDX-License-Identifier: Apache-2.0
"""The networks against golden numbers, closed forms and brute force."""

import copy
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import conv2d_gradfix, upfirdn2d
from training import networks

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ARCHITECTURES = ["skip", "resnet", "orig"]


def relative_error(value, reference):
    """Norm of the difference over norm of the reference."""
    value, reference = (torch.as_tensor(x).detach().cpu().double() for x in (value, reference))
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


def figures(x):
    """Sum, mean magnitude, first and last value."""
    x = x.detach()
    return [float(x.sum()), float(x.abs().mean()), float(x.flatten()[0]), float(x.flatten()[-1])]


def assert_figures(x, expected):
    # A sum of values of both signs may cancel, so its error counts against the sum of magnitudes.
    got = figures(x)
    scales = [max(abs(expected[0]), 0.01 * expected[1] * x.numel()), *[abs(v) for v in expected[1:]]]
    for value, reference, scale in zip(got, expected, scales, strict=True):
        assert abs(value - reference) <= 1e-3 * scale + 6e-6, (got, expected)


# ----------------------------------------------------------------------------
# Golden networks: every architecture, conditional and not.


@pytest.fixture(scope="module", params=["skip_resnet", "cond_orig", "resnet_skip"])
def golden(request):
    data = np.load(GOLDEN / f"networks_{request.param}.npz")
    data = {name: data[name] for name in data.files}
    config = json.loads(str(data["config"]))
    G = networks.Generator(**config["G"]).eval()
    D = networks.Discriminator(**config["D"]).eval()
    states = {}
    for name in "GD":
        prefix = name + "."
        states[name] = {k[2:]: torch.as_tensor(v) for k, v in data.items() if k.startswith(prefix)}
    G.load_state_dict(states["G"])
    D.load_state_dict(states["D"])
    return data, states, G, D


def test_state_dict_has_the_same_keys_shapes_and_order(golden):
    _, states, G, D = golden
    for net, state in [(G, states["G"]), (D, states["D"])]:
        found = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        assert found == {name: tuple(value.shape) for name, value in state.items()}
        assert list(found) == list(state)


@torch.no_grad()
def test_golden_mapping(golden):
    data, _, G, _ = golden
    z, c = torch.as_tensor(data["z"]), torch.as_tensor(data["c"])
    assert relative_error(G.mapping(z, c), data["ws"]) < 1e-4
    assert relative_error(G.mapping(z, c, truncation_psi=0.7), data["ws_psi0.7"]) < 1e-4
    cut = G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=4)
    assert relative_error(cut, data["ws_psi0.5_cut4"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("fused_modconv", [None, True, False])
@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_golden_images(golden, noise_mode, fused_modconv):
    data, _, G, _ = golden
    z, c = torch.as_tensor(data["z"]), torch.as_tensor(data["c"])
    img = G(z, c, noise_mode=noise_mode, fused_modconv=fused_modconv)
    assert relative_error(img, data[f"img_{noise_mode}"]) < 1e-4
    assert img.dtype == torch.float32 and img.is_contiguous()


@torch.no_grad()
def test_golden_logits(golden):
    data, _, _, D = golden
    logits = D(torch.as_tensor(data["img_const"]), torch.as_tensor(data["c"]))
    assert relative_error(logits, data["logits"]) < 1e-4


# ----------------------------------------------------------------------------
# Small networks built from a seed: parameter counts, order of random draws, values.


def small_generator(architecture="skip"):
    torch.manual_seed(0)
    G = networks.Generator(
        z_dim=16,
        c_dim=0,
        w_dim=16,
        img_resolution=16,
        img_channels=3,
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(channel_base=128, channel_max=32, architecture=architecture),
    )
    return G.eval()


def small_discriminator(architecture="resnet", c_dim=0, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(dict(epilogue_kwargs=dict(mbstd_group_size=4)), **kwargs)
    D = networks.Discriminator(
        c_dim=c_dim,
        img_resolution=16,
        img_channels=3,
        architecture=architecture,
        channel_base=128,
        channel_max=32,
        **kwargs,
    )
    return D.eval()


def small_latents():
    return torch.as_tensor(np.random.RandomState(0).randn(2, 16), dtype=torch.float32)


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture, count, expected",
    [
        ("skip", 21894, [-121.3252, 0.48179, 0.0183, -0.85852]),
        ("resnet", 21568, [-282.41477, 0.3328, -0.06559, -0.3162]),
        ("orig", 20928, [-185.25306, 0.42226, -0.0839, -0.31845]),
    ],
)
def test_seeded_generator(architecture, count, expected):
    G = small_generator(architecture)
    assert parameter_count(G) == count
    assert_figures(G(small_latents(), None, noise_mode="const"), expected)


def test_seeded_generator_draws_its_weights_in_the_known_order():
    G = small_generator()
    sums = [G.synthesis.b4.const.sum(), G.synthesis.b4.conv1.weight.sum(), G.mapping.fc1.weight.sum()]
    assert torch.stack(sums).tolist() == pytest.approx([31.98104, -133.13197, -1078.7665], rel=1e-5)


@torch.no_grad()
def test_seeded_mapping_noise_and_truncation():
    G, z = small_generator(), small_latents()
    assert_figures(G.mapping(z, None), [46.23274, 0.58295, -0.55025, 1.87057])
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.1)
    assert_figures(G(z, None, noise_mode="const"), [-140.67794, 0.53665, 0.20688, -0.97862])
    torch.manual_seed(5)
    assert_figures(G(z, None), [-153.89169, 0.55572, 0.19714, -0.83731])  # random noise is the default
    G.mapping.w_avg.fill_(0.25)
    cut = G(z, None, truncation_psi=0.5, truncation_cutoff=2, noise_mode="none")
    assert_figures(cut, [-71.34834, 0.43049, 0.16744, -0.18997])
    full = G(z, None, truncation_psi=0.5, noise_mode="none")
    assert_figures(full, [-155.17615, 0.35794, 0.20432, 0.05065])


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture, c_dim, count, expected",
    [
        ("resnet", 0, 35369, [2.89387, 0.36173, 0.37512, 0.18697]),
        ("skip", 0, 34921, [-3.79318, 0.47415, -0.34566, -0.517]),
        ("orig", 0, 34729, [-2.06479, 0.2581, -0.24856, -0.26056]),
        ("resnet", 3, 44968, [0.29006, 0.08243, -0.1538, 0.02041]),
        ("skip", 3, 44520, [-0.30221, 0.29104, -0.69706, 0.04846]),
        ("orig", 3, 44328, [-2.57696, 0.32212, -0.42144, -0.24912]),
    ],
)
def test_seeded_discriminator(architecture, c_dim, count, expected):
    D = small_discriminator(architecture, c_dim)
    assert parameter_count(D) == count
    x = torch.as_tensor(np.random.RandomState(1).randn(8, 3, 16, 16), dtype=torch.float32)
    c = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), 3).float() if c_dim else None
    assert_figures(D(x, c), expected)


@pytest.mark.parametrize("resolution, expected", [(4, 2), (16, 6), (1024, 18)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_number_of_ws(resolution, expected, architecture):
    net = networks.SynthesisNetwork(
        4, resolution, 3, channel_base=1024, channel_max=1, architecture=architecture
    )
    assert net.num_ws == expected
    assert net.block_resolutions == [2**i for i in range(2, int(math.log2(resolution)) + 1)]


@pytest.mark.parametrize("resolution", [2, 0, 66])
def test_resolution_must_be_a_small_number_doubled(resolution):
    with pytest.raises(AssertionError):
        networks.SynthesisNetwork(4, resolution, 3, channel_base=16)


# ----------------------------------------------------------------------------
# Mapping network.


def test_train_mode_mapping_tracks_the_mean():
    G, z = small_generator().train(), small_latents()
    G.mapping(z, None, skip_w_avg_update=True)
    assert float(G.mapping.w_avg.abs().sum()) == 0
    ws = G.mapping(z, None)
    assert_figures(G.mapping.w_avg, [0.01926, 0.00244, -0.00286, 0.00429])
    first = G.mapping.w_avg.clone()
    torch.testing.assert_close(first, 0.005 * ws[:, 0].mean(0).detach())
    G.mapping(z, None)
    torch.testing.assert_close(G.mapping.w_avg, first * 1.995)  # beta * w_avg + (1 - beta) * mean
    G.eval().mapping(z, None)
    torch.testing.assert_close(G.mapping.w_avg, first * 1.995)
    assert not G.mapping.w_avg.requires_grad


def test_ws_is_memory_of_its_own_and_z_may_be_double():
    G, z = small_generator(), small_latents()
    ws = G.mapping(z.double(), None)
    assert ws.dtype == torch.float32
    assert torch.equal(ws, G.mapping(z, None))
    before = ws[:, 1].clone()
    ws.data[:, 0] = 0
    assert torch.equal(ws[:, 1], before)


@pytest.mark.parametrize("cutoff, near", [(0, 0), (3, 3), (6, 6), (100, 6), (None, 6)])
def test_truncation_cutoff(cutoff, near):
    G, z = small_generator(), small_latents()
    G.mapping.w_avg.copy_(torch.arange(16.0))
    plain = G.mapping(z, None)
    ws = G.mapping(z, None, truncation_psi=0.25, truncation_cutoff=cutoff)
    torch.testing.assert_close(ws[:, :near], 0.25 * plain[:, :near] + 0.75 * G.mapping.w_avg)
    assert torch.equal(ws[:, near:], plain[:, near:])


def test_mapping_of_labels_only():
    net = networks.MappingNetwork(z_dim=0, c_dim=5, w_dim=8, num_ws=None, w_avg_beta=None)
    assert net.num_layers == 8 and "w_avg" not in dict(net.named_buffers())
    assert net.train()(None, torch.eye(5)).shape == (5, 8)
    with pytest.raises(AssertionError):
        net(None, torch.eye(5), truncation_psi=0.5)
    with pytest.raises(AssertionError):
        net(None, torch.eye(4))


def test_mapping_widths():
    net = networks.MappingNetwork(3, 5, 7, num_ws=2, num_layers=3, embed_features=4, layer_features=6)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "embed.weight": (4, 5),
        "fc0.weight": (6, 7),
        "fc1.weight": (6, 6),
        "fc2.weight": (7, 6),
    }
    with pytest.raises(AssertionError):
        net(torch.randn(2, 4), torch.eye(5)[:2])


def test_normalize_2nd_moment():
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    y = networks.normalize_2nd_moment(x, dim=2, eps=0)
    torch.testing.assert_close((y**2).mean(2), torch.ones(3, 5, dtype=torch.float64))
    torch.testing.assert_close(y / y[..., :1], x / x[..., :1])
    assert torch.equal(networks.normalize_2nd_moment(torch.zeros(1, 4)), torch.zeros(1, 4))


# ----------------------------------------------------------------------------
# Layers.


@pytest.mark.parametrize("activation", ["linear", "lrelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_fully_connected_layer(activation, bias):
    torch.manual_seed(0)
    net = networks.FullyConnectedLayer(
        6, 4, bias=bias, activation=activation, lr_multiplier=0.01, bias_init=2
    )
    x = torch.randn(5, 6)
    y = x @ net.weight.t() * (0.01 / math.sqrt(6))
    if bias:
        assert net.bias.tolist() == [2.0] * 4
        y = y + 0.02
    if activation == "lrelu":
        y = torch.where(y > 0, y, 0.2 * y) * math.sqrt(2)
    torch.testing.assert_close(net(x), y)
    assert 50 < float(net.weight.detach().std()) < 200
    assert net(x.double()).dtype == torch.float64


@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["skip", "lrelu"])
def test_conv2d_layer_equals_resampling_around_a_convolution(up, down, kind):
    torch.manual_seed(1)
    options = dict(bias=False) if kind == "skip" else dict(activation="lrelu", conv_clamp=0.5)
    net = networks.Conv2dLayer(3, 4, kernel_size=3, up=up, down=down, **options)
    net.weight.data = net.weight.data.double()
    if net.bias is not None:
        net.bias.data = torch.randn(4, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight = net.weight / math.sqrt(27)
    f = net.resample_filter
    if up == 2:  # stored kernels of up-sampling layers are true convolutions
        y = upfirdn2d.upfirdn2d(x, f, up=2, padding=[3, 2, 3, 2], gain=4)
        y = F.conv2d(y, weight.flip([2, 3]))
    elif down == 2:
        y = F.conv2d(F.pad(x, [2] * 4), weight)
        y = upfirdn2d.upfirdn2d(y, f, down=2)
    else:
        y = F.conv2d(x, weight, padding=1)
    if kind == "lrelu":
        y = F.leaky_relu(y + net.bias[:, None, None], 0.2) * math.sqrt(2)
    y = y * 0.7 if kind == "skip" else (y * 0.7).clamp(-0.35, 0.35)
    torch.testing.assert_close(net(x, gain=0.7), y)


def test_frozen_layers_become_buffers_of_the_same_names():
    plain = small_discriminator()
    layers = ["b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0", "b8.conv1", "b8.skip"]
    for count in [0, 1, 4, 6, 99]:
        D = small_discriminator(block_kwargs=dict(freeze_layers=count))
        assert set(D.state_dict()) == set(plain.state_dict())
        frozen = {name for name in layers if name + ".weight" in dict(D.named_buffers())}
        assert frozen == set(layers[:count])
        trainable = {name for name in layers if name + ".weight" in dict(D.named_parameters())}
        assert trainable == set(layers[count:])
        for name, value in plain.state_dict().items():
            assert torch.equal(D.state_dict()[name], value)
    assert [D.b16.first_layer_idx, D.b8.first_layer_idx] == [0, 4]
    assert "b16.skip.bias" not in D.state_dict()


@pytest.mark.parametrize("size, group, maps", [(8, 4, 1), (6, 3, 2), (4, 8, 1), (6, None, 3), (1, 4, 1)])
def test_minibatch_std_by_brute_force(size, group, maps):
    x = np.random.RandomState(0).randn(size, 6, 2, 3)
    y = networks.MinibatchStdLayer(group, maps)(torch.as_tensor(x)).numpy()
    assert np.array_equal(y[:, :6], x)
    groups = size // min(group or size, size)
    width = 6 // maps
    for n in range(size):
        members = [m for m in range(size) if m % groups == n % groups]
        for f in range(maps):
            values = x[members][:, f * width : (f + 1) * width]
            expected = np.sqrt(values.var(axis=0) + 1e-8).mean()
            np.testing.assert_allclose(y[n, 6 + f], expected, rtol=1e-10)


def test_minibatch_std_needs_whole_groups():
    with pytest.raises(RuntimeError):
        networks.MinibatchStdLayer(4)(torch.zeros(6, 2, 4, 4))


def test_discriminator_without_minibatch_std_judges_samples_alone():
    D = small_discriminator(epilogue_kwargs=dict(mbstd_num_channels=0))
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(D(x, None)[:1], D(x[:1], None), rtol=1e-5, atol=1e-5)
    assert D.b4.mbstd is None and D.b4.conv.weight.shape[1] == 32


def test_duplicate_discriminator_options_are_an_error():
    with pytest.raises(TypeError):
        small_discriminator(block_kwargs=dict(architecture="skip"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_attributes(architecture):
    G, D = small_generator(architecture), small_discriminator(architecture)
    b4, b8, b16 = (getattr(G.synthesis, f"b{r}") for r in G.synthesis.block_resolutions)
    torgb = 1 if architecture == "skip" else 0
    assert [b.num_torgb for b in (b4, b8, b16)] == [torgb, torgb, 1]
    assert [b.num_conv for b in (b4, b8, b16)] == [1, 2, 2]
    assert [b.is_last for b in (b4, b8, b16)] == [False, False, True]
    assert hasattr(b8, "skip") == (architecture == "resnet") and not hasattr(b4, "skip")
    assert [D.b16.num_layers, D.b8.num_layers] == {"skip": [3, 3], "resnet": [4, 3], "orig": [3, 2]}[
        architecture
    ]
    assert (G.z_dim, G.c_dim, G.w_dim, G.img_resolution, G.img_channels, G.num_ws) == (16, 0, 16, 16, 3, 6)
    assert G.mapping.num_ws == 6 and D.block_resolutions == [16, 8]


def test_block_filter_goes_to_the_resampling_layers_only():
    net = networks.SynthesisNetwork(
        4, 8, 3, channel_base=16, resample_filter=[1, 2, 1], architecture="resnet"
    )
    shapes = {name: tuple(b.shape) for name, b in net.b8.named_buffers() if name.endswith("resample_filter")}
    assert shapes == {
        "resample_filter": (3, 3),
        "conv0.resample_filter": (3, 3),
        "conv1.resample_filter": (4, 4),
        "skip.resample_filter": (3, 3),
    }


# ----------------------------------------------------------------------------
# Modulated convolution.


def golden_convolutions():
    ops = np.load(GOLDEN / "ops.npz")
    for i, case in enumerate(json.loads(str(ops["cases"]))):
        if case["op"] == "modulated_conv2d":
            yield case["kwargs"], {name: ops[f"{i:03d}.{name}"] for name in [*case["tensors"], "out"]}


@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("case", range(8))
def test_golden_modulated_conv(case, fused_modconv):
    kwargs, arrays = list(golden_convolutions())[case]
    tensors = {name: torch.as_tensor(value) for name, value in arrays.items()}
    expected = tensors.pop("out")
    out = networks.modulated_conv2d(**tensors, **kwargs, fused_modconv=fused_modconv)
    assert relative_error(out, expected) < 1e-5


def conv_tensors(num=3, in_channels=4, out_channels=5, size=6, dtype=torch.float64):
    torch.manual_seed(3)
    return dict(
        x=torch.randn(num, in_channels, size, size, dtype=dtype),
        weight=torch.randn(out_channels, in_channels, 3, 3, dtype=dtype),
        styles=torch.randn(num, in_channels, dtype=dtype) + 1,
    )


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("fused_modconv", [True, False])
def test_modulated_conv_is_a_convolution_per_sample(demodulate, fused_modconv):
    t = conv_tensors()
    noise = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    options = dict(padding=1, demodulate=demodulate, fused_modconv=fused_modconv)
    out = networks.modulated_conv2d(**t, noise=noise, **options)
    for n in range(3):
        kernel = t["weight"] * t["styles"][n][None, :, None, None]
        if demodulate:
            kernel = kernel / (kernel.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        expected = F.conv2d(t["x"][n : n + 1], kernel, padding=1) + noise[n]
        torch.testing.assert_close(out[n : n + 1], expected)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_fused_equals_shared_to_second_derivatives(up, demodulate):
    t = conv_tensors(num=2, size=4)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    options = dict(up=up, padding=1, resample_filter=f, flip_weight=up == 1, demodulate=demodulate)
    probe = torch.randn(2, 5, 4 * up, 4 * up, dtype=torch.float64)
    results = []
    for fused_modconv in [True, False]:
        leaves = {name: value.clone().requires_grad_() for name, value in t.items()}
        noise = torch.full([4 * up, 4 * up], 0.3, dtype=torch.float64, requires_grad=True)
        out = networks.modulated_conv2d(**leaves, noise=noise, **options, fused_modconv=fused_modconv)
        wanted = [*leaves.values(), noise]
        first = torch.autograd.grad((out.square() * probe).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        results.append([out, *first, *second])
    for fused, shared in zip(*results, strict=True):
        torch.testing.assert_close(fused, shared)


@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("up, demodulate", [(1, True), (2, True), (1, False)])
def test_gradients_of_modulated_conv(up, demodulate, fused_modconv):
    t = conv_tensors(num=2, in_channels=2, out_channels=2, size=2)
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    noise = torch.randn(2, 1, 2 * up, 2 * up, dtype=torch.float64)
    inputs = [v.requires_grad_() for v in (t["x"], t["weight"], t["styles"], noise)]

    def run(x, weight, styles, noise):
        return networks.modulated_conv2d(
            x,
            weight,
            styles,
            noise=noise,
            up=up,
            padding=1,
            resample_filter=f,
            flip_weight=up == 1,
            demodulate=demodulate,
            fused_modconv=fused_modconv,
        )

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_styles_keep_their_gradient_where_weight_gradients_are_suppressed():
    t = conv_tensors(num=2, size=4)
    grads = []
    for suppressed in [False, True]:
        styles = t["styles"].clone().requires_grad_()
        weight = t["weight"].clone().requires_grad_()
        out = networks.modulated_conv2d(t["x"], weight, styles, padding=1, fused_modconv=False)
        if suppressed:
            with conv2d_gradfix.no_weight_gradients():
                grads += torch.autograd.grad(out.square().sum(), [styles])
        else:
            grads += torch.autograd.grad(out.square().sum(), [styles])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("fused_modconv", [True, False])
def test_modulated_conv_in_half_precision_survives_large_factors(fused_modconv):
    t = conv_tensors(dtype=torch.float32)
    expected = networks.modulated_conv2d(**t, padding=1, fused_modconv=fused_modconv)
    half = dict(x=t["x"].half(), weight=t["weight"] * 1e4, styles=t["styles"] * 1e3)
    out = networks.modulated_conv2d(**half, padding=1, fused_modconv=fused_modconv)
    assert out.dtype == torch.float16
    assert relative_error(out, expected) < 3e-3


@pytest.mark.parametrize("fused_modconv", [True, False])
@pytest.mark.parametrize("num", [1, 3])
def test_modulated_conv_leaves_its_arguments_alone(num, fused_modconv):
    t = conv_tensors(num=num)
    t["noise"] = torch.randn(6, 6, dtype=torch.float64)
    kept = copy.deepcopy(t)
    networks.modulated_conv2d(**t, padding=1, fused_modconv=fused_modconv)
    assert all(torch.equal(t[name], kept[name]) for name in t)


def test_modulated_conv_keeps_channels_last():
    t = conv_tensors(in_channels=8, dtype=torch.float32)
    t["x"] = t["x"].to(memory_format=torch.channels_last)
    out = networks.modulated_conv2d(**t, padding=1, fused_modconv=False)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_modulated_conv_checks_shapes():
    t = conv_tensors()
    with pytest.raises(AssertionError):
        networks.modulated_conv2d(t["x"], t["weight"], t["styles"][:2])
    with pytest.raises(AssertionError):
        networks.modulated_conv2d(t["x"][:, :3], t["weight"], t["styles"])


# ----------------------------------------------------------------------------
# Whole networks.


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_size_does_not_matter(architecture):
    G, z = small_generator(architecture), torch.randn(5, 16)
    images = G(z, None, noise_mode="const")
    for n in range(5):
        one = G(z[n : n + 1], None, noise_mode="const")
        torch.testing.assert_close(one, images[n : n + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(architecture):
    G, D = small_generator(architecture).train(), small_discriminator(architecture).train()
    D(G(small_latents(), None), None).sum().backward()
    missing = [name for net in (G, D) for name, p in net.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_options_do_not_change_results_without_cuda(architecture):
    options = dict(num_fp16_res=2, conv_clamp=256, fp16_channels_last=True)
    config = dict(img_resolution=16, img_channels=3)
    synthesis = dict(channel_base=128, channel_max=32, architecture=architecture)
    torch.manual_seed(0)
    G = networks.Generator(
        16, 0, 16, **config, mapping_kwargs={}, synthesis_kwargs=dict(synthesis, **options)
    )
    torch.manual_seed(0)
    plain = networks.Generator(16, 0, 16, **config, synthesis_kwargs=synthesis)
    assert [getattr(G.synthesis, f"b{r}").use_fp16 for r in (4, 8, 16)] == [False, True, True]
    assert G.synthesis.b16.channels_last
    for force_fp32 in [False, True]:
        img = G.eval()(small_latents(), None, noise_mode="const", force_fp32=force_fp32)
        reference = plain.eval()(small_latents(), None, noise_mode="const")
        torch.testing.assert_close(img, reference, rtol=1e-4, atol=1e-5)
        assert img.is_contiguous()
    torch.manual_seed(0)
    kwargs = dict(num_fp16_res=2, conv_clamp=256, block_kwargs=dict(fp16_channels_last=True))
    D = small_discriminator(architecture, **kwargs)
    assert D.b16.use_fp16 and D.b8.use_fp16
    reference = small_discriminator(architecture)(img, None)
    torch.testing.assert_close(D(img, None, force_fp32=False), reference, rtol=1e-4, atol=1e-5)


def assert_half_precision_is_close(architecture, channels_last, device):
    options = dict(num_fp16_res=2, conv_clamp=256)
    G, D = small_generator(architecture), small_discriminator(architecture).to(device)
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(0.1)
    kwargs = copy.deepcopy(dict(G.init_kwargs))
    kwargs["synthesis_kwargs"].update(options, fp16_channels_last=channels_last)
    H = networks.Generator(**kwargs).to(device).eval()
    H.load_state_dict(G.state_dict())
    E = small_discriminator(architecture, **options, block_kwargs=dict(fp16_channels_last=channels_last))
    E = E.to(device)
    seen = set()
    for block in [H.synthesis.b16, E.b16]:
        block.conv1.register_forward_hook(lambda module, inputs, result: seen.add(result.dtype))
    z = small_latents().to(device)
    G = G.to(device)
    for num in [1, 2]:
        img, reference = (net(z[:num], None, noise_mode="const") for net in (H, G))
        assert img.dtype == torch.float32 and img.is_contiguous()
        assert relative_error(img, reference) < 5e-3
        logits = E(img, None)
        assert logits.dtype == torch.float32
        assert relative_error(logits, D(img, None)) < 5e-3
    assert seen == {torch.float16}
    img.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in H.parameters())
    seen.clear()
    same = H(z, None, noise_mode="const", force_fp32=True)
    assert relative_error(same, G(z, None, noise_mode="const")) < 1e-5
    assert relative_error(E(same, None, force_fp32=True), D(same, None)) < 1e-5
    assert seen == {torch.float32}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_if_it_were_used_on_cpu(architecture, channels_last, monkeypatch):
    def as_on_cuda(device, use_fp16, channels_last, *_):
        layout = torch.channels_last if use_fp16 and channels_last else torch.contiguous_format
        return torch.float16 if use_fp16 else torch.float32, layout

    monkeypatch.setattr(networks, "_compute_format", as_on_cuda)
    assert_half_precision_is_close(architecture, channels_last, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_on_cuda(architecture, channels_last):
    assert_half_precision_is_close(architecture, channels_last, "cuda")


def test_clamp_bounds_every_layer():
    layer = networks.SynthesisLayer(2, 3, 4, resolution=8, conv_clamp=0.25)
    layer.bias.data.fill_(10)
    y = layer(torch.randn(2, 2, 8, 8), torch.randn(2, 4), noise_mode="none", gain=0.5)
    assert float(y.detach().max()) == pytest.approx(0.125)


def test_noise_modes():
    torch.manual_seed(0)
    layer = networks.SynthesisLayer(2, 3, 4, resolution=8)
    layer.noise_strength.data.fill_(0.5)
    x, w = torch.randn(4, 2, 8, 8), torch.randn(4, 4)
    with pytest.raises(AssertionError):
        layer(x, w, noise_mode="loud")
    torch.manual_seed(7)
    random = layer(x, w)
    torch.manual_seed(7)
    assert torch.equal(random, layer(x, w, noise_mode="random"))
    assert not torch.equal(random, layer(x, w, noise_mode="random"))
    const = layer(x, w, noise_mode="const")
    assert torch.equal(const, layer(x, w, noise_mode="const"))
    silent = networks.SynthesisLayer(2, 3, 4, resolution=8, use_noise=False)
    assert not any("noise" in name for name in silent.state_dict())
    silent.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(silent(x, w), layer(x, w, noise_mode="none"))


def test_skip_generator_adds_up_images():
    """With one colour layer's weights at zero the picture is the other layers' up-sampled."""
    G = small_generator()
    for name in ["b8", "b16"]:
        getattr(G.synthesis, name).torgb.weight.data.zero_()
    ws = G.mapping(small_latents(), None)
    b4 = G.synthesis.b4
    _, img = b4(None, None, ws[:, :2], noise_mode="const")
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    expected = upfirdn2d.upsample2d(upfirdn2d.upsample2d(img, f), f)
    torch.testing.assert_close(G.synthesis(ws, noise_mode="const"), expected)


def test_training_mode_never_fuses(monkeypatch):
    seen = []
    original = networks.modulated_conv2d

    def spy(*args, fused_modconv=True, **kwargs):
        seen.append(fused_modconv)
        return original(*args, fused_modconv=fused_modconv, **kwargs)

    monkeypatch.setattr(networks, "modulated_conv2d", spy)
    G = small_generator()
    G.train()(small_latents()[:1], None)
    assert seen and not any(seen)


SIGNATURES = {
    "modulated_conv2d": "x weight styles noise up down padding resample_filter demodulate flip_weight "
    "fused_modconv",
    "FullyConnectedLayer": "in_features out_features bias activation lr_multiplier bias_init",
    "Conv2dLayer": "in_channels out_channels kernel_size bias activation up down resample_filter conv_clamp "
    "channels_last trainable",
    "MappingNetwork": "z_dim c_dim w_dim num_ws num_layers embed_features layer_features activation "
    "lr_multiplier w_avg_beta",
    "SynthesisLayer": "in_channels out_channels w_dim resolution kernel_size up use_noise activation "
    "resample_filter conv_clamp channels_last",
    "ToRGBLayer": "in_channels out_channels w_dim kernel_size conv_clamp channels_last",
    "SynthesisBlock": "in_channels out_channels w_dim resolution img_channels is_last architecture "
    "resample_filter conv_clamp use_fp16 fp16_channels_last layer_kwargs",
    "SynthesisNetwork": "w_dim img_resolution img_channels channel_base channel_max num_fp16_res "
    "block_kwargs",
    "Generator": "z_dim c_dim w_dim img_resolution img_channels mapping_kwargs synthesis_kwargs",
    "DiscriminatorBlock": "in_channels tmp_channels out_channels resolution img_channels first_layer_idx "
    "architecture activation resample_filter conv_clamp use_fp16 fp16_channels_last freeze_layers",
    "MinibatchStdLayer": "group_size num_channels",
    "DiscriminatorEpilogue": "in_channels cmap_dim resolution img_channels architecture mbstd_group_size "
    "mbstd_num_channels activation conv_clamp",
    "Discriminator": "c_dim img_resolution img_channels architecture channel_base channel_max num_fp16_res "
    "conv_clamp cmap_dim block_kwargs mapping_kwargs epilogue_kwargs",
}


OURS = {
    "SynthesisLayer": ["shape"],
    "SynthesisBlock": ["shape", "half_dtype"],
    "SynthesisNetwork": ["img_shape"],
    "Generator": ["img_shape"],
    "DiscriminatorBlock": ["shape", "half_dtype"],
    "DiscriminatorEpilogue": ["shape"],
    "Discriminator": ["img_shape"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_argument_names_are_those_of_the_family_and_then_ours(name):
    target = getattr(networks, name)
    if isinstance(target, type):
        target = target.__mro__[1].__init__  # below the persistent wrapper
    found = [p for p in inspect.signature(target).parameters if p != "self"]
    family, ours = SIGNATURES[name].split(), OURS.get(name, [])
    end = len(family) - family[-1].endswith("_kwargs") if name.endswith(("Block", "Network")) else len(family)
    assert found == family[:end] + ours + family[end:]
