# SPDX-License-Identifier: Apache-2.0
"""Kernel inception distance (Binkowski et al. 2018)."""

import numpy as np

from metrics import detectors, metric_utils


def squared_mmd(x, y):
    """Unbiased estimate of the squared maximum mean discrepancy of two samples [m, F], kernel (x.y / F +
    1)^3.
    """

    def kernel(a, b):
        base = a @ b.T / a.shape[1] + 1
        return base * base * base  # numpy's ** is ten times slower

    def mean_of_pairs(a):  # pairs of different rows only
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()


def kernel_distance(real, gen, num_subsets=100, max_subset_size=1000, seed=0):
    """Mean of squared_mmd over random subsets of equal size, drawn without replacement from real and gen [N,
    F].

    Subsets have min(N of real, N of gen, max_subset_size) rows; ValueError below 2. Unbiased: it may be
    negative.
    """
    size = min(len(real), len(gen), max_subset_size)
    if size < 2:
        raise ValueError(f"The kernel distance needs at least 2 pictures of each kind, not {size}")
    rnd = np.random.default_rng(seed)
    total = 0.0
    for _ in range(num_subsets):
        x, y = (f[rnd.choice(len(f), size, replace=False)].astype(np.float64) for f in (real, gen))
        total += squared_mmd(x, y)
    return float(total / num_subsets)


def compute_kid(opts, max_real, num_gen, num_subsets, max_subset_size):
    """Kernel distance of `num_gen` pictures from up to `max_real` real ones; NaN on ranks other than 0."""
    real, made = metric_utils.compute_both_stats(opts, "inception", max_real, num_gen, capture_all=True)
    if opts.rank != 0:
        return float("nan")
    return kernel_distance(real.get_all(), made.get_all(), num_subsets, max_subset_size, seed=opts.seed)


def kid(opts, name, **settings):
    """The metric `name` with the settings of compute_kid."""
    key = detectors.result_name(name, detectors.choose("inception", opts.detector))
    return {key: compute_kid(opts, **settings)}
