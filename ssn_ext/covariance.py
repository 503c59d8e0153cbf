# SPDX-License-Identifier: Apache-2.0
"""Covariances of pictures: estimate, take the root, compare. Float64, in the smaller of pictures and values."""

from typing import Any

import torch

CHUNK = 1 << 22  # values converted to float64 at a time, beside the matrices that are needed whole


def covariance(samples: Any) -> torch.Tensor:
    """Biased covariance [D, D], float64, of pictures [N, ...] with D values each."""
    pictures = _flat(samples, "samples")
    step = max(1, CHUNK // pictures.shape[1])
    mean = sum(part.double().sum(dim=0) for part in pictures.split(step)) / len(pictures)
    cov = torch.zeros([len(mean), len(mean)], dtype=torch.float64, device=pictures.device)
    for part in pictures.split(step):
        centred = part.double() - mean
        cov.addmm_(centred.T, centred)
    return cov / len(pictures)


def factorise(cov: Any = None, samples: Any = None, cutoff: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Root of a covariance [D, D], or of that of samples [N, ...]: (A^T, variance left out of each value [D]).

    A^T [k, D] has orthogonal rows, the longest first, and A A^T is the covariance but for the eigenvalues below
    `cutoff` times the largest (at least those that are zero up to rounding).
    Raises ValueError for a matrix that is no covariance, or unless exactly one of cov and samples is given.
    """
    if (cov is None) == (samples is None):
        raise ValueError("Give either a covariance or samples")
    pictures = None if samples is None else _flat(samples, "samples")
    if pictures is None or pictures.shape[0] >= pictures.shape[1]:
        cov = _symmetric(cov, "cov") if pictures is None else covariance(pictures)
        values, vectors = torch.linalg.eigh(cov)
        kept = _above(values, cutoff)
        factor = (vectors[:, kept] * values[kept].sqrt()).T
        variance = cov.diagonal()
    else:
        centred = _centred(pictures)
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        factor = vectors[:, _above(values, cutoff)].T @ centred
        variance = centred.square().sum(dim=0)
    return factor.contiguous(), (variance - factor.square().sum(dim=0)).clamp(min=0)


def kept_covariance(
    cov_generator: Any = None,
    cov_data: Any = None,
    *,
    samples_generator: Any = None,
    samples_data: Any = None,
) -> float:
    """Share of the data's covariance that a generator kept:  1 - tr (C_data - C_generator)_+ / tr C_data.

    tr(.)_+ sums the positive eigenvalues: the variance that the generator lacks, over the set of orthogonal
    directions in which it lacks most. The share lies in [0, 1]. It is 1 if the generator has at least the data's
    variance in every direction; losing an independent part of the pictures of covariance R (an eigendirection,
    say) costs exactly tr R / tr C_data; shrinking all by the factor s keeps s; too much variance elsewhere earns
    nothing. The ratio of traces and the Bures fidelity tr(C_g^(1/2) C_d C_g^(1/2))^(1/2) / tr C_d lack these
    properties: both reward excess, and the fidelity keeps sqrt(s).
    Takes two covariances [D, D] or two sets of pictures [N, ...]. Estimated covariances differ by chance, which
    reads as a loss: compare with the value for two disjoint halves of the data (docs/limit.md).
    """
    if (cov_data is None) == (samples_data is None) or (cov_generator is None) != (cov_data is None):
        raise ValueError("Give either two covariances or two sets of samples")
    if samples_data is None:
        generator, data = _symmetric(cov_generator, "cov_generator"), _symmetric(cov_data, "cov_data")
        _check_same_size(generator, data)
        lost, trace = torch.linalg.eigvalsh(data - generator), data.trace()
    else:
        lost, trace = _difference(
            _flat(samples_data, "samples_data"), _flat(samples_generator, "samples_generator")
        )
    if trace <= 0:
        raise ValueError("The data's covariance is zero: there is nothing to keep")
    return min(max(1 - float(lost.clamp(min=0).sum() / trace), 0.0), 1.0)


def _difference(data: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(eigenvalues of Cov(data) - Cov(other), all that are not zero; tr Cov(data))."""
    _check_same_size(data, other)
    if len(data) + len(other) >= data.shape[1]:
        cov = covariance(data)
        return torch.linalg.eigvalsh(cov - covariance(other)), cov.trace()
    # With Y = both, centred: Y^T S Y, S = diag(+-1), has the eigenvalues of G^(1/2) S G^(1/2), G = Y Y^T.
    first, second = _centred(data), _centred(other)
    both = torch.cat([first, second])
    values, vectors = torch.linalg.eigh(both @ both.T)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    signs = torch.cat([root.new_ones(len(first)), -root.new_ones(len(second))])
    return torch.linalg.eigvalsh((root * signs) @ root), first.square().sum()


def _above(values: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Positions of the eigenvalues (ascending) above the cut-off, largest first."""
    if values[0] < -1e-6 * values.abs().max():
        raise ValueError(f"A covariance has no negative eigenvalue; this matrix has {float(values[0]):g}")
    least = max(cutoff, 1e-14) * values[-1].clamp(min=0)
    return torch.nonzero(values > least).flatten().flip(0)


def _centred(pictures: torch.Tensor) -> torch.Tensor:
    """Y [N, D] in float64 with Y^T Y = the biased covariance."""
    pictures = pictures.double()
    return (pictures - pictures.mean(dim=0)) / len(pictures) ** 0.5


def _flat(samples: Any, name: str) -> torch.Tensor:
    """Pictures [N, D] from [N, ...]."""
    samples = torch.as_tensor(samples)
    if samples.ndim < 2 or samples.shape[0] < 2:
        raise ValueError(f"{name} must be two or more pictures [N, ...], not of shape {list(samples.shape)}")
    return _finite(samples.flatten(1), name)


def _symmetric(cov: Any, name: str) -> torch.Tensor:
    cov = torch.as_tensor(cov).double()
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"{name} must be a square matrix, not of shape {list(cov.shape)}")
    return _finite((cov + cov.T) / 2, name)


def _finite(x: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} has values that are not finite")
    return x


def _check_same_size(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Pictures of different sizes: {a.shape[1]} and {b.shape[1]} values")
