# SPDX-License-Identifier: Apache-2.0
"""The configs of the plug-in: a StyleGAN2 config, edited."""

import dnnlib
from ssn_ext.blocks import default_grid, parse_grid, parse_grids
from ssn_ext.grids import block_counts, check_splits, default_splits, grids_of
from ssn_ext.transfer import constructor_kwargs, default_encoder, spatial_kwargs
from training import configs
from training.configs import ConfigError
from training.shapes import shape_of

# Arguments of the networks that the training loop fills in from the data set.
FROM_DATA = ["c_dim", "img_resolution", "img_channels", "img_shape"]


def ssn(c, opts):
    """Spatially Stochastic Network: StyleGAN2 with a grid of independent latents and a penalty on
    far-reaching edits.

    Widths, depth, architecture and clamp are those of the --resume file; without one, the paper row of the
    resolution of the last block of layers (pictures below 256 pixels: laptop).
    """
    small = c.training_set_kwargs.resolution < 256
    rows = {256: configs.paper256, 512: configs.paper512}
    by_block = rows.get(max(opts.block_resolution, 256), configs.paper1024)
    (configs.laptop if small else by_block)(c, opts)
    any_size = "resolution" in (opts.allow_partial or [])
    plain, old = c.G_kwargs, ([], [])
    if opts.source is not None:
        plain, old = widths_of(opts.source, c, None if any_size else opts.img_shape)
    grids, splits = chosen_grids(opts, *old)
    c.G_kwargs = dnnlib.EasyDict(
        spatial_kwargs(plain, grids, splits), class_name="ssn_ext.networks.SpatialGenerator"
    )
    synthesis = c.G_kwargs.synthesis_kwargs = dnnlib.EasyDict(c.G_kwargs.get("synthesis_kwargs", {}))
    encoder = default_encoder(synthesis.get("channel_max", 512), grids, opts.img_shape, opts.block_resolution)
    theirs = synthesis.get("encoder_kwargs", {})
    if not hasattr((opts.source or {}).get("G_ema"), "latent_grid"):
        if opts.source is not None:
            c.new_kind = True
        if opts.encoder_init == "random":
            del encoder["max_resolution"]  # the paper's encoder
        synthesis.setdefault("encoder_kwargs", encoder)
    elif (
        grids != old[0]
        and theirs.get("max_resolution", encoder["max_resolution"]) < encoder["max_resolution"]
    ):
        synthesis.encoder_kwargs = dict(theirs, max_resolution=encoder["max_resolution"])
    if opts.encoder_init:
        synthesis.encoder_init = opts.encoder_init
    if opts.demodulation:
        synthesis.demodulation = opts.demodulation.replace("-", "_")
    if opts.style_sharpness is not None:
        synthesis.style_sharpness = opts.style_sharpness
    c.loss_kwargs.update(class_name="ssn_ext.loss.DistortionRegularizedLoss")
    c.loss_kwargs.lambda_d = 100.0 if opts.lambda_d is None else opts.lambda_d
    if opts.lambda_interaction is not None:
        c.loss_kwargs.lambda_interaction = opts.lambda_interaction
    if opts.dist_blocks:
        c.loss_kwargs.dist_blocks = opts.dist_blocks
    if opts.distortion:
        c.loss_kwargs.distortion = opts.distortion
    if opts.pl_block_beta is not None:
        c.loss_kwargs.update(class_name="ssn_ext.loss.BlockPathLengthLoss", pl_block_beta=opts.pl_block_beta)
    c.transfer = "ssn_ext.transfer.transfer"
    c.tick_hooks.append("ssn_ext.hooks.ChangeMaps")


def chosen_grids(opts, old_grids, old_splits):
    """(grids, splits) that the options ask for, else those of the source, else one grid by the picture's shape."""
    height, width = opts.img_shape
    name = "--latent-grids" if opts.latent_grids else "--latent-grid"
    if opts.latent_grid and opts.latent_grids:
        raise ConfigError("--latent-grid and --latent-grids both say what the blocks are: give one of them")
    try:
        asked = parse_grids(opts.latent_grids) if opts.latent_grids else []
        asked = [parse_grid(opts.latent_grid)] if opts.latent_grid else asked
    except ValueError as err:
        raise ConfigError(f"{name}={err}") from err
    grids = asked or old_grids or [default_grid(height, width)]
    for rows, columns in grids:
        if rows > height or columns > width:
            raise ConfigError(
                f"{name}: {rows} rows of {columns} blocks do not fit into {width}x{height} pixels"
            )
    if opts.grid_split is not None and len(grids) == 1:
        raise ConfigError("--grid-split divides the layers between several grids: see --latent-grids")
    kept = old_splits if grids == old_grids else default_splits(grids, opts.img_shape, opts.block_resolution)
    splits = kept if opts.grid_split is None else opts.grid_split
    try:
        check_splits(grids, splits, opts.block_resolution)
    except ValueError as err:
        raise ConfigError(f"--grid-split={err}") from err
    return grids, splits


# Options of a synthesis network that mean the same to SPADE.
SPADE_TAKES = [
    *(
        "channel_base",
        "channel_max",
        "architecture",
        "use_noise",
        "activation",
        "resample_filter",
        "encoder_kwargs",
    ),
]


def spade(c, opts):
    """SPADE in the place of spatially modulated convolutions, for comparison: batch statistics, scale and shift.

    All else is --cfg=ssn. From a StyleGAN2 it takes what SSNs take, but does not begin with its pictures.
    """
    if opts.precision not in (None, "fp32"):
        raise ConfigError(
            f"--precision={opts.precision} cannot be had with --cfg=spade, which computes in float32"
        )
    ssn(c, opts)
    if "latent_grids" in c.G_kwargs:
        raise ConfigError("--cfg=spade knows one grid of latents: say which, as --latent-grid=4x4")
    c.G_kwargs.class_name = "ssn_ext.spade_networks.SpadeGenerator"
    synthesis = c.G_kwargs.synthesis_kwargs
    if synthesis.get("architecture", "skip") != "skip":
        raise ConfigError(
            f"--resume: --cfg=spade knows the architecture 'skip' only, not {synthesis.architecture!r}"
        )
    c.G_kwargs.synthesis_kwargs = dnnlib.EasyDict({k: v for k, v in synthesis.items() if k in SPADE_TAKES})
    c.tick_hooks.append("ssn_ext.hooks.AverageStatistics")


def widths_of(source, c, img_shape):
    """(constructor arguments of a plain generator, (grids, splits) of a spatial source, else empty ones) from the
    networks of a snapshot; sets c.D_kwargs likewise.

    img_shape: [H, W] of the data set, which must be the network's; None takes any network, whose widths go on to
    further blocks as its channel_base says.
    """
    G, D = source["G_ema"], source["D"]
    if img_shape is not None and shape_of(G) != img_shape:
        sizes = [f"{width}x{height}" for height, width in (shape_of(G), img_shape)]
        raise ConfigError(
            f"--resume: the network makes {sizes[0]} pictures, --data has {sizes[1]};"
            " --allow-partial=resolution takes what they share"
        )
    plain = _own_kwargs(G)
    grids, splits = grids_of(G) if hasattr(G, "latent_grid") else [], getattr(G, "grid_splits", [])
    for name in ["latent_grid", "latent_grids", "grid_splits"]:
        plain.pop(name, None)
    for name in ["z_dim", "w_dim"]:
        plain[name] //= sum(block_counts(grids)) if grids else 1
    c.D_kwargs = dnnlib.EasyDict(_own_kwargs(D), class_name=c.D_kwargs.class_name)
    return plain, (grids, splits)


def _own_kwargs(network):
    """The constructor arguments of a network without those that the data set gives."""
    return dnnlib.EasyDict({k: v for k, v in constructor_kwargs(network).items() if k not in FROM_DATA})
