# SPDX-License-Identifier: Apache-2.0
"""Metrics of block-resampling: ldbr_dist (how far an edit reaches), also by other distortions (ldbr_emd,
ldbr_features). How far it must: ssn_ext.floor_metric."""

import os

import torch

from metrics import detectors, metric_utils
from ssn_ext import blocks, distortion, figures, resampling
from ssn_ext.grids import grid_means, grid_name, grids_of, grids_with_outside
from torch_utils.images import write_png
from training.shapes import shape_of

NUM_LATENTS = 1024
NUM_PERCEPTUAL = 64  # latents whose edits are also compared by a detector: 2 * B + 1 passes each


def ldbr_dist(opts):
    """Expected distortion outside a re-drawn block (MSE, pictures in [-1, 1]), with the change inside it.

    G_ema, constant noise, NUM_LATENTS latents x every block; standard errors are clustered by latent.
    Results: ldbr_dist and _stderr; _inside (diversity) and its _stderr; _locality = inside / outside;
    _nohalo (the blocks next to the re-drawn one left out); with --detector also both in its perceptual
    distance; _influence, the blocks x blocks matrix (row: block re-drawn, column: pixels changed), which is
    also drawn into influence.png of the run directory. Of several grids: these as means over the grids (without
    _nohalo and _influence), and all of them for each grid, as ldbr_dist_8x8, with influence_8x8.png.
    """
    G = prepared(opts)
    source = detector = None
    if opts.detector is not None:
        source = detectors.choose("vgg16", opts.detector)
        detector = metric_utils.open_detector(opts, source.source)  # by all processes together
    if opts.rank != 0:
        return {}
    matrices = influence_by_grid(opts, G)
    result = summarise_grids(matrices, grids_of(G), shape_of(G))
    if detector is not None:
        for key, value in perceptual_changes(opts, G, detector, NUM_PERCEPTUAL).items():
            result[detectors.result_name(key, source)] = value
    opts.details.update(num_latents=NUM_LATENTS, noise_mode="const")
    if opts.run_dir is not None and os.path.isdir(opts.run_dir):
        for number, each in matrices.items():
            picture = figures.influence_picture(each.numpy().mean(axis=0), grids_of(G)[number])
            write_png(os.path.join(opts.run_dir, f"influence{suffix(G, number)}.png"), picture)
    return result


def ldbr_emd(opts):
    """Expected earth mover's distortion outside a re-drawn block: colours of each block, wherever they lie in it.

    As ldbr_dist, with distortion.masked_emd (squared, never more than the MSE) in the MSE's place. Results: ldbr_emd
    and _stderr, _inside and its _stderr, _locality = inside / outside.
    """
    G = prepared(opts)
    if opts.rank != 0:
        return {}
    opts.details.update(num_latents=NUM_LATENTS, noise_mode="const")
    measure = distortion.choose(grids_of(G))["emd"]
    return summarise_changes("ldbr_emd", changes_by(opts, G, measure, NUM_LATENTS, "emd"))


def ldbr_features(opts):
    """Expected distortion outside a re-drawn block in the detector's perceptual features, per unit of area.

    Constant noise, NUM_PERCEPTUAL latents x every block, distortion.masked_features. Results: ldbr_features and
    _stderr, _inside and its _stderr, _locality = inside / outside; other detectors than NVIDIA's are named in the key.
    """
    G = prepared(opts)
    source = detectors.choose("vgg16", opts.detector)
    detector = metric_utils.open_detector(opts, source.source)  # by all processes together
    if opts.rank != 0:
        return {}
    opts.details.update(num_latents=NUM_PERCEPTUAL, noise_mode="const")

    def features(pictures):
        return detectors.perceptual_features(detector, pictures)

    measure = distortion.choose(grids_of(G), features)["features"]
    result = summarise_changes("ldbr_features", changes_by(opts, G, measure, NUM_PERCEPTUAL, "features"))
    return {detectors.result_name(key, source): value for key, value in result.items()}


ldbr_features.detector = "vgg16"


def prepared(opts):
    """The generator to measure, on the device; ValueError where it has no grid of latents, or only one block."""
    resampling.check_network(opts.G)
    if not grids_with_outside(grids_of(opts.G)):
        raise ValueError("This network has a single block: nothing is outside it, so there is no distortion")
    return metric_utils.copy_of_generator(opts)


def suffix(G, number):
    """What tells the results of one grid from another's: '_8x8', or '' where there is one grid."""
    grids = grids_of(G)
    return f"_{grid_name(grids[number])}" if len(grids) > 1 else ""


def latent_pairs(opts, count, size=16):
    """Yields (z, fresh, c) of at most `size` samples, `count` in all, each from (seed, number) alone."""
    dataset = metric_utils.label_dataset(opts)
    labels = 0 if dataset is None else len(dataset)
    for numbers in metric_utils.chunks(range(count), size):
        z, _t, picks = metric_utils.latents(opts, numbers, count=2, num_labels=labels)
        z = z.to(opts.device)
        yield z[:, 0], z[:, 1], metric_utils.labels_for(opts, dataset, picks)[:, 0]


def influence_by_grid(opts, G):
    """{number of grid: influence matrices [NUM_LATENTS, B, B]} for each grid that has an outside."""
    return {
        number: influence_samples(opts, G, NUM_LATENTS, number) for number in grids_with_outside(grids_of(G))
    }


def influence_samples(opts, G, count, grid=0):
    """Influence matrices [N, B, B] of `count` random latents and the blocks of one grid; metrics of one call share
    them."""
    shared = {} if opts.shared is None else opts.shared
    key = ("influence", count, grid)
    if key in shared:
        return shared[key]
    progress = opts.progress.sub(
        tag=f"influence{suffix(G, grid).replace('_', ' ')}", num_items=count, flush_interval=256
    )
    parts = []
    for z, fresh, c in latent_pairs(opts, count):
        parts.append(resampling.influence(G, z, c, fresh, grid=grid).cpu())
        progress.update(sum(map(len, parts)))
    shared[key] = torch.cat(parts)
    return shared[key]


def summarise_grids(matrices, grids, shape):
    """The results of ldbr_dist from {number of grid: influence matrices [N, B, B]}, pictures of `shape` (H, W)."""
    if len(grids) == 1:
        return summarise_influence(matrices[0], grids[0], shape)
    parts = [changes_by_latent(each, grids[number], shape) for number, each in matrices.items()]
    result = statistics([torch.stack(each).mean(dim=0) for each in zip(*parts, strict=True)])
    for number, each in matrices.items():
        for key, value in summarise_influence(each, grids[number], shape).items():
            result[f"{key}_{grid_name(grids[number])}"] = value
    return result


def changes_by_latent(matrices, grid, shape):
    """(inside [N], outside [N]) from influence matrices [N, B, B]: the means over the blocks of each latent, which
    are not independent of each other."""
    sizes = blocks.block_masks(grid, shape).sum(dim=(1, 2))
    near = blocks.neighbours(grid, cells=0)
    return [
        each.mean(dim=1)
        for each in distortion.split_influence(torch.as_tensor(matrices).double(), sizes, near)
    ]


def statistics(changes):
    """Mean and standard error of (inside [N], outside [N]), and their ratio."""
    result = {}
    for key, values in zip(["ldbr_dist", "ldbr_dist_inside"], reversed(changes), strict=True):
        result.update(mean_and_error(key, values))
    result["ldbr_dist_locality"] = result["ldbr_dist_inside"] / max(result["ldbr_dist"], 1e-12)
    return result


def summarise_influence(matrices, grid, shape):
    """The results of ldbr_dist from influence matrices [N, B, B] of one grid and pictures of `shape` (H, W)."""
    matrices = torch.as_tensor(matrices, dtype=torch.float64)
    result = statistics(changes_by_latent(matrices, grid, shape))
    sizes = blocks.block_masks(grid, shape).sum(dim=(1, 2))
    near = blocks.neighbours(grid, cells=1)
    if not bool(near.all()):  # a 2x2 grid has nothing beyond its neighbours
        far = distortion.split_influence(matrices, sizes, near)[1]  # NaN for a block that is near all others
        result["ldbr_dist_nohalo"] = float(far.nanmean())
    result["ldbr_dist_influence"] = matrices.mean(dim=0).tolist()
    return result


def perceptual_changes(opts, G, detector, count):
    """Change outside and inside a re-drawn block in the detector's perceptual distance, with standard errors.

    Outside: between g(z) and g(z^a) with block a pasted back; inside: between g(z) and g(z) with block a of
    g(z^a) pasted in.
    """

    def measure(before, after, mask):
        return detectors.perceptual_distance(detector, before, torch.where(mask, after, before))

    outside, inside = changes_by(opts, G, measure, count, "perceptual")
    return {
        **mean_and_error("ldbr_dist_perceptual_outside", outside),
        **mean_and_error("ldbr_dist_perceptual_inside", inside),
    }


@torch.no_grad()
def changes_by(opts, G, measure, count, tag):
    """A distortion outside and inside each re-drawn block, averaged over the blocks of each grid and
    over grids -> two float64 [count].

    measure: (before, after, mask) -> [N], the change where the mask is True, of pictures clamped to [-1, 1].
    """
    grids = grids_of(G)
    masks = blocks.block_masks(grids, shape_of(G), device=opts.device)
    progress = opts.progress.sub(tag=tag, num_items=count, flush_interval=16)
    parts = []
    for z, fresh, c in latent_pairs(opts, count):
        pictures = (each.clamp(-1, 1) for each in resampling.resample_each(G, z, c, fresh))
        before = next(pictures)
        changes = [
            torch.stack([measure(before, after, ~mask), measure(before, after, mask)]).double().cpu()
            for mask, after in zip(masks, pictures, strict=True)
        ]
        parts.append(grid_means(torch.stack(changes, dim=-1), grids))  # mean over blocks, [2, N]
        progress.update(sum(part.shape[1] for part in parts))
    return torch.cat(parts, dim=1).unbind()


def summarise_changes(name, changes):
    """Results under a metric's name from the changes outside and inside, [N] each."""
    outside, inside = changes
    result = {**mean_and_error(name, outside), **mean_and_error(f"{name}_inside", inside)}
    result[f"{name}_locality"] = result[f"{name}_inside"] / max(result[name], 1e-12)
    return result


def mean_and_error(name, samples):
    """{name: mean of samples [N], name_stderr: its standard error}."""
    return {name: float(samples.mean()), f"{name}_stderr": float(samples.std() / len(samples) ** 0.5)}
