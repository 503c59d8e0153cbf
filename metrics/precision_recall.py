# SPDX-License-Identifier: Apache-2.0
"""Improved precision and recall (Kynkaanniemi et al. 2019)."""

import torch

from metrics import detectors, metric_utils


def neighbour_radii(points, k, row_batch_size=10000, col_batch_size=10000):
    """Distance of every point [N, F] to its k-th nearest other point -> [N]. ValueError for k points or
    fewer.
    """
    if len(points) <= k:
        raise ValueError(f"Precision and recall need more than {k} pictures, not {len(points)}")
    radii = []
    for rows in points.split(row_batch_size):
        nearest = None  # the k + 1 smallest so far; the point itself is one of them
        for columns in points.split(col_batch_size):
            distances = torch.cdist(rows, columns)
            nearest = distances if nearest is None else torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, k])
    return torch.cat(radii)


def share_inside(probes, points, radii, row_batch_size=10000, col_batch_size=10000):
    """Share of the probes [M, F] that lie in the ball round any of the points [N, F] of radii [N]."""
    inside = 0
    for rows in probes.split(row_batch_size):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, limits in zip(points.split(col_batch_size), radii.split(col_batch_size), strict=True):
            hit |= (torch.cdist(rows, columns) <= limits).any(dim=1)
        inside += int(hit.sum())
    return inside / len(probes)


def precision_recall(real, gen, k=3, row_batch_size=10000, col_batch_size=10000):
    """(precision, recall) of features [N, F]: generated ones on the manifold of the real ones, and the
    reverse.

    The manifold is the union of balls round the points that reach their k-th neighbour. Features are rounded
    to half precision, as in the family; distances are computed in float32.
    """
    sizes = (row_batch_size, col_batch_size)
    real, gen = (f.to(torch.float16).to(torch.float32) for f in (real, gen))
    precision = share_inside(gen, real, neighbour_radii(real, k, *sizes), *sizes)
    recall = share_inside(real, gen, neighbour_radii(gen, k, *sizes), *sizes)
    return precision, recall


def compute_pr(opts, max_real, num_gen, nhood_size, row_batch_size, col_batch_size):
    """(precision, recall) of `num_gen` pictures; NaN on ranks other than 0."""
    real, made = metric_utils.compute_both_stats(opts, "vgg16", max_real, num_gen, capture_all=True)
    if opts.rank != 0:
        return float("nan"), float("nan")
    features = (stats.get_all_torch().to(opts.device) for stats in (real, made))
    return precision_recall(*features, nhood_size, row_batch_size, col_batch_size)


def pr(opts, name, **settings):
    """The metric `name` with the settings of compute_pr: two results."""
    key = detectors.result_name(name, detectors.choose("vgg16", opts.detector))
    precision, recall = compute_pr(opts, **settings)
    return {f"{key}_precision": precision, f"{key}_recall": recall}
