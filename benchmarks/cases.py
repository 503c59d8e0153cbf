# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks` times: groups of cases, each made by a function of the Settings."""

import copy
import os
from dataclasses import dataclass

import torch

import dnnlib
from benchmarks.measure import Case
from ssn_ext.transfer import default_encoder
from training import phases
from training.dataset import ImageFolderDataset

COUNT = 0  # flops of a case whose operations `measure` is to count
DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "demo")
KINDS = ["stylegan2", "ssn-no-encoder", "ssn"]
STEPS = {"narrow": (32, 2048, 16), "wide": (64, 16384, 4)}  # resolution, channel_base, batch


@dataclass
class Settings:
    """None: each group's own value (generator: 256 pixels and paper256's widths; training: the rows of STEPS)."""

    resolution: int | None = None
    batch: int | None = None
    channel_base: int | None = None
    precision: str = "fp32"
    kinds: tuple[str, ...] = tuple(KINDS)
    grid: tuple[int, int] = (4, 4)

    @property
    def dtype(self) -> torch.dtype:
        """Whose matrix rate the cases are compared with."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def precision_kwargs(self) -> tuple[dict, dict]:
        """(arguments of a network, arguments of its blocks): bf16 in every block that may compute in it."""
        if self.precision == "fp32":
            return {}, {}
        return dict(num_fp16_res=16, conv_clamp=256), dict(half_dtype="bfloat16")


def make_generator(kind: str, resolution: int, channel_base: int, settings: Settings) -> torch.nn.Module:
    """A generator of random weights, z of 512 channels a block, without gradients."""
    network, block = settings.precision_kwargs()
    synthesis = dict(channel_base=channel_base, channel_max=512, **network, **block)
    kwargs = dict(z_dim=512, w_dim=512, c_dim=0, img_resolution=resolution, img_channels=3)
    if kind == "stylegan2":
        kwargs["class_name"] = "training.networks.Generator"
    else:
        cells = settings.grid[0] * settings.grid[1]
        kwargs.update(class_name="ssn_ext.networks.SpatialGenerator", latent_grid=list(settings.grid))
        kwargs.update(z_dim=512 * cells, w_dim=512 * cells)
        synthesis["encoder_init"] = "none" if kind == "ssn-no-encoder" else "exact"
        synthesis["encoder_kwargs"] = default_encoder(512, settings.grid, [resolution] * 2, resolution)
    torch.manual_seed(0)
    return dnnlib.util.construct_class_by_name(synthesis_kwargs=synthesis, **kwargs).requires_grad_(False)


def generator(settings: Settings) -> list[Case]:
    """z to pictures without gradients."""
    resolution, batch = settings.resolution or 256, settings.batch or 4
    cases = []
    for kind in settings.kinds:
        G = make_generator(kind, resolution, settings.channel_base or 16384, settings).eval()
        z = torch.randn(batch, G.z_dim)
        run = torch.no_grad()(lambda G=G, z=z: G(z, None))
        tail = f"{resolution}x{resolution}, batch {batch}"
        base = f"generator stylegan2 {tail}"
        name = f"generator {kind} {tail}"
        cases.append(Case(name, run, batch, COUNT, dtype=settings.dtype, base="" if name == base else base))
        if kind != "stylegan2":  # what demodulation costs: the same network without
            bare = copy.deepcopy(G)
            for layer in bare.modules():
                if hasattr(layer, "demodulation"):
                    layer.demodulation = None
            run = torch.no_grad()(lambda G=bare, z=z: G(z, None))
            name, base = f"generator {kind} without demodulation {tail}", name
            cases.append(Case(name, run, batch, COUNT, dtype=settings.dtype, base=base))
    return cases


def training(settings: Settings) -> list[Case]:
    """Every phase of a training step (R1, path length and, for SSN, R_D at their lazy intervals), and the step."""
    cases = []
    for name, (resolution, channel_base, batch) in STEPS.items():
        if settings.resolution or settings.channel_base:
            name = "custom"
            resolution = settings.resolution or resolution
            channel_base = settings.channel_base or channel_base
        for kind in settings.kinds:
            title = f"training step {name} {kind} {resolution}x{resolution}"
            made = _phases(title, kind, resolution, channel_base, settings.batch or batch, settings)
            for case in made if kind != "stylegan2" else []:
                case.base = f"training step {name} stylegan2 {resolution}x{resolution}"
            cases += made
        if name == "custom":
            break
    return cases


def _phases(title, kind, resolution, channel_base, batch, settings):
    G = make_generator(kind, resolution, channel_base, settings).train()
    network, block = settings.precision_kwargs()
    kwargs = dict(c_dim=0, img_resolution=resolution, img_channels=3, channel_base=channel_base)
    D = dnnlib.util.construct_class_by_name(
        class_name="training.networks.Discriminator", block_kwargs=block, **network, **kwargs
    )
    D.train().requires_grad_(False)
    plain = kind == "stylegan2"
    loss = dnnlib.util.construct_class_by_name(
        class_name="training.loss.StyleGAN2Loss" if plain else "ssn_ext.loss.DistortionRegularizedLoss",
        device="cpu", G_mapping=G.mapping, G_synthesis=G.synthesis, D=D, r1_gamma=1,
    )  # fmt: skip
    adam = dict(class_name="torch.optim.Adam", lr=0.002, betas=[0, 0.99], eps=1e-8)
    rows = loss.phase_rows(4, 16)
    steps, _ = phases.build_phases(rows, dict(G=G, D=D), dict(G=dict(adam), D=dict(adam)))
    images, labels = torch.randn(batch, 3, resolution, resolution), torch.zeros(batch, 0)
    z = torch.randn(batch, G.z_dim)

    def case(phase):
        name = f"{title}: {phase.name} (every {phase.interval})"
        round_of = [(images, labels, z, labels)]
        run = lambda: phase.step(loss, round_of)  # noqa: E731
        return Case(name, run, batch, COUNT, 1 / phase.interval, title, settings.dtype)

    return [case(phase) for phase in steps]


def augment(settings: Settings) -> list[Case]:
    """The augmentation pipe bgc with every transformation on."""
    from training.augment import AugmentPipe
    from training.configs import AUGPIPES

    resolution, batch = settings.resolution or 64, settings.batch or 16
    pipe = AugmentPipe(**{name: 1 for name in AUGPIPES["bgc"].split()}).requires_grad_(False)
    pipe.p.copy_(torch.ones([]))
    images = torch.randn(batch, 3, resolution, resolution)
    name = f"augmentation bgc {resolution}x{resolution}, batch {batch}"
    return [Case(name, lambda: pipe(images), batch)]


def dataset(settings: Settings) -> list[Case]:
    """Reading, decoding and stacking pictures of the demo data, in this process."""
    data = ImageFolderDataset(path=os.path.join(DEMO, "lorelei32.zip"))
    count = min(256, len(data))
    run = lambda: torch.stack([torch.from_numpy(data[i][0]) for i in range(count)])  # noqa: E731
    return [Case("dataset, demo 32x32", run, count)]


def metrics(settings: Settings) -> list[Case]:
    """One pass of the detector that needs no download (left out where its package is not installed)."""
    from metrics import detectors

    batch = settings.batch or 8
    try:
        detector = detectors.load_for("inception", "efficientnet-lite0")
    except (OSError, ValueError):
        return []
    images = torch.randint(256, [batch, 3, 64, 64]).to(torch.uint8)
    run = torch.no_grad()(lambda: detector(images, return_features=True))
    return [Case(f"metric features efficientnet-lite0, batch {batch}", run, batch, COUNT)]


def resampling(settings: Settings) -> list[Case]:
    """16 candidates for one block of a picture of the demo network."""
    from ssn_ext import resampling as ops
    from training.generating import map_seed
    from training.snapshot import load_network_pkl

    G = load_network_pkl(os.path.join(DEMO, "lorelei32.pkl"))["G_ema"]
    ws = map_seed(G, 1, None, 1.0, torch.device("cpu"))

    @torch.no_grad()
    def run():
        return ops.render(G, ops.redraw(G, ws, [5], list(range(100, 116))))

    return [Case("resampling, demo network: 16 candidates", run, 16, COUNT)]


GROUPS = {each.__name__: each for each in [generator, training, augment, dataset, metrics, resampling]}
