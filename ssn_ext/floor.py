# SPDX-License-Identifier: Apache-2.0
"""The least distortion that block-resampling can have, from a covariance alone (docs/limit.md derives it).

Let y = g(z) have covariance C = A A^T, let block a be the values that P_a keeps, and let w_a = 1 / (B * values
outside a), so that  ldbr_dist = sum_a w_a E|(1 - P_a)(y - y^a)|^2.  Then, for any generator whatever,

    ldbr_dist >= floor = 2 min sum_a w_a tr (1 - P_a) C_a             over C_a >= 0 with sum_a C_a = C
                       = 2 ( top tr C - max sum_a tr Q_a M_a )        over Q_a >= 0 with sum_a Q_a = 1
    where  C_a = A Q_a A^T,   M_a = w_a L_a L_a^T + (top - w_a) A^T A,   L_a^T = the rows of A in block a,   top = max w_a,

and a Gaussian generator attains it. The maximum is a minimum-error discrimination; with Q_a = V_a V_a^T the iteration
Q_a <- X^-1 M_a Q_a M_a X^-1, X = (sum_a M_a Q_a M_a)^(1/2), is  V <- polar factor of [M_1 V_1, ..., M_B V_B].
`python -m ssn_ext.floor --data=pictures.zip --grid=4x4` prints the floor of a data set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch

CHUNK = 1 << 22  # values converted to float64 at a time, beside the matrices that are needed whole


@dataclass(frozen=True)
class FloorResult:
    """What `ldbr_floor` found. floor, lower_bound, zca and unrelated are on the scale of ldbr_dist.

    The true floor lies in [lower_bound, floor]: `floor` is attained by a generator of covariance C, `lower_bound` is
    a certificate (a feasible point of the dual problem) and holds for every generator, up to rounding.
    """

    floor: float
    lower_bound: float
    zca: float  # the generator C^(1/2) z, the "pretty good measurement" Q_a = P_a
    unrelated: float  # two independent pictures: the distortion if every block re-drew everything
    success: float  # sum_a tr P_a C_a at the optimum: the variance that blocks give to their own pixels
    trace: float  # tr C
    discarded: float  # share of tr C in eigenvalues below the cut-off; accounted for in floor and lower_bound
    rank: int  # number of eigenvalues kept
    iterations: int
    generator: torch.Tensor | None = (
        None  # [D, D]: F z attains the floor; column j belongs to the block of value j
    )

    @property
    def gap(self) -> float:
        """floor - lower_bound: how far the reported floor can be from the true one."""
        return self.floor - self.lower_bound


def ldbr_floor(
    cov: Any = None,
    masks: Any = None,
    *,
    samples: Any = None,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    cutoff: float = 1e-10,
    return_generator: bool = False,
    progress: Callable[[int, float, float], None] | None = None,
) -> FloorResult:
    """Least ldbr_dist of any generator with a given covariance and independent blocks; pixel values in [-1, 1].

    cov         [D, D] covariance of pictures laid out as [C, H, W]; or give `samples` [N, ...] instead, whose (biased)
                covariance is then used, worked out in the smaller of N and D
    masks       bool [B, H, W], each pixel in exactly one mask (ssn_ext.blocks.block_masks), or the block of each value
                as integers [D]. Blocks may differ in size: the mean over blocks weighs them as ldbr_dist does
    tolerance   stop when the gap between floor and certificate is this share of the floor
    cutoff      eigenvalues below this share of the largest are left out of the iteration, which makes it faster; floor
                and lower_bound still hold for the whole covariance (the bound widens with the square root of the share)
    return_generator    adds the matrix [D, D] of a Gaussian generator that attains the floor (of the kept eigenvalues)
    progress    called as progress(iteration, floor, lower_bound)
    NumPy arrays and tensors are accepted; the work is done in float64 on the device of cov or samples.
    Raises ValueError for shapes that do not fit, masks that are no partition, or values that are not finite.
    """
    factor, remainder = _factorise(cov, samples, cutoff)
    index = _block_index(masks, factor.shape[1]).to(factor.device)
    problem = _Problem(factor, index)
    scale = _Scale(problem, remainder)
    if problem.factor.shape[0] == 0:  # every picture is the same
        return _result(problem, scale, problem.factor, [0.0], 0.0, return_generator)

    V = _polar(problem.factor)  # Q_a = P_a
    values, bound = [], float("inf")
    while True:
        W = problem.apply(V)
        values.append(float((V * W).sum()))
        following = _polar(W)
        bound = min(bound, problem.dual_value(W @ following.T))
        if progress is not None:
            progress(len(values) - 1, scale.floor(values[-1]), scale.lower_bound(bound))
        reached = problem.cost(values[-1])
        if bound - values[-1] <= tolerance * reached / 2 + 1e-12 * values[-1] or len(values) > max_iterations:
            return _result(problem, scale, V, values, bound, return_generator)
        V = following


def efficiency(own_floor: float, distortion: float) -> float:
    """own_floor / distortion: 1 for a generator that re-draws blocks as locally as its own covariance allows.

    At most 1 but for sampling error. A distortion of zero is its own floor, hence 1. ValueError for negative arguments.
    """
    if own_floor < 0 or distortion < 0:
        raise ValueError(f"Floor and distortion cannot be negative: got {own_floor} and {distortion}")
    return own_floor / distortion if distortion > 0 else 1.0


def kept_covariance(
    cov_generator: Any = None,
    cov_data: Any = None,
    *,
    samples_generator: Any = None,
    samples_data: Any = None,
) -> float:
    """Share of the data's covariance that a generator kept:  1 - tr (C_data - C_generator)_+ / tr C_data,  in [0, 1].

    tr(.)_+ is the sum of the positive eigenvalues: the variance that the generator lacks, over the set of orthogonal
    directions in which it lacks most. It is 1 if the generator has at least the data's variance in every direction;
    losing an independent part of the picture of covariance R (an eigendirection, say) costs exactly tr R / tr C_data;
    shrinking everything by s keeps s. Too much variance elsewhere earns nothing, which rules out a ratio of traces
    and the Bures fidelity tr(C_g^(1/2) C_d C_g^(1/2))^(1/2) / tr C_d (both exceed 1; the latter keeps sqrt(s)).
    Takes two covariances [D, D], or two sets of pictures [N, ...]. Estimated covariances differ by chance, which
    reads as a loss: compare with the value of two disjoint halves of the data (docs/limit.md).
    """
    if samples_generator is None:
        generator, data = _matrix(cov_generator, "cov_generator"), _matrix(cov_data, "cov_data")
        if generator.shape != data.shape:
            raise ValueError(f"Covariances of different sizes: {list(generator.shape)}, {list(data.shape)}")
        excess, trace = torch.linalg.eigvalsh(data - generator), data.trace()
    else:
        excess, trace = _spectrum_of_difference(
            _flat(samples_data, "samples_data"), _flat(samples_generator, "samples_generator")
        )
    if trace <= 0:
        raise ValueError("The data's covariance is zero: there is nothing to keep")
    return float(1 - excess.clamp(min=0).sum() / trace)


# The discrimination problem.


class _Problem:
    """Discriminating M_1..M_B, in the k dimensions of the covariance's support; values are sorted by block.

    factor      A^T, [k, D], with A^T A = diag(spectrum); in the sorted order, the L_a side by side
    weights     w_a [B];  top = max w_a, which makes every M_a >= 0
    """

    def __init__(self, factor: torch.Tensor, index: torch.Tensor):
        self.order = torch.argsort(index, stable=True)
        self.factor = factor[:, self.order]
        self.spectrum = (factor * factor).sum(dim=1)
        self.trace = float(self.spectrum.sum())
        self.sizes = torch.bincount(index).tolist()
        self.weights = [1 / (len(self.sizes) * (len(index) - size)) for size in self.sizes]
        self.top = max(self.weights)

    def blocks(self, columns: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (L_a, the columns of block a)."""
        return list(zip(self.factor.split(self.sizes, dim=1), columns.split(self.sizes, dim=1), strict=True))

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """[M_1 V_1, ..., M_B V_B], [k, D]; its inner product with V is the value sum_a tr Q_a M_a."""
        parts = []
        for weight, (L, Va) in zip(self.weights, self.blocks(V), strict=True):
            part = weight * (L @ (L.T @ Va))
            if weight != self.top:
                part += (self.top - weight) * self.spectrum[:, None] * Va
            parts.append(part)
        return torch.cat(parts, dim=1)

    def own_variance(self, V: torch.Tensor) -> float:
        """sum_a tr P_a C_a."""
        return float(sum((L.T @ Va).square().sum() for L, Va in self.blocks(V)))

    def cost(self, value: float) -> float:
        """Distortion that belongs to a value of the discrimination."""
        return 2 * max(self.top * self.trace - value, 0.0)

    def dual_value(self, K: torch.Tensor) -> float:
        """Trace of a matrix that is >= every M_a, made from a guess K: no measurement has a larger value.

        With low = min w_a and K' = K - (top - low) A^T A, feasible means K' + (w_a - low) A^T A =: K_a >= w_a L_a L_a^T.
        Where it fails, K' gets what is missing: if w_a L_a^T K_a^-1 L_a has eigenvectors v with eigenvalues s > 1, then
        w_a L_a L_a^T - K_a <= sum_v (1 - 1/s) w_a (L_a v)(L_a v)^T, and adding that for every a is enough.
        """
        low = min(self.weights)
        base = _make_positive((K + K.T) / 2 - (self.top - low) * torch.diag(self.spectrum), self.spectrum)
        total = float(base.trace()) + (self.top - low) * self.trace
        for weight in sorted(set(self.weights)):
            root = torch.linalg.cholesky(base + (weight - low) * torch.diag(self.spectrum))
            for own, (L, _) in zip(self.weights, self.blocks(self.factor), strict=True):
                if own == weight:
                    Y = torch.linalg.solve_triangular(root, L, upper=False)
                    s, v = torch.linalg.eigh(weight * (Y.T @ Y))
                    missing = 1 - 1 / s.clamp(min=1)
                    total += weight * float(((L @ v).square().sum(dim=0) * missing).sum())
        return total


class _Scale:
    """From values of the discrimination to distortions of the whole covariance, left-out eigenvalues R included.

    Above: all of R given to the one block that pays least for it. Below: a generator of covariance C is the sum of two
    parts, of covariance C - R and R; by Minkowski's inequality the root of its value is at most the sum of theirs.
    """

    def __init__(self, problem: _Problem, remainder: torch.Tensor):
        self.problem = problem
        self.left_out = float(remainder.sum())
        inside = [float(part.sum()) for part in remainder[problem.order].split(problem.sizes)]
        self.price = min(
            2 * w * max(self.left_out - own, 0.0) for w, own in zip(problem.weights, inside, strict=True)
        )

    def floor(self, value: float) -> float:
        return self.problem.cost(value) + self.price

    def lower_bound(self, dual_value: float) -> float:
        most = (dual_value**0.5 + (self.problem.top * self.left_out) ** 0.5) ** 2
        return max(2 * (self.problem.top * (self.problem.trace + self.left_out) - most), 0.0)


def _result(
    problem: _Problem,
    scale: _Scale,
    V: torch.Tensor,
    values: list[float],
    bound: float,
    return_generator: bool,
) -> FloorResult:
    trace = problem.trace + scale.left_out
    spread = problem.factor.square().sum(dim=0).split(problem.sizes)
    apart = sum(
        w * (problem.trace - float(own.sum())) for w, own in zip(problem.weights, spread, strict=True)
    )
    generator = None
    if return_generator:
        back = torch.argsort(problem.order)
        generator = (problem.factor.T @ V)[back][:, back]
    return FloorResult(
        floor=scale.floor(values[-1]),
        lower_bound=scale.lower_bound(bound),
        zca=scale.floor(values[0]),
        unrelated=2 * apart * (trace / problem.trace if problem.trace else 1.0),
        success=problem.own_variance(V),
        trace=trace,
        discarded=scale.left_out / trace if trace else 0.0,
        rank=problem.factor.shape[0],
        iterations=len(values) - 1,
        generator=generator,
    )


# Linear algebra.


def _polar(W: torch.Tensor) -> torch.Tensor:
    """(W W^T)^(-1/2) W for W [k, D] of full row rank; rows orthonormal to rounding.

    W W^T has the squares of W's singular values, so small ones drown in rounding; as every pass leaves the polar factor
    as it is, a second pass over the much better conditioned result finds them again.
    """
    for _ in range(8):
        gram = W @ W.T
        error = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()
        if error < 1e-6:
            return 1.5 * W - 0.5 * (gram @ W)  # one Newton-Schulz step squares the error
        squares, vectors = torch.linalg.eigh(gram)
        W = (vectors * squares.clamp(min=1e-15 * float(squares[-1])).rsqrt()) @ (vectors.T @ W)
    raise FloatingPointError("The iteration lost rank: raise the cut-off for small eigenvalues")


def _make_positive(K: torch.Tensor, spectrum: torch.Tensor, least: float = 1e-9) -> torch.Tensor:
    """A matrix >= K that is positive definite, little larger than K where that nearly is so already."""
    roots = spectrum.sqrt()
    least = least * float(K.diagonal().sum() / spectrum.sum())
    if least > 0:
        lifted = K + least * torch.diag(spectrum)
        if int(torch.linalg.cholesky_ex(lifted).info) == 0:
            return lifted
    values, vectors = torch.linalg.eigh(K / roots / roots[:, None])
    values = values.clamp(min=1e-9 * float(values[-1]))
    return ((vectors * values) @ vectors.T) * roots * roots[:, None]


def _factorise(cov: Any, samples: Any, cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A^T [k, D] with orthogonal rows, largest first, and A A^T = the covariance; variance left out of each value [D])."""
    if (cov is None) == (samples is None):
        raise ValueError("Give either a covariance or samples")
    pictures = None if samples is None else _flat(samples, "samples")
    if pictures is None or pictures.shape[0] >= pictures.shape[1]:
        cov = _matrix(cov, "cov") if pictures is None else _covariance(pictures)
        values, vectors, variance = *torch.linalg.eigh(cov), cov.diagonal()
        kept = _above(values, cutoff)
        factor = (vectors[:, kept] * values[kept].sqrt()).T
    else:
        centred = (pictures.double() - pictures.double().mean(dim=0)) / len(pictures) ** 0.5
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        factor = vectors[:, _above(values, cutoff)].T @ centred
        variance = centred.square().sum(dim=0)
    return factor, (variance - factor.square().sum(dim=0)).clamp(min=0)


def _above(values: torch.Tensor, cutoff: float) -> torch.Tensor:
    """Positions of the eigenvalues above the cut-off, largest first."""
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(f"A covariance has no negative eigenvalue, this one has {float(values[0]):g}")
    smallest = max(cutoff, 1e-14) * values[-1].clamp(min=0)
    return torch.nonzero(values > smallest).flatten().flip(0)


def _covariance(pictures: torch.Tensor) -> torch.Tensor:
    """Biased covariance [D, D] in float64 of pictures [N, D], converted a chunk at a time."""
    step = max(1, CHUNK // pictures.shape[1])
    mean = sum(part.double().sum(dim=0) for part in pictures.split(step)) / len(pictures)
    cov = torch.zeros([len(mean), len(mean)], dtype=torch.float64, device=pictures.device)
    for part in pictures.split(step):
        centred = part.double() - mean
        cov.addmm_(centred.T, centred)
    return cov / len(pictures)


def _spectrum_of_difference(data: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(eigenvalues of Cov(data) - Cov(other), zeros aside, and tr Cov(data)), in the smaller of the dimensions."""
    if data.shape[1] != other.shape[1]:
        raise ValueError(f"Pictures of different sizes: {data.shape[1]} and {other.shape[1]} values")
    if len(data) + len(other) >= data.shape[1]:
        cov = _covariance(data)
        return torch.linalg.eigvalsh(cov - _covariance(other)), cov.trace()
    parts = [(x.double() - x.double().mean(dim=0)) / len(x) ** 0.5 for x in (data, other)]
    both = torch.cat(parts)
    values, vectors = torch.linalg.eigh(both @ both.T)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    signs = torch.cat([root.new_ones(len(data)), -root.new_ones(len(other))])
    return torch.linalg.eigvalsh((root * signs) @ root), parts[0].square().sum()


# Arguments.


def _flat(samples: Any, name: str) -> torch.Tensor:
    """Pictures [N, D] from [N, ...]."""
    samples = torch.as_tensor(samples)
    if samples.ndim < 2 or samples.shape[0] < 2:
        raise ValueError(f"{name} must be two or more pictures [N, ...], not {list(samples.shape)}")
    samples = samples.flatten(1)
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{name} has values that are not finite")
    return samples


def _matrix(cov: Any, name: str) -> torch.Tensor:
    """A symmetric matrix in float64."""
    cov = torch.as_tensor(cov).double()
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"{name} must be a square matrix, not {list(cov.shape)}")
    if not bool(torch.isfinite(cov).all()):
        raise ValueError(f"{name} has values that are not finite")
    return (cov + cov.T) / 2


def _block_index(masks: Any, size: int) -> torch.Tensor:
    """Block of each of `size` values, LongTensor, from masks [B, H, W] or from the integers themselves."""
    masks = torch.as_tensor(masks)
    if masks.ndim == 3:
        covered = masks.bool().sum(dim=0)
        if not bool((covered == 1).all()):
            raise ValueError("Each pixel must be in exactly one of the masks")
        channels, rest = divmod(size, covered.numel())
        if rest:
            raise ValueError(
                f"{size} values are no whole number of channels of {list(masks.shape[1:])} pixels"
            )
        sizes = masks.bool().sum(dim=(1, 2))
        index = masks.to(torch.uint8).argmax(dim=0).flatten().repeat(channels)
    elif masks.shape == (size,) and not masks.is_floating_point() and int(masks.min()) >= 0:
        index = masks.long()
        sizes = torch.bincount(index)
    else:
        raise ValueError(f"masks must be bool [B, H, W] or the block of each of {size} values as integers")
    if len(sizes) < 2 or int(sizes.min()) == 0:
        raise ValueError(
            f"There must be two or more blocks and none may be empty; sizes are {sizes.tolist()}"
        )
    return index


# Command line.


def _grid_option(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    from ssn_ext.config import parse_grid

    try:
        return parse_grid(value)
    except ValueError:
        raise click.BadParameter(f"{value}: expected rows x columns, such as 4x4") from None


@click.command()
@click.option("--data", required=True, metavar="[ZIP|DIR]", help="Pictures, as for train.py")
@click.option("--grid", default="4x4", show_default=True, metavar="HxW", callback=_grid_option, help="Blocks")
@click.option("--max-images", type=click.IntRange(min=2), metavar="INT", help="Use a random part of the data")
@click.option(
    "--tolerance", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Relative gap"
)
@click.option(
    "--cutoff", type=click.FloatRange(0, 1), default=1e-10, show_default=True, help="Least eigenvalue"
)
def main(data: str, grid: list[int], max_images: int | None, tolerance: float, cutoff: float) -> None:
    """The least outside change (ldbr_dist) that a generator of this data's covariance can have."""
    from ssn_ext.blocks import block_masks
    from torch_utils.images import to_float
    from training.dataset import ImageFolderDataset

    try:
        dataset = ImageFolderDataset(data, max_size=max_images)
        pictures = to_float(torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))])))
        masks = block_masks(grid, pictures.shape[2:])
        click.echo(f"{len(pictures)} pictures {list(pictures.shape[1:])}, {grid[0]}x{grid[1]} blocks")
        result = ldbr_floor(
            samples=pictures,
            masks=masks,
            tolerance=tolerance,
            cutoff=cutoff,
            progress=lambda i, high, low: click.echo(
                f"  iteration {i}: {low:.6f} <= floor <= {high:.6f}", err=True
            ),
        )
    except (OSError, ValueError) as err:
        raise click.ClickException(str(err)) from err
    click.echo(f"floor                  {result.floor:.6f}   (certified: at least {result.lower_bound:.6f})")
    click.echo(f"ZCA generator          {result.zca:.6f}")
    click.echo(f"two unrelated pictures {result.unrelated:.6f}")


if __name__ == "__main__":
    main()
