# SPDX-License-Identifier: Apache-2.0
"""Frechet inception distance (Heusel et al. 2017)."""

import warnings

import numpy as np

from metrics import detectors, metric_utils


def frechet_distance(mu0, cov0, mu1, cov1):
    """Squared Wasserstein-2 distance of two Gaussians: |mu0 - mu1|^2 + tr(C0 + C1 - 2 (C0 C1)^(1/2)); at
    least 0.

    mu [F], cov [F, F] symmetric positive semidefinite, of any rank. With C = L L^T from the eigenvectors of
    positive eigenvalue, the trace of the root is the sum of the singular values of L0^T L1, so that no
    matrix root is needed.
    """
    mu0, mu1 = np.asarray(mu0, dtype=np.float64), np.asarray(mu1, dtype=np.float64)
    cov0, cov1 = np.asarray(cov0, dtype=np.float64), np.asarray(cov1, dtype=np.float64)
    overlap = np.linalg.svd(_factor(cov0).T @ _factor(cov1), compute_uv=False).sum()
    distance = np.square(mu0 - mu1).sum() + np.trace(cov0) + np.trace(cov1) - 2 * overlap
    return max(float(distance), 0.0)


def _factor(cov):
    """L [F, rank] with L L^T = cov; eigenvalues that are zero up to rounding are left out."""
    values, vectors = np.linalg.eigh(cov)
    keep = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def compute_fid(opts, max_real, num_gen):
    """Frechet distance of `num_gen` pictures from up to `max_real` real ones; NaN in all processes but the
    first.

    Warns where there are fewer pictures than features: the distance is then dominated by its bias.
    """
    real, made = metric_utils.compute_both_stats(opts, "inception", max_real, num_gen, capture_mean_cov=True)
    if opts.rank != 0:
        return float("nan")
    fewest = min(real.num_items, made.num_items)
    if fewest < real.num_features:
        warnings.warn(
            f"The Frechet distance of {fewest} pictures in {real.num_features} features is biased upwards and"
            " comparable only at equal numbers; the kernel distance (kid...) is not biased",
            stacklevel=2,
        )
    return frechet_distance(*real.get_mean_cov(), *made.get_mean_cov())


def fid(opts, name, **settings):
    """The metric `name` with the settings of compute_fid."""
    key = detectors.result_name(name, detectors.choose("inception", opts.detector))
    return {key: compute_fid(opts, **settings)}
