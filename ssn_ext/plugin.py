# SPDX-License-Identifier: Apache-2.0
"""All that the plug-in adds to the house, in one place."""

import click

from dnnlib.cli import FiniteRange, NumRange
from metrics.metric_main import METRICS
from training.configs import CONFIGS, add_option
from training.formats import NETWORKS


def register():
    """Called once by dnnlib.plugins.load_plugins."""
    CONFIGS.register("ssn", "ssn_ext.config.ssn")
    CONFIGS.register("spade", "ssn_ext.config.spade")
    NETWORKS.register("SpatialGenerator", "ssn_ext.networks.SpatialGenerator")
    NETWORKS.register("SpadeGenerator", "ssn_ext.spade_networks.SpadeGenerator")
    METRICS.register("ldbr_dist", "ssn_ext.metric.ldbr_dist")
    METRICS.register("ldbr_floor", "ssn_ext.floor_metric.ldbr_floor")
    METRICS.register("ldbr_floor_emd", "ssn_ext.floor_metric.ldbr_floor_emd")
    METRICS.register("ldbr_floor_features", "ssn_ext.floor_metric.ldbr_floor_features")
    METRICS.register("droplet", "ssn_ext.droplets.droplet")
    METRICS.register("ldbr_emd", "ssn_ext.metric.ldbr_emd")
    METRICS.register("ldbr_features", "ssn_ext.metric.ldbr_features")
    group = dict(heading="ssn_ext", configs=["ssn", "spade"])
    modulation = dict(heading="ssn_ext", configs=["ssn"])
    add_option(
        "--lambda-d",
        desc="lambda{:g}",
        type=FiniteRange(min=0),
        metavar="FLOAT",
        help="Weight of the distortion regulariser; 0 turns it off. 100 is the paper's for photographs, flat drawings"
        " want 1 to 10  [default: 100]",
        **group,
    )
    add_option(
        "--lambda-interaction",
        desc="interaction{:g}",
        type=FiniteRange(min=0),
        metavar="FLOAT",
        help="Weight of what a re-drawn block's change owes to the other blocks: more efficient edits at no price in"
        " covariance; the regulariser takes twice the time  [default: 0]",
        **group,
    )
    add_option(
        "--distortion",
        desc="{}",
        type=click.Choice(["mse", "features", "emd"]),
        help="What the regulariser measures: pixels (the paper), features of the discriminator, or the colours in"
        " each block wherever they lie  [default: mse]",
        **group,
    )
    add_option(
        "--dist-blocks",
        desc="distblocks{}",
        type=click.IntRange(min=1),
        metavar="INT",
        help="Blocks re-drawn per picture in the regulariser  [default: 1]",
        **group,
    )
    add_option(
        "--pl-block-beta",
        desc="plblock{:g}",
        type=FiniteRange(min=0, min_open=True),
        metavar="FLOAT",
        help="Path lengths by block, appendix B of the paper (a negative result there): w of a block moves the other"
        " blocks at this part of its own one's rate  [default: StyleGAN2's path lengths]",
        **group,
    )
    add_option(
        "--latent-grid",
        desc="grid{}",
        metavar="HxW",
        help="Rows and columns of latent blocks  [default: square blocks, 4x4 for square pictures]",
        **group,
    )
    add_option(
        "--latent-grids",
        desc="grids{}",
        metavar="LIST",
        help="Several grids of blocks over one picture, from coarse (layout) to fine (detail): 4x4,8x8",
        **modulation,
    )
    add_option(
        "--grid-split",
        type=NumRange(),
        metavar="LIST",
        help="Resolution from which on the layers read the next of --latent-grids  [default: the first with two"
        " pixels a side of its blocks; 16 for 8x8]",
        **modulation,
    )
    add_option(
        "--encoder-init",
        desc="encoder{}",
        type=click.Choice(["exact", "random", "none"]),
        help="Start of the spatial encoder: as the StyleGAN2 of --resume, at random as in the paper, or no encoder"
        "  [default: exact]",
        **modulation,
    )
    add_option(
        "--demodulation",
        type=click.Choice(["circular", "zero-padded", "local"]),
        help="Borders of eq. (14), of which circular ones are exact at the start; or by position, instead of one"
        " factor for the whole picture, also exact  [default: circular]",
        **modulation,
    )
    add_option(
        "--style-sharpness",
        desc="sharp{}",
        type=click.IntRange(min=1),
        metavar="INT",
        help="How steeply styles change from block to block: 1 is bilinear, 2 twice as steep and flat between"
        "  [default: 1]",
        **modulation,
    )
