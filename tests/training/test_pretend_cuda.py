# SPDX-License-Identifier: Apache-2.0
"""Training as it runs on a GPU, half precision included, with tensors that only say that they are on one."""

import pytest
import torch

from ssn_ext import loss as ssn_loss
from ssn_ext import networks as ssn_networks
from ssn_ext import resampling, spade_networks
from tests.helpers import assert_equal_states
from tests.pretend_cuda import CUDA, OnGpu, pretended
from torch_utils import custom_ops, misc, training_stats
from torch_utils.ops import grid_sample_gradfix, spatial_modulation
from training import augment, loss, networks, phases, settings, training_loop

PIPE = dict.fromkeys("xflip rotate90 xint scale rotate aniso xfrac brightness contrast lumaflip".split(), 1)
PIPE.update(hue=1, saturation=1, noise=1, cutout=1)
OPTIMIZER = dict(class_name="torch.optim.Adam", lr=0.002, betas=[0, 0.99], eps=1e-8)
SPATIAL, SPADE = ssn_networks.SpatialGenerator, spade_networks.SpadeGenerator
GRIDS = dict(latent_grids=[[2, 2], [4, 4]], grid_splits=[8])
# name -> generator, options of it, of its synthesis network, loss, options of the loss
CASES = {
    "stylegan2": (networks.Generator, {}, {}, loss.StyleGAN2Loss, {}),
    "resnet": (
        networks.Generator,
        {},
        dict(architecture="resnet", fp16_channels_last=True, half_dtype="bfloat16"),
        loss.StyleGAN2Loss,
        {},
    ),
    "ssn": (SPATIAL, {}, {}, ssn_loss.DistortionRegularizedLoss, dict(distortion="features")),
    "local": (
        SPATIAL,
        {},
        dict(demodulation="local", fp16_channels_last=True),
        ssn_loss.DistortionRegularizedLoss,
        dict(lambda_interaction=2, distortion="emd"),
    ),
    "paper": (
        SPATIAL,
        {},
        dict(demodulation="zero_padded", encoder_init="random", architecture="resnet"),
        ssn_loss.DistortionRegularizedLoss,
        dict(dist_blocks=2),
    ),
    "grids": (SPATIAL, GRIDS, dict(style_sharpness=2), ssn_loss.BlockPathLengthLoss, dict(pl_block_beta=0.5)),
    "spade": (SPADE, {}, {}, ssn_loss.DistortionRegularizedLoss, {}),
}


class Kernels(custom_ops.RuntimeKernels):
    """Takes launches in place of a GPU: every result is the same number."""

    def __init__(self):
        self.launched = set()

    def launch(self, file, name, defines, count, args, device):
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        assert device == CUDA and all(isinstance(each, OnGpu) for each in tensors), name
        self.launched.add(name)
        args[{"bias_act": 5, "modulate": 1}.get(name, 2)].fill_(0.1)


@pytest.fixture
def gpu(monkeypatch):
    """The pretended GPU; nothing that is kept for it stays afterwards."""
    for owner, name in [(misc, "_constants"), (ssn_networks, "_matrices")]:
        monkeypatch.setattr(owner, name, {})
    caches = spatial_modulation._axis, spatial_modulation._overlap, grid_sample_gradfix._twice_differentiable
    for cache in caches:
        cache.cache_clear()
    with pretended(monkeypatch):
        yield
    for cache in caches:
        cache.cache_clear()


def build(case):
    """(G, D, loss, phases) of a case, 16x16 pixels, classes; b8 and b16 compute in half precision."""
    torch.manual_seed(0)
    make, options, synthesis, make_loss, loss_options = CASES[case]
    half = dict(num_fp16_res=2, conv_clamp=256)
    shape = dict(c_dim=2, img_resolution=16, img_channels=3)
    widths = dict(channel_base=128, channel_max=16)
    synthesis = dict(widths, **half, **synthesis)
    if make is networks.Generator:
        options = dict(z_dim=8, w_dim=8)
    else:
        size = 8 * sum(h * w for h, w in options.get("latent_grids", [[2, 2]]))
        options = dict(latent_grid=[2, 2], **options, z_dim=size, w_dim=size)
        synthesis["encoder_kwargs"] = dict(channels=8)
    G = make(**options, **shape, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=synthesis)
    D = networks.Discriminator(**widths, **shape, **half)
    G, D = (net.train().requires_grad_(False).to(CUDA) for net in (G, D))
    pipe = augment.AugmentPipe(**PIPE).to(CUDA)
    parts = dict(G_mapping=G.mapping, G_synthesis=G.synthesis, D=D, augment_pipe=pipe)
    loss_of = make_loss(device=CUDA, **parts, **loss_options)
    rows = loss_of.phase_rows(4, 16)
    return G, D, loss_of, phases.build_phases(rows, dict(G=G, D=D), dict(G=OPTIMIZER, D=OPTIMIZER))[0]


def steps(case):
    """Every phase once; the generator, its latents and labels."""
    G, _D, loss_of, all_phases = build(case)
    c = torch.eye(2).repeat(2, 1).to(CUDA)
    for phase in all_phases:
        z, img = (torch.randn(shape, device=CUDA) for shape in ([4, G.z_dim], [4, 3, 16, 16]))
        phase.step(loss_of, [(img, c, z, c)])
        grads = [each.grad for each in phase.parameters if each.grad is not None]
        assert grads and all(each.device == CUDA and each.dtype == torch.float32 for each in grads)
        assert phase.timer.milliseconds() is not None
    return G.eval(), torch.randn([4, G.z_dim], device=CUDA), c


@pytest.mark.parametrize("case", CASES)
def test_all_phases(case, gpu, monkeypatch):
    """Without own kernels; then the generator makes the pictures that it makes on the CPU, nearly so in half
    precision."""
    monkeypatch.setattr(custom_ops, "_decision", (None, "pretended"))
    G, z, c = steps(case)
    with torch.no_grad():
        pictures = [
            G(z, c, noise_mode="const", truncation_psi=0.7, force_fp32=fp32) for fp32 in (True, False)
        ]
        influence = resampling.influence(G, z, c, z.flip(0)) if hasattr(G, "latent_grid") else None
        assert all(each.device == CUDA and each.dtype == torch.float32 for each in pictures)
        G, z, c = G.cpu(), z.cpu(), c.cpu()
        exact = G(z, c, noise_mode="const", truncation_psi=0.7, force_fp32=True)
    for picture, bound in zip(pictures, (1e-4, 0.1), strict=True):
        assert (picture.cpu() - exact).abs().max() < bound * exact.abs().max()
    if influence is not None:
        near = resampling.influence(G, z, c, z.flip(0))
        assert (influence.cpu() - near).abs().max() < 0.1 * near.max()


@pytest.mark.parametrize("case", ["stylegan2", "local", "grids"])
def test_all_phases_with_kernels(case, gpu, monkeypatch):
    """What the kernels are given lies on the GPU, and what they give fits into the rest."""
    kernels = Kernels()
    monkeypatch.setattr(custom_ops, "_decision", (kernels, "pretended"))
    steps(case)
    modulating = {"modulate", "project"} if CASES[case][0] is SPATIAL else set()
    assert kernels.launched == {"bias_act", "upfirdn2d_tile"} | modulating


@pytest.mark.parametrize("seed", range(3))
def test_augmentation(seed, gpu, monkeypatch):
    """It resamples along both axes at once there, and draws and makes the same as on the CPU."""
    monkeypatch.setattr(custom_ops, "_decision", (None, "pretended"))
    pipe, found = augment.AugmentPipe(**PIPE, imgfilter=1), []
    pictures = torch.randn([4, 3, 32, 24])
    for device in ("cpu", CUDA):
        torch.manual_seed(seed)
        found.append(pipe.to(device)(pictures.to(device)).cpu())
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_a_run_goes_on(gpu, monkeypatch, tiny_run):
    """A whole run with a metric; one that was stopped half-way ends in the very same state."""
    monkeypatch.setattr(custom_ops, "_choose", lambda: (None, "pretended"))
    monkeypatch.setattr("ssn_ext.metric.NUM_LATENTS", 4)
    half = ["num_fp16_res=1", "conv_clamp=256"]
    given = [
        *("--cfg=ssn", "--latent-grid=2x2", "--gpus=1", "--device=cuda", "--cond=1", "--metrics=ldbr_dist"),
        *("--set=data_loader_kwargs.pin_memory=false", "--set=total_kimg=0.008"),
        *(f"--set={net}.{each}" for net in ("G_kwargs.synthesis_kwargs", "D_kwargs") for each in half),
    ]
    whole = tiny_run(*given)
    assert whole.status == 0, whole.output
    assert "Operations: reference path (pretended)" in whole.output and '"device": "cuda"' in whole.output
    part = tiny_run(*given, "--set=total_kimg=0.004")
    c = settings.easy(part.options())
    del c["command"]
    training_stats.load_state_dict({})
    training_loop.training_loop(**{**c, "total_kimg": 0.008, "exact_resume": True})
    assert_equal_states(part.checkpoint(), whole.checkpoint())
