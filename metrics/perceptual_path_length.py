# SPDX-License-Identifier: Apache-2.0
"""Perceptual path length (Karras et al. 2018): how much a picture changes per step along a path of latents.

    PPL = E  d( G(path(t)), G(path(t + eps)) ) / eps^2,     outliers (lowest and highest 1 %) left out

d is a perceptual distance; the path is spherical in Z, straight in W. The noise inputs are the same at both
ends.
"""

import numpy as np
import torch
import torch.nn.functional as F

from metrics import detectors, metric_utils


def slerp(a, b, t, dim=-1):
    """From a (t = 0) to b (t = 1) on the unit sphere along `dim`; a and b are scaled to length 1 first."""
    a, b = F.normalize(a, dim=dim), F.normalize(b, dim=dim)
    cosine = (a * b).sum(dim=dim, keepdim=True)
    angle = t * torch.acos(cosine.clamp(-1, 1))
    across = F.normalize(b - cosine * a, dim=dim)
    return F.normalize(a * torch.cos(angle) + across * torch.sin(angle), dim=dim)


def trimmed_mean(distances, low=1, high=99):
    """Mean of the values between two percentiles, both included ('lower' and 'higher': values that occur)."""
    distances = np.asarray(distances, dtype=np.float64)
    floor = np.percentile(distances, low, method="lower")
    ceiling = np.percentile(distances, high, method="higher")
    return float(distances[(distances >= floor) & (distances <= ceiling)].mean())


class PPLSampler(torch.nn.Module):
    """One batch of distances. space: 'z' or 'w'; sampling: 'full' (t uniform in [0, 1)) or 'end' (t = 0).

    A generator with a grid of latents (attribute latent_grid) is interpolated cell by cell in Z, all cells
    alike. G is changed: its noise inputs are drawn anew for each batch.
    """

    def __init__(self, G, G_kwargs, epsilon, space, sampling, crop, vgg16):
        super().__init__()
        if space not in ("z", "w") or sampling not in ("full", "end"):
            raise ValueError(f"space is 'z' or 'w', sampling 'full' or 'end', not {space!r}, {sampling!r}")
        self.G, self.vgg16 = G, vgg16
        self.G_kwargs, self.epsilon, self.crop = dict(G_kwargs), epsilon, crop
        self.space, self.sampling = space, sampling

    def forward(self, z, t, c):
        """z [N, 2, z_dim] the two ends, t [N] in [0, 1), c [N, c_dim] -> distances / eps^2 [N]."""
        t = torch.zeros_like(t) if self.sampling == "end" else t
        ends = [self._point(z, t, c), self._point(z, t + self.epsilon, c)]
        for name, noise in self.G.named_buffers():
            if name.endswith(".noise_const"):
                noise.copy_(torch.randn_like(noise))
        images = self.G.synthesis(torch.cat(ends), noise_mode="const", force_fp32=True, **self.G_kwargs)
        first, second = self._prepare(images).chunk(2)
        return detectors.perceptual_distance(self.vgg16, first, second) / self.epsilon**2

    def _point(self, z, t, c):
        """Latents ws [N, num_ws, w_dim] at position t of each path."""
        if self.space == "z":
            cells = getattr(self.G, "latent_grid", [1, 1])
            grid = z.reshape(len(z), 2, -1, cells[0] * cells[1])  # [N, 2, C, cells]
            on_path = slerp(grid[:, 0], grid[:, 1], t.reshape(-1, 1, 1), dim=1)
            return self.G.mapping(on_path.flatten(1), c)
        first, second = self.G.mapping(torch.cat([z[:, 0], z[:, 1]]), torch.cat([c, c])).chunk(2)
        return first.lerp(second, t.reshape(-1, 1, 1))

    def _prepare(self, images):
        """The middle of the picture where `crop`, then at most 256 pixels along the longer side by averaging."""
        if self.crop:
            y, x = images.shape[2] // 8, images.shape[3] // 8
            images = images[:, :, 3 * y : 7 * y, 2 * x : 6 * x]
        factor = self.G.img_resolution // 256  # of the whole picture, also after a crop: as in the family
        return F.avg_pool2d(images, factor) if factor > 1 else images


@torch.no_grad()
def compute_ppl(opts, num_samples, epsilon, space, sampling, crop, batch_size, jit=False):
    """Perceptual path length from `num_samples` paths; NaN on ranks other than 0; `jit` must be False."""
    if jit:
        raise ValueError("jit=True is not supported: TorchScript tracing is deprecated")
    vgg16 = metric_utils.open_detector(opts, detectors.choose("vgg16", opts.detector).source)
    opts.details.num_gen = num_samples
    dataset = metric_utils.agreed(opts, lambda: metric_utils.label_dataset(opts))
    num_labels = 0 if dataset is None else len(dataset)
    opts.details.dtype = "float32"
    G = metric_utils.copy_of_generator(opts)
    sampler = PPLSampler(G, opts.G_kwargs, epsilon, space, sampling, crop, vgg16).eval()
    distances = metric_utils.FeatureStats(capture_all=True, max_items=num_samples)
    progress = opts.progress.sub("ppl sampling", num_samples)

    def batches():
        for batch in metric_utils.chunks(metric_utils.shares(num_samples, opts), batch_size):
            z, t, picks = metric_utils.latents(opts, batch, count=2, num_labels=num_labels)
            c = metric_utils.labels_for(opts, dataset, picks)[:, 0]
            with metric_utils.seeded(opts.device, opts.seed, batch[0]):
                yield sampler(z.to(opts.device), t.to(opts.device), c)

    for values in metric_utils.in_step(opts, batches()):
        distances.append_torch(values[:, None], num_gpus=opts.num_gpus, rank=opts.rank)
        progress.update(distances.num_items)
    return trimmed_mean(distances.get_all()) if opts.rank == 0 else float("nan")


def ppl(opts, name, **settings):
    """The metric `name` with the settings of compute_ppl."""
    key = detectors.result_name(name, detectors.choose("vgg16", opts.detector))
    return {key: compute_ppl(opts, **settings)}
