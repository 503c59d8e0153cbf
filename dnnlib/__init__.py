# SPDX-License-Identifier: Apache-2.0
"""Helpers without torch: dictionaries with attributes, names to objects, downloads, plug-ins."""

from .util import EasyDict, make_cache_dir_path

__all__ = ["EasyDict", "make_cache_dir_path"]
