# SPDX-License-Identifier: Apache-2.0
from .util import EasyDict, make_cache_dir_path  # noqa: F401
