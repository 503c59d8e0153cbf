# SPDX-License-Identifier: Apache-2.0
"""The SPADE generator: eq. (3) to (5) against second implementations, statistics, transfer, --cfg=spade."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ssn_ext import hooks, transfer
from ssn_ext.networks import SpatialGenerator, SpatialMappingNetwork
from ssn_ext.spade_networks import BatchStatistics, SpadeGenerator, SpadeLayer, resize
from training import snapshot, training_loop
from training.networks import Discriminator, Generator

WIDTHS = dict(channel_base=64, channel_max=8)
DATA = dict(c_dim=0, img_resolution=16, img_channels=3)
DEEP = dict(mapping_kwargs=dict(num_layers=2))


def small(grid=(2, 2), seed=0, **synthesis):
    """A generator without two equal values, in training mode."""
    torch.manual_seed(seed)
    kwargs = dict(WIDTHS, encoder_kwargs=dict(channels=4), **synthesis)
    blocks = grid[0] * grid[1]
    G = SpadeGenerator(
        z_dim=8 * blocks, w_dim=8 * blocks, latent_grid=list(grid), synthesis_kwargs=kwargs, **DEEP, **DATA
    )
    for p in G.requires_grad_(False).parameters():
        p.add_(0.3 * torch.randn_like(p))
    return G


def plain(seed=0, **synthesis):
    """A StyleGAN2 of the same widths."""
    torch.manual_seed(seed)
    return Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(WIDTHS, **synthesis), **DEEP, **DATA)


# --- statistics ---------------------------------------------------------------------------------------------


def test_batch_statistics_are_batch_normalisation():
    """Batch, running and later exponential statistics, against torch's own."""
    torch.manual_seed(0)
    ours = BatchStatistics(5, momentum=0.25)
    batches = [3 * torch.randn(4, 5, 6, 7) + torch.arange(5.0)[:, None, None] for _ in range(7)]
    mean, variance = torch.zeros(5), torch.ones(5)
    for number, x in enumerate(batches, 1):
        expected = F.batch_norm(x, None, None, training=True, eps=ours.eps)
        torch.testing.assert_close(ours(x), expected)
        weight = max(1 / number, 0.25)
        mean = (1 - weight) * mean + weight * x.mean(dim=[0, 2, 3])
        variance = (1 - weight) * variance + weight * x.var(dim=[0, 2, 3], unbiased=False)
        torch.testing.assert_close(ours.running_mean, mean)
        torch.testing.assert_close(ours.running_var, variance)
    ours.eval()
    expected = F.batch_norm(batches[0], mean, variance, training=False, eps=ours.eps)
    torch.testing.assert_close(ours(batches[0]), expected)
    assert float(ours.count) == 7  # in eval mode nothing is remembered


def test_second_derivatives():
    """Path lengths differentiate twice through the statistics of the batch."""
    torch.manual_seed(0)
    layer = BatchStatistics(2).double()
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).pow(3), [x])


@pytest.mark.parametrize("up", [1, 2])
def test_layer_is_equation_3_and_a_convolution(up):
    torch.manual_seed(0)
    layer = SpadeLayer(4, 6, w_dim=5, shape=[8, 8], up=up, resample_filter=[1, 1], encoder_channels=3)
    for p in layer.requires_grad_(False).parameters():
        p.add_(torch.randn_like(p))
    side = 8 // up
    x, w, e = torch.randn(3, 4, side, side), torch.randn(3, 5, 2, 2), torch.randn(3, 3, 4, 4)
    got = layer(x, w, e, noise_mode="const")
    maps = []
    for affine, correction in [
        (layer.affine, layer.encoder_style),
        (layer.shift, layer.encoder_shift),
    ]:
        at = torch.einsum("oi,nihw->nohw", affine.weight / 5**0.5, w) + affine.bias[:, None, None]
        more = torch.einsum("oi,nihw->nohw", correction.weight / 3**0.5, e)
        maps.append(F.interpolate(at, [side, side], mode="bilinear") + resize(more, side, side))
    mu = x.mean(dim=[0, 2, 3], keepdim=True)
    sigma = (x.square().mean(dim=[0, 2, 3], keepdim=True) - mu**2 + 1e-5).sqrt()
    h = maps[0] * (x - mu) / sigma + maps[1]
    weight = layer.weight / (4 * 9) ** 0.5
    if up == 2:  # StyleGAN2's order: the kernel turned round, and up-sampled by the filter; borders aside
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        h = F.conv2d(h, weight.flip([2, 3]), padding=1)
        inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    else:
        h, inner = F.conv2d(h, weight, padding=1), ...
    h = h + layer.noise_const * layer.noise_strength + layer.bias[:, None, None]
    torch.testing.assert_close(got[inner], (F.leaky_relu(h, 0.2) * 2**0.5)[inner], rtol=1e-4, atol=1e-5)


# --- the network --------------------------------------------------------------------------------------------


def test_pictures_depend_on_each_other_in_training_mode_only():
    G = small()
    z = torch.randn(6, G.z_dim)
    apart, together = G(z[:3], None, noise_mode="const"), G(z, None, noise_mode="const")[:3]
    assert float((apart - together).abs().max()) > 1e-2
    G.eval()
    apart, together = G(z[:3], None, noise_mode="const"), G(z, None, noise_mode="const")[:3]
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_mapping_is_that_of_ssn():
    """Same tensors, same ws, label and truncation included; and the same refusal."""
    torch.manual_seed(0)
    from ssn_ext import spade_networks

    args = dict(z_dim=32, c_dim=3, w_dim=24, num_ws=4, latent_grid=[2, 2], num_layers=3)
    ours, theirs = spade_networks.SpatialMappingNetwork(**args), SpatialMappingNetwork(**args)
    theirs.load_state_dict(ours.state_dict())
    z, c = torch.randn(5, 32), torch.eye(3)[[0, 1, 2, 0, 1]]
    for _ in range(2):
        assert torch.equal(ours(z, c), theirs(z, c))
    psi = dict(truncation_psi=0.5, truncation_cutoff=2)
    assert torch.equal(ours(z, c, **psi), theirs(z, c, **psi)) and torch.equal(ours.w_avg, theirs.w_avg)
    with pytest.raises(ValueError, match="z has shape"):
        ours(z[:, :8], c)


def test_resizing_is_that_of_ssn():
    from ssn_ext import networks

    x = torch.randn(2, 3, 4, 6)
    for shape in [(4, 6), (8, 12), (2, 3), (3, 18), (16, 4)]:
        torch.testing.assert_close(resize(x, *shape), networks.resize(x, *shape))


def test_half_precision_is_accepted_and_does_nothing():
    G = small().eval()
    H = small(num_fp16_res=4, conv_clamp=256, half_dtype="bfloat16", fp16_channels_last=True).eval()
    z = torch.randn(2, G.z_dim)
    a, b = (each(z, None, noise_mode="const") for each in (G, H))
    assert torch.equal(a, b) and a.dtype == torch.float32
    flat = SpadeGenerator(z_dim=32, w_dim=32, latent_grid=[2, 2], num_fp16_res=2, **WIDTHS, **DATA)
    assert flat(torch.randn(1, 32), None, force_fp32=True).shape == (1, 3, 16, 16)


def test_pictures_that_are_not_square():
    options = dict(c_dim=0, img_resolution=24, img_channels=1, img_shape=[16, 24], latent_grid=[2, 3])
    G = SpadeGenerator(z_dim=24, w_dim=24, synthesis_kwargs=WIDTHS, **options)
    assert G(torch.randn(2, 24), None).shape == (2, 1, 16, 24) and G.img_shape == [16, 24]


# --- statistics of the weight average -----------------------------------------------------------------------


def test_measured_statistics_are_those_of_the_pictures():
    """The first layer's are exact means over all; nothing else of the network changes."""
    G = small().eval()
    before = copy.deepcopy(G)
    z = torch.randn(hooks.STATISTICS_BATCH * 3, G.z_dim)
    hooks.measure_statistics(G, z, torch.zeros(len(z), 0))
    first = G.synthesis.b8.conv0.norm
    features = []
    handle = before.synthesis.b8.conv0.register_forward_pre_hook(
        lambda _m, inputs: features.append(inputs[0])
    )
    before.synthesis.b4.conv1.norm.load_state_dict(G.synthesis.b4.conv1.norm.state_dict())
    before(z, None, noise_mode="const")
    handle.remove()
    torch.testing.assert_close(first.running_mean, features[0].mean(dim=[0, 2, 3]), rtol=1e-3, atol=1e-4)
    assert not any(module.training for module in G.modules())
    for (name, a), b in zip(G.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(G.mapping.w_avg, before.mapping.w_avg)


# --- training -----------------------------------------------------------------------------------------------


def test_transfer_takes_what_a_stylegan2_has():
    source = dict(G=plain(1), D=Discriminator(**WIDTHS, **DATA), G_ema=plain(2))
    G, G_ema, D = small(), small(), Discriminator(**WIDTHS, **DATA)
    fresh = copy.deepcopy(G)
    rows = transfer.transfer(source, G, D, G_ema)
    for net, target in [("G", G), ("G_ema", G_ema)]:
        names = {what: {row.name for row in rows[net] if row.what == what} for what in ("copied", "unused")}
        theirs = dict(source[net].named_parameters())
        assert set(theirs) <= names["copied"] and not names["unused"]
        for name in ["synthesis.b16.conv0.weight", "synthesis.b8.torgb.affine.weight", "mapping.fc1.bias"]:
            assert torch.equal(target.get_parameter(name), theirs[name])
        for name, p in target.named_parameters():
            new = any(part in name for part in ("shift", "encoder"))
            assert (name in theirs) != new and (not new or torch.equal(p, fresh.get_parameter(name)))


def test_transfer_from_ssn_takes_the_encoder():
    torch.manual_seed(5)
    source = SpatialGenerator(
        z_dim=32, w_dim=32, latent_grid=[2, 2], synthesis_kwargs=dict(WIDTHS, encoder_kwargs=dict(channels=4)),
        **DEEP, **DATA,
    )  # fmt: skip
    G = small()
    rows = transfer.spatial_from(source, G)
    new = {row.name.split(".")[3] for row in rows if row.what == "re-initialised"}
    assert new == {"norm", "shift", "encoder_shift"} and not [row for row in rows if row.what == "unused"]
    name = "synthesis.b8.encoder.conv1.weight"
    assert torch.equal(G.get_parameter(name), source.get_parameter(name))


@pytest.fixture
def stylegan2_pkl(tmp_path):
    def write(**synthesis):
        torch.manual_seed(0)
        options = dict(c_dim=0, img_resolution=8, img_channels=3)
        G = Generator(z_dim=8, w_dim=8, synthesis_kwargs=dict(WIDTHS, **synthesis), **DEEP, **options)
        D = Discriminator(**WIDTHS, epilogue_kwargs=dict(mbstd_group_size=4), **options)
        path = tmp_path / "source.pkl"
        snapshot.save_network_pkl(path, G=G, D=D, G_ema=G)
        return path

    return write


def test_config_trains_and_goes_on_exactly(tiny_run, stylegan2_pkl, monkeypatch):
    """A run from a StyleGAN2, with R_D; then the same weights and statistics by stopping and going on."""
    widths = ["--set=G_kwargs.z_dim=32", "--set=G_kwargs.w_dim=32"]
    args = ["--cfg=spade", "--latent-grid=2x2", f"--resume={stylegan2_pkl()}", "--lambda-d=2", *widths]
    whole = tiny_run(*args)
    assert whole.status == 0, whole.output
    assert "new in this kind of network" in whole.output
    assert whole.options()["G_kwargs"]["class_name"] == "ssn_ext.spade_networks.SpadeGenerator"
    assert whole.options()["loss_kwargs"]["lambda_d"] == 2
    G = whole.networks()["G_ema"]
    norm = G.synthesis.b8.conv1.norm
    assert float(norm.count) == hooks.STATISTICS_OF / hooks.STATISTICS_BATCH  # measured before it was saved
    assert G(torch.randn(2, G.z_dim), None).isfinite().all()

    original, seen = training_loop.Run.iterate, []

    def iterate(self):
        original(self)
        seen.append(self)
        self.stop.requested = len(seen) == 3

    monkeypatch.setattr(training_loop.Run, "iterate", iterate)
    half = tiny_run(*args)
    assert "Stopped at 0.0 kimg" in half.output
    rest = tiny_run(f"--resume={half.dir}", new=False)
    assert rest.status == 0, rest.output
    assert len(seen) == 6
    for net in ["G", "G_ema"]:
        a, b = whole.checkpoint()[net], half.checkpoint()[net]
        assert a.keys() == b.keys() and any("running_var" in name for name in a)
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_refused_as_an_option(tiny_run, precision):
    run = tiny_run("--cfg=spade", "--latent-grid=2x2", f"--precision={precision}")
    assert f"--precision={precision} cannot be had with --cfg=spade, which computes in float32" in run.output
    assert run.status != 0 and run.dir is None


def test_other_architectures_are_refused(tiny_run, stylegan2_pkl):
    run = tiny_run("--cfg=spade", f"--resume={stylegan2_pkl(architecture='resnet')}")
    assert "--cfg=spade knows the architecture 'skip' only, not 'resnet'" in run.output
    assert run.status != 0 and run.dir is None
