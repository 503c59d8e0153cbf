# SPDX-License-Identifier: Apache-2.0
"""Finding the latents of a given picture, as StyleGAN2 does (Karras et al. 2020, appendix D).

Minimised over one w (for a generator with a grid of latents: over the w of every block) and over the noise inputs:

    | F(G(w + noise on w)) - F(target) |^2 + weight * R(noise inputs)        F: perceptual features

The noise on w explores at first and fades out; R keeps the noise inputs from carrying the picture. With t = step /
num_steps, lr0 and s0 the initial values, and sigma the standard deviation of w:

    lr(t)    = lr0 * (1 - cos(pi * min(1, (1 - t) / rampdown))) / 2 * min(1, t / rampup)
    scale(t) = sigma * s0 * max(0, 1 - t / noise_ramp)^2
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from torch_utils.images import read_image, read_white, to_float

LARGEST_SIDE = 256  # of what the detector sees
STATISTICS_SEED = 123
SPACES = ("blocks", "w")

# ----------------------------------------------------------------------------------------
# Schedules, statistics, the regulariser of the noise


def learning_rate(t: float, initial: float, rampdown: float, rampup: float) -> float:
    """lr(t), see above: rises during the first `rampup` of the time, falls during the last `rampdown`."""
    down = min(1.0, (1 - t) / rampdown) if rampdown else 1.0
    up = min(1.0, t / rampup) if rampup else 1.0
    return initial * (0.5 - 0.5 * math.cos(math.pi * down)) * up


def w_noise_scale(t: float, w_std: float, initial: float, ramp: float) -> float:
    """scale(t), see above: the standard deviation of the noise on each value of w."""
    return w_std * initial * (max(0.0, 1 - t / ramp) ** 2 if ramp else 0.0)


@torch.no_grad()
def w_statistics(
    G: torch.nn.Module, samples: int, c: torch.Tensor | None = None, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, float]:
    """Mean [C] and standard deviation, sqrt(E |w - mean|^2), of w from `samples` draws of RandomState(123).

    For a generator with a grid of B blocks w is that of one block, C = w_dim / B, and each z gives B draws: the
    statistics of all blocks are the same.
    """
    blocks = math.prod(getattr(G, "latent_grid", [1]))
    stream, parts = np.random.RandomState(STATISTICS_SEED), []
    left = math.ceil(samples / blocks)
    while left:
        count = min(left, 1000)
        z = torch.from_numpy(stream.randn(count, G.z_dim)).to(device)
        label = None if c is None else c.expand(count, -1)
        w = G.mapping(z, label)[:, 0].to(
            torch.float32
        )  # [count, w_dim]: channel by channel, all blocks of each
        parts.append(w.reshape(count, -1, blocks).movedim(2, 1).flatten(0, 1))  # [count * B, C]
        left -= count
    w = torch.cat(parts)
    mean = w.mean(dim=0)
    return mean, math.sqrt((w - mean).square().sum(dim=1).mean().item())


def noise_regularity(noises: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much neighbours agree in noise inputs [H, W], over all scales: 0-d, 0 for none, differentiable.

    Sum over inputs and scales of mean(n * n moved right)^2 + mean(n * n moved down)^2, borders wrapped; each next
    scale is the 2x2 average, until a side is 8 or less.
    """
    total = torch.zeros([], device=noises[0].device if noises else None)
    for noise in noises:
        n = noise[None, None]  # [1, 1, H, W]
        while True:
            for axis in (2, 3):
                total = total + (n * n.roll(1, dims=axis)).mean().square()
            if min(n.shape[2:]) <= 8:
                break
            n = F.avg_pool2d(n, 2)
    return total


@torch.no_grad()
def normalize_noise(noises: Sequence[torch.Tensor]) -> None:
    """Gives each noise input mean 0 and mean square 1, in place."""
    for noise in noises:
        noise -= noise.mean()
        noise *= noise.square().mean().rsqrt()


# ----------------------------------------------------------------------------------------
# The target


class Target:
    """A picture to come close to, and the perceptual distance from it.

    target: [C, H, W] in 0..255. detector: a module that takes pictures [N, 3, H, W] in 0..255 and the keywords
    resize_images=False, return_lpips=True and returns features [N, P]; or a choice of metrics.detectors, None for
    NVIDIA's vgg16. mask: [H, W] in 0..1, where the picture counts; elsewhere it is taken to be right.
    """

    def __init__(self, target, detector=None, mask=None, device="cpu"):
        from metrics import detectors  # a sibling: only when needed

        self._perceptual_features = detectors.perceptual_features
        if not isinstance(detector, torch.nn.Module):
            detector = detectors.load_for("vgg16", detector, device)
        self.detector = detector
        self.picture = to_float(torch.as_tensor(target).to(device))[None]  # [1, C, H, W] in [-1, 1]
        self.mask = None if mask is None else torch.as_tensor(mask).to(device, torch.float32)
        with torch.no_grad():
            self.features = self._features(self.picture)

    def distance(self, images: torch.Tensor) -> torch.Tensor:
        """Squared distance of the features of images [N, C, H, W], [-1, 1], from the target's -> [N]."""
        if self.mask is not None:
            images = self.picture + (images - self.picture) * self.mask
        return (self._features(images) - self.features).square().sum(dim=1)

    def mse(self, images: torch.Tensor) -> torch.Tensor:
        """Mean squared difference of pixels, images [N, C, H, W] clamped to [-1, 1], where the mask counts -> [N]."""
        square = (images.clamp(-1, 1) - self.picture).square().mean(dim=1)  # [N, H, W]
        if self.mask is None:
            return square.mean(dim=[1, 2])
        return (square * self.mask).sum(dim=[1, 2]) / self.mask.sum()

    def _features(self, images):
        shrink = LARGEST_SIDE / max(images.shape[2:])
        if shrink < 1:
            size = [max(round(side * shrink), 1) for side in images.shape[2:]]
            images = F.interpolate(images, size=size, mode="area")
        return self._perceptual_features(self.detector, images)


@torch.no_grad()
def average_picture(
    G: torch.nn.Module, c: torch.Tensor | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The picture of truncation psi 0 -> float32 [1, C, H, W] in about [-1, 1]: what any projection should beat."""
    z = torch.zeros([1, G.z_dim], device=device)
    return G.synthesis(G.mapping(z, c, truncation_psi=0), noise_mode="const").to(torch.float32)


def read_target(path: str, shape: Sequence[int], channels: int) -> np.ndarray:
    """A picture file as a target for a network: uint8 [C, H, W], shape = (H, W), C = channels, 1 or 3.

    Turned as its EXIF data says, transparent parts on white, converted to grey or RGB, the middle cut out in the
    network's aspect ratio, resized with LANCZOS.
    """
    if channels not in (1, 3):
        raise ValueError(f"Pictures of {channels} channels cannot be projected, only grey and RGB ones")
    picture = PIL.Image.fromarray(read_image(path, "RGBA"), "RGBA")
    white = PIL.Image.new("RGBA", picture.size, "white")
    flat = PIL.Image.alpha_composite(white, picture).convert("L" if channels == 1 else "RGB")
    return np.array(_fit(flat, shape)).reshape(*shape, channels).transpose(2, 0, 1)


def read_mask(path: str, target_path: str, shape: Sequence[int]) -> np.ndarray:
    """A black and white picture, of the size of the target's file, cut and resized as that -> float32 [H, W], 0..1.

    ValueError where it has another size, or nothing white.
    """
    mask, target = read_white(path), read_image(target_path, "L")
    if mask.shape != target.shape[:2]:
        sizes = [f"{width}x{height}" for height, width in (mask.shape, target.shape[:2])]
        raise ValueError(f"--mask={path} has {sizes[0]} pixels, {target_path} has {sizes[1]}")
    fitted = np.asarray(_fit(PIL.Image.fromarray(mask), shape)).astype(np.float32) / 255
    if fitted.max() < 0.5:
        raise ValueError(
            f"--mask={path} is black where the picture is used: paint white what is to be matched"
        )
    return fitted


def _fit(image: PIL.Image.Image, shape: Sequence[int]) -> PIL.Image.Image:
    """The middle of an image in the aspect ratio of shape = (H, W), resized to it."""
    (width, height), (to_height, to_width) = image.size, shape
    crop_width = min(width, round(height * to_width / to_height))
    crop_height = min(height, round(width * to_height / to_width))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    crop = image.crop((left, top, left + crop_width, top + crop_height))
    return crop.resize((to_width, to_height), PIL.Image.Resampling.LANCZOS)


# ----------------------------------------------------------------------------------------
# The optimisation


@dataclass(frozen=True)
class Step:
    """State after a step: w [w_dim]; 0-d distance and loss of the picture that the step began with."""

    w: torch.Tensor
    distance: torch.Tensor
    loss: torch.Tensor


def project(
    G: torch.nn.Module,
    target: torch.Tensor,
    *,
    num_steps: int = 1000,
    w_avg_samples: int = 10000,
    initial_learning_rate: float = 0.1,
    initial_noise_factor: float = 0.05,
    lr_rampdown_length: float = 0.25,
    lr_rampup_length: float = 0.05,
    noise_ramp_length: float = 0.75,
    regularize_noise_weight: float = 1e5,
    verbose: bool = False,
    device: torch.device | str,
    detector: torch.nn.Module | str | None = None,
    space: str | None = None,
    mask: torch.Tensor | None = None,
    c: torch.Tensor | None = None,
) -> torch.Tensor:
    """The latents after every step -> float32 [num_steps, num_ws, w_dim]; the last are the result.

    target [C, H, W] in 0..255, of the network's size. The noise inputs and the noise on w are drawn from torch's
    random state. G is not changed. Beyond the family: detector and mask, see Target; space, 'blocks' (a w for every
    block; the default for generators with a grid) or 'w' (one for all); c, the class label [1, c_dim] of conditional
    networks. ValueError for a target or space that does not fit the network.
    """
    goal = Target(target, detector, mask, device)
    steps = projection_steps(
        G,
        goal,
        num_steps=num_steps,
        w_avg_samples=w_avg_samples,
        initial_learning_rate=initial_learning_rate,
        initial_noise_factor=initial_noise_factor,
        lr_rampdown_length=lr_rampdown_length,
        lr_rampup_length=lr_rampup_length,
        noise_ramp_length=noise_ramp_length,
        regularize_noise_weight=regularize_noise_weight,
        device=device,
        space=space,
        c=c,
    )
    path = []
    for number, step in enumerate(steps, 1):
        path.append(step.w)
        if verbose:
            print(f"step {number:>4d}/{num_steps}: dist {step.distance:<6.4g} loss {step.loss:<6.4g}")
    return torch.stack(path)[:, None].repeat(1, G.num_ws, 1)


def projection_steps(
    G: torch.nn.Module,
    goal: Target,
    *,
    num_steps: int = 1000,
    w_avg_samples: int = 10000,
    initial_learning_rate: float = 0.1,
    initial_noise_factor: float = 0.05,
    lr_rampdown_length: float = 0.25,
    lr_rampup_length: float = 0.05,
    noise_ramp_length: float = 0.75,
    regularize_noise_weight: float = 1e5,
    device: torch.device | str = "cpu",
    space: str | None = None,
    c: torch.Tensor | None = None,
) -> Iterator[Step]:
    """Yields a Step after each of num_steps steps, so that a caller may stop anywhere; arguments as in `project`."""
    space = choose_space(G, space)
    G = copy.deepcopy(G).eval().requires_grad_(False).to(device)
    mean, std = w_statistics(G, w_avg_samples, c, device)
    grid_blocks = math.prod(getattr(G, "latent_grid", [1]))
    free = grid_blocks if space == "blocks" else 1
    w = mean[:, None].repeat(1, free).requires_grad_()  # [C, blocks]
    noises = [each for name, each in G.synthesis.named_buffers() if name.endswith("noise_const")]
    for noise in noises:
        noise.copy_(torch.randn_like(noise)).requires_grad_()
    optimizer = torch.optim.Adam([w, *noises], betas=(0.9, 0.999), lr=initial_learning_rate)

    for number in range(num_steps):
        t = number / num_steps
        scale = w_noise_scale(t, std, initial_noise_factor, noise_ramp_length)
        optimizer.param_groups[0]["lr"] = learning_rate(
            t, initial_learning_rate, lr_rampdown_length, lr_rampup_length
        )
        images = G.synthesis(
            _as_ws(w + torch.randn_like(w) * scale, grid_blocks, G.num_ws), noise_mode="const"
        )
        if images.shape != goal.picture.shape:
            raise ValueError(f"The target is {list(goal.picture.shape[1:])}, the network's pictures are"
                             f" {list(images.shape[1:])}: [channels, height, width]")  # fmt: skip
        distance = goal.distance(images.to(torch.float32))[0]
        loss = distance + regularize_noise_weight * noise_regularity(noises)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        normalize_noise(noises)
        yield Step(_as_ws(w.detach(), grid_blocks, 1)[0, 0].clone(), distance.detach(), loss.detach())


def choose_space(G: torch.nn.Module, space: str | None) -> str:
    """The space to project into: as asked for, else every block's w where there are blocks. ValueError for others."""
    has_blocks = hasattr(G, "latent_grid")
    if space is None:
        return "blocks" if has_blocks else "w"
    if space not in SPACES:
        raise ValueError(f"space is one of {', '.join(SPACES)}, not {space!r}")
    if space == "blocks" and not has_blocks:
        raise ValueError("--space=blocks needs a network with a grid of latents; this one has a single w")
    return space


def _as_ws(w: torch.Tensor, blocks: int, num_ws: int) -> torch.Tensor:
    """w [C, 1 or blocks] as the network takes it: [1, num_ws, C * blocks], the same in every layer."""
    flat = w.expand(-1, blocks).reshape(1, 1, -1)
    return flat.repeat(1, num_ws, 1)
