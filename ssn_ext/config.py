# SPDX-License-Identifier: Apache-2.0
"""The configs of the plug-in: a StyleGAN2 config, edited."""

import dnnlib
from ssn_ext.blocks import parse_grid
from ssn_ext.transfer import constructor_kwargs, spatial_kwargs
from training import configs
from training.configs import ConfigError

# Arguments of the networks that the training loop fills in from the data set.
FROM_DATA = ["c_dim", "img_resolution", "img_channels"]


def ssn(c, opts):
    """Spatially Stochastic Network: StyleGAN2 with a grid of independent latents and a penalty on
    far-reaching edits.

    Widths, depth, architecture and clamp are those of the --resume file; without one, the paper row of the
    resolution (below 256: laptop).
    """
    resolution = c.training_set_kwargs.resolution
    rows = {256: configs.paper256, 512: configs.paper512, 1024: configs.paper1024}
    rows.get(resolution, configs.laptop if resolution < 256 else configs.paper1024)(c, opts)
    try:
        grid = parse_grid(opts.latent_grid or "4x4")
    except ValueError as err:
        raise ConfigError(f"--latent-grid={err}") from err
    if opts.source is None:
        plain = c.G_kwargs
    else:
        plain, grid = widths_of(opts.source, c, grid if opts.latent_grid else None)
    if max(grid) > resolution:
        raise ConfigError(
            f"--latent-grid: {grid[0]}x{grid[1]} blocks do not fit into {resolution} pixels a side"
        )
    c.G_kwargs = dnnlib.EasyDict(spatial_kwargs(plain, grid), class_name="ssn_ext.networks.SpatialGenerator")
    synthesis = c.G_kwargs.synthesis_kwargs = dnnlib.EasyDict(c.G_kwargs.get("synthesis_kwargs", {}))
    if not hasattr((opts.source or {}).get("G_ema"), "latent_grid"):
        # a quarter of the widest layer: 128 of 512, and as small a part of a small network
        synthesis.setdefault("encoder_kwargs", dict(channels=max(synthesis.get("channel_max", 512) // 4, 8)))
    if opts.encoder_init:
        synthesis.encoder_init = opts.encoder_init
    if opts.demodulation:
        synthesis.demodulation = opts.demodulation.replace("-", "_")
    c.loss_kwargs.update(class_name="ssn_ext.loss.DistortionRegularizedLoss")
    c.loss_kwargs.lambda_d = 100.0 if opts.lambda_d is None else opts.lambda_d
    if opts.dist_blocks:
        c.loss_kwargs.dist_blocks = opts.dist_blocks
    c.transfer = "ssn_ext.transfer.transfer"
    c.tick_hooks.append("ssn_ext.hooks.ChangeMaps")


def widths_of(source, c, grid):
    """(constructor arguments of a plain generator, grid) from the networks of a snapshot; sets c.D_kwargs
    likewise.

    grid: the one asked for, or None for that of a spatial source, else 4x4.
    """
    G, D = source["G_ema"], source["D"]
    if G.img_resolution != c.training_set_kwargs.resolution:
        raise ConfigError(
            f"--resume: the network makes {G.img_resolution}x{G.img_resolution} pictures, --data has"
            f" {c.training_set_kwargs.resolution}x{c.training_set_kwargs.resolution}"
        )
    plain = _own_kwargs(G)
    old = plain.pop("latent_grid", None)
    if old is not None:
        for name in ["z_dim", "w_dim"]:
            plain[name] //= old[0] * old[1]
    c.D_kwargs = dnnlib.EasyDict(_own_kwargs(D), class_name=c.D_kwargs.class_name)
    return plain, grid or old or [4, 4]


def _own_kwargs(network):
    """The constructor arguments of a network without those that the data set gives."""
    return dnnlib.EasyDict({k: v for k, v in constructor_kwargs(network).items() if k not in FROM_DATA})
