# SPDX-License-Identifier: Apache-2.0
"""From trained networks to a spatial generator: section 3.4 of the SSN paper, made exact at the start."""

import copy
import inspect

from ssn_ext.blocks import default_grid
from ssn_ext.grids import as_grids, block_counts, default_splits, resolution_for
from training.shapes import shape_of
from training.transfer import copy_networks


def is_encoder(name):
    """Whether a tensor belongs to the spatial encoder, the only part that a StyleGAN2 has no counterpart
    for."""
    return any(part.startswith("encoder") for part in name.split("."))


def is_spade(name):
    """Whether a tensor belongs to what SPADE's layers have and spatially modulated ones have not: statistics and
    shifts."""
    return any(part in ("norm", "shift", "encoder_shift") for part in name.split("."))


def transfer(source, G, D, G_ema, allow=()):
    """Fills G, D and G_ema from a snapshot of a StyleGAN2 or of a spatial generator; rows of the coverage
    table.

    Every tensor goes to its counterpart of the same name. A StyleGAN2's w_avg [C] becomes the same vector in
    every block; one of another grid is resampled. The encoder stays as it is where the source has none, as do
    SPADE's own tensors (the training loop makes G_ema as a copy of G, so both have the same ones). allow:
    differences that may be, of training.transfer.CATEGORIES; any other is a CoverageError.
    """
    pairs = {
        "G": (_adapted(source["G"], G), G),
        "D": (source["D"], D),
        "G_ema": (_adapted(source["G_ema"], G_ema), G_ema),
    }
    return copy_networks(pairs, allow, _fresh(source["G"]))


def spatial_from(source, target, allow=()):
    """Copies a StyleGAN2 or spatial generator into a spatial one; returns rows (see training.transfer)."""
    return copy_networks({"G": (_adapted(source, target), target)}, allow, _fresh(source))["G"]


def _fresh(source):
    """Which tensors need no counterpart in the source: those of the encoder, where it has none, and SPADE's own."""
    if hasattr(source, "latent_grid"):
        return is_spade
    return lambda name: is_encoder(name) or is_spade(name)


def _adapted(source, target):
    """A copy of a generator whose w_avg is that of the target's grid."""
    adapted = copy.deepcopy(source).requires_grad_(False)
    if hasattr(adapted.mapping, "w_avg"):
        grid = getattr(source, "latent_grid", [1, 1])
        adapted.mapping.w_avg = spread(adapted.mapping.w_avg, grid, target.latent_grid)
    return adapted


def spread(w_avg, grid, new_grid):
    """A flat w_avg [C*h*w] of `grid` for `new_grid`: the mean over the blocks, the same in every new one."""
    channels = w_avg.reshape(-1, grid[0] * grid[1]).mean(
        dim=1
    )  # [C]; training keeps w_avg constant over the blocks
    return channels.repeat_interleave(new_grid[0] * new_grid[1])


def spatial_kwargs(G_kwargs, grid, grid_splits=()):
    """Constructor arguments of a spatial generator from those of a StyleGAN2: totals over the blocks of the
    grid, or of several grids that divide the layers at `grid_splits`."""
    blocks = sum(block_counts(grid))
    kwargs = copy.deepcopy(G_kwargs)
    kwargs.update(z_dim=G_kwargs["z_dim"] * blocks, w_dim=G_kwargs["w_dim"] * blocks)
    grids = as_grids(grid)
    if len(grids) == 1:
        kwargs.update(latent_grid=grids[0])
    else:
        kwargs.update(latent_grids=grids, grid_splits=list(grid_splits))
    return kwargs


def default_encoder(channel_max, grid, img_shape, last):
    """Options of the encoder for the exact start: a quarter of the widest layer's channels, 128 of 512, at the first
    resolution at which every block has a position of its own, 4x4 for a grid of 4x4. Two convolutions there see two
    blocks far to each side; finer ones cost up to a third of the generator and drew no better pictures
    (docs/experiments.md). img_shape: [H, W] of the pictures, which the layers of resolution `last` make."""
    reach = max(resolution_for(each, img_shape, last) for each in as_grids(grid))
    return dict(channels=max(channel_max // 4, 8), max_resolution=reach)


def constructor_kwargs(network):
    """The arguments that a persistent network was built with, all by name, in stylegan2-ada-pytorch's form.

    stylegan3's StyleGAN2 takes the options of its synthesis network flat, with other defaults for two of them.
    """
    parameters = list(inspect.signature(type(network).__mro__[1].__init__).parameters.values())[1:]
    own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    kwargs = copy.deepcopy({**dict(zip(own, network.init_args, strict=False)), **network.init_kwargs})
    if len(own) < len(parameters):
        flat = {name: kwargs.pop(name) for name in list(kwargs) if name not in own}
        flat.pop("fused_modconv_default", None)
        theirs = {} if "synthesis_kwargs" in own else {"conv_clamp": 256, "num_fp16_res": 4}
        kwargs["synthesis_kwargs"] = {**theirs, **kwargs.get("synthesis_kwargs", {}), **flat}
    return kwargs


def from_stylegan2(G, latent_grid=None, grid_splits=None, **synthesis_kwargs):
    """A spatial generator that gives G's picture for one vector in all blocks: the exact start, without
    training.

    latent_grid: None for blocks.default_grid, 4x4 for square pictures; it may be a list of grids, which divide the
    layers at `grid_splits` (None: grids.default_splits). synthesis_kwargs are added to those of G
    (demodulation, encoder_init...; encoder_kwargs: `default_encoder`).
    """
    from ssn_ext.networks import SpatialGenerator

    grid, last = as_grids(latent_grid or default_grid(*shape_of(G))), G.synthesis.block_resolutions[-1]
    if grid_splits is None:
        grid_splits = default_splits(grid, shape_of(G), last)
    kwargs = spatial_kwargs(constructor_kwargs(G), grid, grid_splits)
    synthesis = kwargs["synthesis_kwargs"] = {**kwargs.get("synthesis_kwargs", {}), **synthesis_kwargs}
    if synthesis.get("encoder_init", "exact") == "exact":
        encoder = default_encoder(synthesis.get("channel_max", 512), grid, shape_of(G), last)
        synthesis.setdefault("encoder_kwargs", encoder)
    result = SpatialGenerator(**kwargs).eval().requires_grad_(False)
    spatial_from(G, result)
    return result
