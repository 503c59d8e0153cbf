# SPDX-License-Identifier: Apache-2.0
"""Inception score (Salimans et al. 2016)."""

import numpy as np
import scipy.special

from metrics import detectors, metric_utils


def inception_score(probs, splits=10):
    """(mean, standard deviation) over `splits` parts of exp(mean of KL(p || mean p)); probs [N, classes],
    rows sum to 1.

    ValueError for fewer rows than splits.
    """
    probs = np.asarray(probs, dtype=np.float64)
    if len(probs) < splits:
        raise ValueError(f"The Inception score of {splits} splits needs as many pictures, not {len(probs)}")
    edges = np.arange(splits + 1) * len(probs) // splits
    scores = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = probs[first:last]
        divergence = scipy.special.rel_entr(part, part.mean(axis=0, keepdims=True)).sum(axis=1)  # 0 log 0 = 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def compute_is(opts, num_gen, num_splits):
    """(mean, standard deviation) of the score of `num_gen` pictures; NaN on ranks other than 0."""
    detector = detectors.choose("classes", opts.detector)
    made = metric_utils.compute_feature_stats_for_generator(
        opts, detector.source, dict(no_output_bias=True), capture_all=True, max_items=num_gen
    )
    if opts.rank != 0:
        return float("nan"), float("nan")
    return inception_score(made.get_all(), num_splits)


def inception_score_of(opts, name, **settings):
    """The metric `name` with the settings of compute_is: two results."""
    mean, std = compute_is(opts, **settings)
    return {f"{name}_mean": mean, f"{name}_std": std}
