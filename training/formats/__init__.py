# SPDX-License-Identifier: Apache-2.0
"""The kinds of files that networks come in and go out as; training.snapshot is their face."""

from dnnlib.plugins import Registry

# Class names in the family's pickles -> our class of that name. What is not here is not rebuilt from a file.
NETWORKS = Registry("network class")
NETWORKS.register("Generator", "training.networks.Generator")
NETWORKS.register("Discriminator", "training.networks.Discriminator")
NETWORKS.register("AugmentPipe", "training.augment.AugmentPipe")


class MissingPackageError(ImportError, ValueError):
    """An optional package is not installed; the message says how to install it."""
