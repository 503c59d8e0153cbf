# SPDX-License-Identifier: Apache-2.0
"""Features gathered picture by picture, their mean and covariance, and the files that keep them."""

import pickle

import numpy as np
import torch
import torch.distributed

from dnnlib.util import open_atomic

PICKLE_PROTOCOL = 4
# All that a cache file is made of: numpy arrays in a dict of plain values.
ALLOWED_GLOBALS = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in [(f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar")]
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class FeatureStats:
    """Gathers float32 rows [N, F]: all of them (capture_all), or their mean and covariance
    (capture_mean_cov).

    Rows beyond max_items (None: no limit) are ignored. Sums are kept in float64.
    """

    FIELDS = (
        "capture_all",
        "capture_mean_cov",
        "max_items",
        "num_items",
        "num_features",
        "all_features",
        "raw_mean",
        "raw_cov",
    )

    def __init__(self, capture_all=False, capture_mean_cov=False, max_items=None):
        fields = (capture_all, capture_mean_cov, max_items, 0, None, None, None, None)
        self.__dict__.update(zip(self.FIELDS, fields, strict=True))

    def set_num_features(self, num_features):
        """Fixes the number of columns, at the first rows or before; ValueError if it changes afterwards."""
        if self.num_features is None:
            self.num_features = int(num_features)
            self.all_features = []
            self.raw_mean = np.zeros([self.num_features], dtype=np.float64)
            self.raw_cov = np.zeros([self.num_features] * 2, dtype=np.float64)
        elif self.num_features != num_features:
            raise ValueError(f"Features of {num_features} values came after features of {self.num_features}")

    def is_full(self):
        """Whether max_items rows are there."""
        return self.max_items is not None and self.num_items >= self.max_items

    def append(self, x):
        """Takes rows, anything that becomes float32 [N, F]. ValueError for NaN and infinity."""
        x = np.asarray(x, dtype=np.float32)
        assert x.ndim == 2
        if not np.isfinite(x).all():
            raise ValueError("The detector gave features that are NaN or infinite")
        if self.max_items is not None:
            x = x[: self.max_items - self.num_items]
        if len(x) == 0:
            return
        self.set_num_features(x.shape[1])
        self.num_items += len(x)
        if self.capture_all:
            self.all_features.append(x)
        if self.capture_mean_cov:
            wide = x.astype(np.float64)
            self.raw_mean += wide.sum(axis=0)
            self.raw_cov += wide.T @ wide

    def append_torch(self, x, num_gpus=1, rank=0):
        """Takes rows [N, F] of every process, equally many each, in turns: row 0 of all, row 1 of all, ..."""
        assert x.ndim == 2 and 0 <= rank < num_gpus
        if num_gpus > 1:
            x = x.contiguous()
            parts = [torch.empty_like(x) for _ in range(num_gpus)]
            torch.distributed.all_gather(parts, x)
            x = torch.stack(parts, dim=1).flatten(0, 1)
        self.append(x.cpu().numpy())

    def get_all(self):
        """All rows: float32 [num_items, F]."""
        assert self.capture_all and self.num_items > 0
        return np.concatenate(self.all_features, axis=0)

    def get_all_torch(self):
        """All rows as a tensor on the CPU."""
        return torch.from_numpy(self.get_all())

    def get_mean_cov(self):
        """float64 mean [F] and covariance [F, F] = E[x x^T] - mean mean^T (divided by N, not N - 1)."""
        assert self.num_items > 0
        if self.capture_mean_cov:
            mean, second = self.raw_mean / self.num_items, self.raw_cov / self.num_items
        else:
            wide = self.get_all().astype(np.float64)
            mean, second = wide.mean(axis=0), wide.T @ wide / self.num_items
        return mean, second - np.outer(mean, mean)

    def can_give(self, capture_all=False, capture_mean_cov=False):
        """Whether these statistics answer the question: all rows answer both."""
        return self.capture_all or (self.capture_mean_cov and not capture_all)

    def save(self, pkl_file):
        """Writes a file: the attributes as a plain dict, pickled. It appears complete or not at all."""
        with open_atomic(pkl_file) as f:
            pickle.dump({name: getattr(self, name) for name in self.FIELDS}, f, protocol=PICKLE_PROTOCOL)

    @staticmethod
    def load(pkl_file):
        """Reads a file of `save`. UnpicklingError for anything in it but plain values and arrays."""
        with open(pkl_file, "rb") as f:
            fields = _ArrayUnpickler(f).load()
        stats = FeatureStats(fields["capture_all"], fields["capture_mean_cov"], fields["max_items"])
        stats.__dict__.update({name: fields[name] for name in FeatureStats.FIELDS})
        return stats


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"a file of feature statistics cannot hold {module}.{name}")
        return super().find_class(module, name)
