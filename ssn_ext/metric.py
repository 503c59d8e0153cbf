# SPDX-License-Identifier: Apache-2.0
"""Metrics of block-resampling: ldbr_dist (how far an edit reaches) and ldbr_floor (how far it must)."""

import os

import numpy as np
import torch

import dnnlib
from ssn_ext import blocks, distortion, figures, floor, resampling
from ssn_ext.resampling import check_network
from torch_utils.images import to_float, write_png

NUM_LATENTS = 1024
NUM_PICTURES = 4096  # generated pictures from which a generator's own covariance is estimated


def ldbr_dist(opts):
    """Expected distortion outside a re-drawn block (MSE, pictures clamped to [-1, 1]), with change inside and influence.

    G_ema, constant noise, NUM_LATENTS latents x every block; standard errors are clustered by latent. Results:
    ldbr_dist and its _stderr; _inside (diversity) and _stderr; _locality = inside / outside; _nohalo (blocks next to the
    re-drawn one left out); _influence, the blocks x blocks matrix: row a, re-drawn block, column b, changed pixels.
    """
    matrices = influence_samples(opts, NUM_LATENTS).numpy()  # [N, B, B]
    if opts.run_dir is not None and os.path.isdir(opts.run_dir):
        picture = figures.influence_picture(matrices.mean(axis=0), opts.G.latent_grid)
        write_png(os.path.join(opts.run_dir, "influence.png"), picture)
    return summarise_influence(matrices, opts.G.latent_grid, opts.G.img_resolution)


def influence_samples(opts, count):
    """Influence matrices [N, B, B] of `count` random latents; labels are drawn from the data set where there are any."""
    G = opts.G
    check_network(G)
    device = opts.device
    rnd = torch.Generator().manual_seed(opts.seed)
    progress = opts.progress.sub(tag="ldbr_dist", num_items=count)
    dataset = dnnlib.util.construct_class_by_name(**opts.dataset_kwargs) if G.c_dim else None
    parts = []
    for start in range(0, count, 16):
        size = min(16, count - start)
        z, fresh = torch.randn([2, size, G.z_dim], generator=rnd).to(device)
        c = None
        if dataset is not None:
            picks = torch.randint(len(dataset), [size], generator=rnd).tolist()
            c = torch.from_numpy(np.stack([dataset.get_label(i) for i in picks])).to(device)
        parts.append(resampling.influence(G, z, c, fresh).cpu())
        progress.update(start + size)
    return torch.cat(parts)


def summarise_influence(matrices, grid, resolution):
    """The results of ldbr_dist from influence matrices [N, B, B] of square pictures of `resolution` pixels a side."""
    matrices = torch.from_numpy(np.asarray(matrices, dtype=np.float64))
    sizes = blocks.block_masks(grid, [resolution, resolution]).sum(dim=(1, 2))
    inside, outside = distortion.split_influence(matrices, sizes, blocks.neighbours(grid, cells=0))  # [N, B]
    near = blocks.neighbours(grid, cells=1)
    result = {}
    for key, values in [("ldbr_dist", outside), ("ldbr_dist_inside", inside)]:
        per_latent = values.mean(dim=1)  # the blocks of one latent are not independent of each other
        result[key] = float(per_latent.mean())
        result[f"{key}_stderr"] = float(per_latent.std() / len(per_latent) ** 0.5)
    result["ldbr_dist_locality"] = result["ldbr_dist_inside"] / max(result["ldbr_dist"], 1e-12)
    if not bool(near.all()):  # a 2x2 grid has nothing beyond its neighbours
        far = distortion.split_influence(matrices, sizes, near)[1]  # NaN for a block that is near all the others
        result["ldbr_dist_nohalo"] = float(far.nanmean())
    result["ldbr_dist_influence"] = matrices.mean(dim=0).tolist()
    return result


def ldbr_floor(opts):
    """The least distortion that any generator of the data's covariance can have, and of this generator's own covariance.

    DESIGN section 6. Results: ldbr_floor (of the data), ldbr_floor_own (of the generator), ldbr_floor_efficiency =
    own floor / ldbr_dist, ldbr_floor_kept = share of the data's covariance that the generator kept.
    """
    G = opts.G
    check_network(G)
    masks = blocks.block_masks(G.latent_grid, [G.img_resolution] * 2).numpy()
    data = dataset_pixels(opts.dataset_kwargs)
    made = generated_pixels(opts, NUM_PICTURES)
    of_data = floor.ldbr_floor(samples=data, masks=masks)
    own = floor.ldbr_floor(samples=made, masks=masks)
    reached = summarise_influence(influence_samples(opts, NUM_LATENTS).numpy(), G.latent_grid, G.img_resolution)["ldbr_dist"]
    return {
        "ldbr_floor": of_data.floor,
        "ldbr_floor_own": own.floor,
        "ldbr_floor_efficiency": floor.efficiency(own.floor, reached),
        "ldbr_floor_kept": floor.kept_covariance(samples_generator=made, samples_data=data),
        "ldbr_floor_distortion": reached,
    }
