# SPDX-License-Identifier: Apache-2.0
"""Metrics of how far an edit must reach: ldbr_floor, and the same for colours and features (docs/limit.md)."""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from pathlib import Path

import torch

import dnnlib
from metrics import detectors, efficientnet_lite, metric_utils
from ssn_ext import blocks, covariance, distortion, floor, metric, resampling, spaces
from ssn_ext.grids import blocks_of_grid, grids_of, grids_with_outside
from training.shapes import shape_of

NUM_PICTURES = 4096  # generated pictures from which a generator's own covariance is estimated
NUM_REAL = 12000  # real pictures from which the data's covariance is estimated, at most
NUM_EDITED = 256  # latents whose edits are measured in a space of components, each with all blocks
FLOOR_RESOLUTION = 64  # the covariance of larger pictures does not fit


def ldbr_floor(opts):
    """Least distortion that the data's covariance allows, and the generator's own (docs/limit.md).

    Results: ldbr_floor (of the data) and _lower (its certified lower bound), ldbr_floor_own (of the
    generator's covariance), _efficiency = own floor / distortion, _kept = share of the data's covariance that
    the generator kept, _distortion and _inside as ldbr_dist gives them, _order = the mean order (1: a sum of
    functions of one block each). docs/limit.md explains them. Of several
    grids, all but _kept for each grid, as ldbr_floor_8x8; ldbr_floor_own_8x8 is then the floor of the variance that
    this grid moves, and ldbr_floor_share_8x8 the share of all variance that it is. The floor of the data is kept in
    the cache of the metrics.
    """
    G = metric.prepared(opts)
    if G.img_resolution > FLOOR_RESOLUTION:
        raise ValueError(
            f"ldbr_floor works up to {FLOOR_RESOLUTION} pixels a side, not {G.img_resolution}: the covariance"
            " of all pixels is needed whole (ldbr_floor_emd and ldbr_floor_features do with components)"
        )
    if opts.rank != 0:
        return {}
    if opts.shared is None:
        opts.shared = {}  # its parts share the pictures
    dataset = metric_utils.open_dataset(opts)
    data = torch.cat(list(spaces.real_pictures(dataset, min(len(dataset), NUM_REAL))))
    made = torch.cat(list(generated_pictures(opts, G)))
    result = {}
    for number, matrices in metric.influence_by_grid(opts, G).items():
        grid = grids_of(G)[number]
        change = metric.summarise_influence(matrices, grid, shape_of(G))
        space = spaces.open_space("mse", grid, dataset.image_shape)
        of_data = floor_of_data(opts, dataset, number, G, "mse", space)
        moved = spaces.floor_of(
            space, moved_values(opts, G, number, space), None, progress=reporter(opts, G, number, "own floor")
        )[0]
        changes = dict(distortion=change["ldbr_dist"], inside=change["ldbr_dist_inside"])
        changes["order"] = mean_order(matrices, space.shares, moved.trace)
        share = moved.trace / float(space.values(made).double().var(dim=0, correction=0).sum())
        result.update(results(opts, G, number, "ldbr_floor", of_data, moved, changes, share))
    result["ldbr_floor_kept"] = covariance.kept_covariance(samples_generator=made, samples_data=data)
    opts.details.num_latents = metric.NUM_LATENTS
    return result


def mean_order(matrices, shares, trace):
    """sum_a E|y - y^a|^2 / (2 tr C), the mean number of blocks that a unit of variance hangs on, from influence
    matrices [N, B, B], the blocks' shares of the picture and the variance of a value (or what one grid moves of it)."""
    total = matrices.double().mean(dim=0) @ torch.tensor(shares, dtype=torch.float64)  # [B]
    return float(total.sum()) / (2 * trace) if trace > 0 else 1.0


def ldbr_floor_emd(opts):
    """The same as ldbr_floor for the earth mover's distortion (ldbr_emd).

    Results as of ldbr_floor, but for _kept, and with the distortion and its _stderr as ldbr_emd has them for one grid
    (of several, each grid's own colours are compared). All in the principal components of each block
    (ssn_ext.spaces); _covered: their share of the data's variance.
    """
    G = metric.prepared(opts)
    return {} if opts.rank != 0 else floors_in(opts, G, "emd")


def ldbr_floor_features(opts):
    """The same as ldbr_floor for perceptual features, those at positions outside the re-drawn block.

    Results as of ldbr_floor_emd, named after the detector, which must be one that says where its features lie.
    _distortion compares features of whole pictures, so it is not ldbr_features (docs/limit.md).
    """
    G = metric.prepared(opts)
    source = detectors.choose("maps", opts.detector)
    detector = metric_utils.open_detector(opts, source.source)  # by all processes together
    if opts.rank != 0:
        return {}
    found = floors_in(opts, G, "features", detector)
    return {detectors.result_name(key, source): value for key, value in found.items()}


ldbr_floor_features.detector = "maps"


def floors_in(opts, G, name, detector=None):
    """The results of a floor in the components of a space, for each grid."""
    dataset = metric_utils.open_dataset(opts)
    result = {}
    for number in grids_with_outside(grids_of(G)):
        space = spaces.open_space(name, grids_of(G)[number], dataset.image_shape, detector)
        of_data = floor_of_data(opts, dataset, number, G, name, space)
        progress = reporter(opts, G, number, f"own floor, {name}")
        own, _share, components = spaces.floor_of(
            space, moved_values(opts, G, number, space), progress=progress
        )
        changes = {}
        for key, samples in zip(
            ["distortion", "inside"], changes_in(opts, G, number, components), strict=True
        ):
            changes.update(metric.mean_and_error(key, samples))
        prefix = f"ldbr_floor_{name}"
        result.update(results(opts, G, number, prefix, of_data, own, changes))
        result[f"{prefix}_covered{metric.suffix(G, number)}"] = of_data.covered
    opts.details.num_latents = NUM_EDITED
    return result


def results(opts, G, number, prefix, of_data, own, changes, share=None):
    """{name: number} of one grid; `share` is told where there are several."""
    found = {
        "": of_data.floor,
        "_lower": of_data.lower_bound,
        "_own": own.floor,
        "_efficiency": floor.efficiency(own.floor, changes["distortion"]),
        **{f"_{key}": value for key, value in changes.items()},
    }
    if share is not None and len(grids_of(G)) > 1:
        found["_share"] = share
    opts.details.update(num_gen=NUM_PICTURES, noise_mode="const")
    return {f"{prefix}{key}{metric.suffix(G, number)}": value for key, value in found.items()}


def reporter(opts, G, number, title):
    """A progress function for ldbr_floor."""
    monitor = opts.progress.sub(tag=title + metric.suffix(G, number).replace("_", " "), flush_interval=1)
    return lambda iteration, _floor, _bound: monitor.update(iteration)


# The floor of the data, and its cache.


@dataclasses.dataclass(frozen=True)
class DataFloor:
    """Floor of the data, its certified lower bound, and the share of the variance that they are of."""

    floor: float
    lower_bound: float
    covered: float


def floor_of_data(opts, dataset, number, G, name, space):
    """DataFloor of the first NUM_REAL pictures: of an earlier metric of this call, of the cache, or computed.

    The file in the cache is named after all that it depends on: options and contents of the data, their
    number, the grid, the detector's file, and the code that computes it.
    """
    count, grid = min(len(dataset), NUM_REAL), grids_of(G)[number]
    data_hash = metric_utils.data_fingerprint(opts.dataset_kwargs)
    opts.details.update(num_real=count, data=dataset.name, data_hash=data_hash)
    detector = opts.details.get("detector_sha256") if name == "features" else None
    what = name, grid, detector, opts.details.detector if detector else None, opts.device.type, code_hash()
    key = metric_utils.digest("floor", dict(opts.dataset_kwargs), count, data_hash, what)
    shared = {} if opts.shared is None else opts.shared
    file = None
    if opts.cache and data_hash is not None:
        file = dnnlib.make_cache_dir_path("gan-metrics", f"{dataset.name}-floor-{name}-{key}.json")
    found = shared.get(key) or load_floor(file)
    if found is None:
        progress = reporter(opts, G, number, f"floor of the data, {name}")
        batches = (space.values(each.to(opts.device)) for each in spaces.real_pictures(dataset, count))
        most = None if name == "mse" else spaces.MOST_VALUES
        result, share, _space = spaces.floor_of(space, batches, most, progress=progress)
        found = DataFloor(result.floor, result.lower_bound, share)
        if file is not None:
            os.makedirs(os.path.dirname(file), exist_ok=True)
            with dnnlib.util.open_atomic(file) as f:
                f.write(json.dumps(dataclasses.asdict(found)).encode())
    shared[key] = found
    return found


def load_floor(file):
    """The DataFloor of a file; None where it is not there or broken."""
    if file is None or not os.path.isfile(file):
        return None
    try:
        with open(file, encoding="utf-8") as f:
            values = json.load(f)
        return DataFloor(**{key: float(value) for key, value in values.items()})
    except (OSError, ValueError, TypeError, AttributeError) as err:
        warnings.warn(f"{file} is broken and will be written again ({err})", stacklevel=2)
        return None


@functools.cache
def code_hash():
    """sha256 of the modules that a floor depends on: a changed computation never meets an old number."""
    digest = hashlib.sha256()
    for module in (floor, covariance, spaces, distortion, blocks, detectors, efficientnet_lite):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


# What the generator does.


@torch.no_grad()
def generated_pictures(opts, G):
    """Yields NUM_PICTURES generated pictures, 64 at a time on the CPU, clamped to [-1, 1], with constant noise as in
    ldbr_dist. Metrics of one call share them where they are small."""
    small = opts.shared is not None and G.img_resolution <= FLOOR_RESOLUTION
    key = ("generated pictures", id(opts.G), opts.seed, NUM_PICTURES)
    if small and key in opts.shared:
        yield from opts.shared[key]
        return
    pictures = []
    progress = opts.progress.sub(tag="generated", num_items=NUM_PICTURES, flush_interval=1024)
    for done, (z, _fresh, c) in enumerate(metric.latent_pairs(opts, NUM_PICTURES, size=64), start=1):
        made = G(z, c, noise_mode="const").clamp(-1, 1).cpu()
        if small:
            pictures.append(made)
        yield made
        progress.update(min(64 * done, NUM_PICTURES))
    if small:
        opts.shared[key] = pictures


@torch.no_grad()
def moved_values(opts, G, number, space):
    """Yields NUM_PICTURES samples of a space's values whose covariance is the part that one grid moves.

    Of a single grid: the values of generated pictures. Of one of several: (v(g(z')) - v(g(z))) / sqrt(2), z' being
    z with all blocks of the grid drawn anew, for E Cov(v | other grids).
    """
    grids = grids_of(G)
    if len(grids) == 1:
        for pictures in generated_pictures(opts, G):
            yield space.values(pictures.to(opts.device))
        return
    title = f"moved{metric.suffix(G, number).replace('_', ' ')}"
    progress = opts.progress.sub(tag=title, num_items=NUM_PICTURES, flush_interval=1024)
    for done, (z, fresh, c) in enumerate(metric.latent_pairs(opts, NUM_PICTURES, size=64), start=1):
        other = blocks.replace_blocks(z, fresh, blocks_of_grid(grids, number), grids)
        before, after = (space.values(G(each, c, noise_mode="const").clamp(-1, 1)) for each in (z, other))
        yield (after - before) * 0.5**0.5
        progress.update(min(64 * done, NUM_PICTURES))


@torch.no_grad()
def changes_in(opts, G, number, space):
    """A space's change outside and inside each re-drawn block of a grid, mean over the blocks -> two float64
    [NUM_EDITED]."""
    numbers = blocks_of_grid(grids_of(G), number)
    title = f"edits{metric.suffix(G, number).replace('_', ' ')}"
    progress = opts.progress.sub(tag=title, num_items=NUM_EDITED, flush_interval=16)
    parts = []
    for z, fresh, c in metric.latent_pairs(opts, NUM_EDITED):
        pictures = resampling.resample_each(G, z, c, fresh, numbers)
        values = (space.values(each.clamp(-1, 1)).cpu() for each in pictures)
        before = next(values)
        changes = [
            torch.stack(space.changes(before, after, block)) for block, after in enumerate(values)
        ]  # [2, N] each
        parts.append(torch.stack(changes).mean(dim=0))
        progress.update(sum(part.shape[1] for part in parts))
    return torch.cat(parts, dim=1).unbind()
