# SPDX-License-Identifier: Apache-2.0
"""The least distortion that block-resampling can have, from a covariance alone (docs/limit.md derives it).

Let y = g(z) have covariance C = A A^T, let P_a keep the values of block a, and let w_a = 1 / (B * values outside a),
so that  ldbr_dist = sum_a w_a E|(1 - P_a)(y - y^a)|^2.  Then, for any generator whatever,

    ldbr_dist >= floor = 2 min sum_a w_a tr (1 - P_a) C_a           over C_a >= 0 with sum_a C_a = C
                       = 2 (top tr C - max sum_a tr Q_a M_a)        over Q_a >= 0 with sum_a Q_a = 1
    C_a = A Q_a A^T,   M_a = w_a L_a L_a^T + (top - w_a) A^T A,   L_a = columns of A^T in block a,   top = max w_a

and a Gaussian generator attains it. The maximum is a minimum-error discrimination. With Q_a = V_a V_a^T the iteration
Q_a <- X^-1 M_a Q_a M_a X^-1, X = (sum_a M_a Q_a M_a)^(1/2), is  V <- polar factor of [M_1 V_1, ..., M_B V_B].
`python -m ssn_ext.floor --data=pictures.zip --grid=4x4` prints the floor of a data set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch

from dnnlib.cli import FiniteRange, user_errors
from ssn_ext.blocks import parse_grid
from ssn_ext.covariance import factorise, kept_covariance

__all__ = ["FloorResult", "efficiency", "kept_covariance", "ldbr_floor"]

COARSE = 1e-6  # the first cut-off: a few hundred eigenvalues, from which the optimum of all of them is near


@dataclass(frozen=True)
class FloorResult:
    """What `ldbr_floor` found; floor, lower_bound, zca and unrelated are on the scale of ldbr_dist.

    The true floor lies in [lower_bound, floor]: a generator of covariance C attains `floor`; `lower_bound` is a
    certificate (a feasible point of the dual problem) and holds for every generator, up to rounding.
    """

    floor: float
    lower_bound: float
    zca: float  # the generator C^(1/2) z, that is Q_a = P_a, the "pretty good measurement"
    unrelated: float  # two independent pictures: the distortion if resampling any block re-drew everything
    success: float  # sum_a tr P_a C_a at the optimum: the variance that blocks give to their own values
    trace: float  # tr C
    discarded: float  # share of tr C below the cut-off; floor and lower_bound account for it
    rank: int  # eigenvalues kept
    iterations: int
    generator: torch.Tensor | None = (
        None  # [D, D]: F z attains the floor; column j is of the block of value j
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
    shares: Sequence[float] | None = None,
    max_iterations: int = 200,
    tolerance: float = 1e-3,
    cutoff: float = 1e-9,
    return_generator: bool = False,
    progress: Callable[[int, float, float], None] | None = None,
) -> FloorResult:
    """Least ldbr_dist of any generator of a given covariance and independent blocks; pixel values in [-1, 1].

    cov         [D, D], covariance of pictures [C, H, W] laid out flat; or, instead, `samples` [N, ...], pictures
                whose (biased) covariance is taken, in the smaller of N and D
    masks       bool [B, H, W], every pixel in exactly one (ssn_ext.blocks.block_masks), or the block of each value
                as integers [D]. Blocks of unequal size are weighed as ldbr_dist weighs them
    shares      of values whose sum of squares is the distance (ssn_ext.spaces): how much of the picture each block
                takes. What changed outside a block is then divided by 1 - its share, not by the number of values
    tolerance   stop when the gap between floor and certificate is this share of the floor
    cutoff      leave eigenvalues below this share of the largest out of the iteration: faster; floor and
                lower_bound hold for the whole covariance still, only further apart
    return_generator    also the [D, D] matrix of a Gaussian generator that attains the floor (kept eigenvalues)
    progress    called as progress(iteration, floor, lower_bound)
    NumPy arrays or tensors; float64 inside, on the device of cov or samples.
    Raises ValueError for shapes that do not fit, masks that are no partition, values that are not finite.
    """
    factor, remainder = factorise(cov, samples, cutoff)
    index = _block_index(masks, factor.shape[1]).to(factor.device)
    order = torch.argsort(index, stable=True)  # block by block
    factor, remainder, sizes = factor[:, order], remainder[order], torch.bincount(index).tolist()
    weights = _weights(sizes, shares)
    lengths = factor.square().sum(dim=1)  # the eigenvalues

    problem, V, iterations = None, None, 0
    for rank in sorted({int((lengths > COARSE * lengths[:1]).sum()), len(factor)}):
        coarser, problem = problem, _Problem(factor[:rank], sizes, weights)
        scale = _Scale(problem, remainder + factor[rank:].square().sum(dim=0))
        V = problem.pretty_good() if coarser is None else _refine(coarser, V, problem)
        V, value, bound, count = _maximise(problem, V, scale, tolerance, max_iterations, progress)
        iterations += count

    trace = problem.trace + scale.left_out
    back = torch.argsort(order)
    return FloorResult(
        floor=scale.floor(value),
        lower_bound=scale.lower_bound(bound),
        zca=scale.floor(problem.value(problem.pretty_good())),
        unrelated=scale.unrelated(),
        success=problem.own_variance(V),
        trace=trace,
        discarded=scale.left_out / trace if trace else 0.0,
        rank=len(factor),
        iterations=iterations,
        generator=(problem.factor.T @ V)[back][:, back] if return_generator else None,
    )


def efficiency(own_floor: float, distortion: float) -> float:
    """own_floor / distortion: 1 for a generator that re-draws blocks as locally as its own covariance allows.

    At most 1 but for sampling error; a distortion of zero is its own floor, hence 1. ValueError for negative numbers.
    """
    if own_floor < 0 or distortion < 0:
        raise ValueError(f"Floor and distortion cannot be negative: got {own_floor} and {distortion}")
    return own_floor / distortion if distortion > 0 else 1.0


def _weights(sizes: Sequence[int], shares: Sequence[float] | None) -> list[float]:
    """The w_a of blocks of so many values, or of these shares of the picture."""
    if shares is None:
        return [1 / (len(sizes) * (sum(sizes) - size)) for size in sizes]
    if len(shares) != len(sizes) or not all(0 < share < 1 for share in shares):
        raise ValueError(
            f"shares must be a number between 0 and 1 for each of {len(sizes)} blocks: got {shares}"
        )
    return [1 / (len(sizes) * (1 - share)) for share in shares]


# The discrimination problem.


class _Problem:
    """Telling M_1..M_B apart, in the k dimensions of the covariance's support. Values are sorted by block.

    factor      A^T [k, D], A^T A = diag(spectrum); cut into the L_a [k, size of a]
    weights     w_a; top = max w_a, which makes every M_a >= 0
    V           a measurement [k, D], V V^T = 1, cut likewise: Q_a = V_a V_a^T
    """

    def __init__(self, factor: torch.Tensor, sizes: Sequence[int], weights: Sequence[float]):
        self.factor = factor
        self.sizes = list(sizes)
        self.spectrum = factor.square().sum(dim=1)
        self.trace = float(self.spectrum.sum())
        self.weights = list(weights)
        self.top = max(weights)

    def blocks(self, V: torch.Tensor) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
        """(w_a, L_a, V_a) of every block."""
        cut = (x.split(self.sizes, dim=1) for x in (self.factor, V))
        return list(zip(self.weights, *cut, strict=True))

    def pretty_good(self) -> torch.Tensor:
        """Q_a = P_a, where C_a = C^(1/2) P_a C^(1/2): the ZCA generator."""
        return _polar(self.factor / self.spectrum.sqrt()[:, None])

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """[M_1 V_1, ..., M_B V_B]."""
        parts = []
        for w, L, Va in self.blocks(V):
            part = w * (L @ (L.T @ Va))
            if w != self.top:
                part += (self.top - w) * self.spectrum[:, None] * Va
            parts.append(part)
        return torch.cat(parts, dim=1)

    def value(self, V: torch.Tensor) -> float:
        """sum_a tr Q_a M_a."""
        return float((V * self.apply(V)).sum())

    def own_variance(self, V: torch.Tensor) -> float:
        """sum_a tr P_a C_a."""
        return sum(float((L.T @ Va).square().sum()) for _, L, Va in self.blocks(V))

    def dual_value(self, K: torch.Tensor) -> float:
        """Trace of a matrix >= every M_a, made from the guess K [k, k]: no measurement has a larger value.

        With low = min w_a and K' = K - (top - low) A^T A, feasible means K_a = K' + (w_a - low) A^T A >= w_a L_a L_a^T.
        Add to K' what it lacks: for the eigenpairs s, v of w_a L_a^T K_a^-1 L_a,

            w_a L_a L_a^T - K_a  <=  sum over s > 1 of (1 - 1/s) w_a (L_a v)(L_a v)^T

        so that K' plus the right-hand sides of all a is feasible.
        """
        low = min(self.weights)
        gram = torch.diag(self.spectrum)
        base = _make_positive((K + K.T) / 2 - (self.top - low) * gram, self.spectrum)
        total = float(base.trace()) + (self.top - low) * self.trace
        for weight in sorted(set(self.weights)):
            root = torch.linalg.cholesky(base + (weight - low) * gram)
            for w, L, Y in self.blocks(torch.linalg.solve_triangular(root, self.factor, upper=False)):
                if w == weight:
                    s, v = torch.linalg.eigh(w * (Y.T @ Y))
                    total += w * float(((L @ v).square().sum(dim=0) * (1 - 1 / s.clamp(min=1))).sum())
        return total


class _Scale:
    """From values of a _Problem to distortions of the whole covariance: `remainder` [D] is the variance left out, R.

    Above: all of R given to the one block that pays least for it. Below: a generator of covariance C is the sum of
    its parts of covariance C - R and R, and by Minkowski's inequality the roots of their values add up to at least
    the root of its own.
    """

    def __init__(self, problem: _Problem, remainder: torch.Tensor):
        self.problem = problem
        self.left_out = float(remainder.sum())
        self.costs = self._one_block_costs(remainder)  # of R

    def _one_block_costs(self, variance: torch.Tensor) -> list[float]:
        """For each a: 2 w_a tr (1 - P_a) Cov, from the variance of each value [D]."""
        total = float(variance.sum())
        parts = variance.split(self.problem.sizes)
        return [
            2 * w * max(total - float(x.sum()), 0.0) for w, x in zip(self.problem.weights, parts, strict=True)
        ]

    def unrelated(self) -> float:
        return sum(self.costs) + sum(self._one_block_costs(self.problem.factor.square().sum(dim=0)))

    def floor(self, value: float) -> float:
        return max(2 * (self.problem.top * self.problem.trace - value), 0.0) + min(self.costs)

    def lower_bound(self, dual_value: float) -> float:
        top = self.problem.top
        most = (dual_value**0.5 + (top * self.left_out) ** 0.5) ** 2
        return max(2 * (top * (self.problem.trace + self.left_out) - most), 0.0)


def _maximise(
    problem: _Problem,
    V: torch.Tensor,
    scale: _Scale,
    tolerance: float,
    max_iterations: int,
    progress: Callable[[int, float, float], None] | None,
) -> tuple[torch.Tensor, float, float, int]:
    """Iterates from V: (measurement, its value, upper bound of all values, iterations)."""
    bound = float("inf")
    for count in range(max_iterations + 1):
        W = problem.apply(V)
        value = float((V * W).sum())
        following = _polar(W)
        bound = min(bound, problem.dual_value(W @ following.T))  # X; at the optimum it is feasible itself
        if progress is not None:
            progress(count, scale.floor(value), scale.lower_bound(bound))
        cost = problem.top * problem.trace - value
        if bound - value <= tolerance * cost + 1e-12 * value:
            break
        if count < max_iterations:
            V = following
    return V, value, bound, count


def _refine(coarse: _Problem, V: torch.Tensor, fine: _Problem) -> torch.Tensor:
    """A measurement for a problem with more eigenvalues: one step of the iteration, from V.

    [L_1 F_1, ..., L_B F_B] depends on V only by the generator's diagonal blocks F_a = L_a^T V_a, which exist at any
    number of eigenvalues. They are made positive semidefinite (a rotation of V_a, which leaves Q_a alone), and
    a little of the pretty good measurement, which is so too, rules out that directions are lost.
    """
    parts = []
    start = fine.pretty_good()
    for (_, small, Va), (_, L, Za) in zip(coarse.blocks(V), fine.blocks(start), strict=True):
        F = small.T @ Va
        squares, vectors = torch.linalg.eigh(F @ F.T)
        F = (vectors * squares.clamp(min=0).sqrt()) @ vectors.T
        parts.append(L @ (F + 1e-3 * (L.T @ Za)))
    return _polar(torch.cat(parts, dim=1))


# Linear algebra.


def _polar(W: torch.Tensor) -> torch.Tensor:
    """(W W^T)^(-1/2) W for W [k, D] of full row rank; its rows are orthonormal to rounding.

    W W^T has the squares of W's singular values, so the small ones drown in rounding. A pass leaves the polar factor
    as it is and the condition far better: the next one sees them.
    """
    for _ in range(8):
        gram = W @ W.T
        error = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if gram.numel() == 0 or float(error.abs().max()) < 1e-6:
            return W - 0.5 * (error @ W)  # a Newton-Schulz step squares the error
        squares, vectors = torch.linalg.eigh(gram)
        scales = squares.clamp(min=1e-15 * float(squares[-1])).rsqrt()
        W = ((vectors * scales) @ vectors.T) @ W
    raise FloatingPointError("The iteration lost a direction to rounding: use a larger cut-off")


def _make_positive(K: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """A positive definite matrix >= K, hardly larger than K if K is nearly positive definite."""
    if K.numel() == 0:
        return K
    least = 1e-10 * float(K.diagonal().sum() / spectrum.sum())
    lifted = K + max(least, 0.0) * torch.diag(spectrum)
    if int(torch.linalg.cholesky_ex(lifted).info) == 0:
        return lifted
    roots = spectrum.sqrt()
    values, vectors = torch.linalg.eigh(K / roots / roots[:, None])  # seen from the covariance
    values = values.clamp(min=1e-6 * float(values.abs().max()))
    return ((vectors * values) @ vectors.T) * roots * roots[:, None]


def _block_index(masks: Any, size: int) -> torch.Tensor:
    """Block of each of `size` values, LongTensor, from masks [B, H, W] or from the integers themselves."""
    masks = torch.as_tensor(masks)
    if masks.ndim == 3 and masks.dtype == torch.bool:
        if not bool((masks.sum(dim=0) == 1).all()):
            raise ValueError("Every pixel must be in exactly one of the masks")
        channels, rest = divmod(size, masks[0].numel())
        if rest:
            raise ValueError(
                f"{size} values are no whole number of channels of {list(masks.shape[1:])} pixels"
            )
        index = masks.to(torch.uint8).argmax(dim=0).flatten().repeat(channels)
        num_blocks = len(masks)
    elif masks.shape == (size,) and not masks.is_floating_point() and int(masks.min()) >= 0:
        index = masks.long()
        num_blocks = int(index.max()) + 1
    else:
        raise ValueError(f"masks must be bool [B, H, W] or the block of each of {size} values, as integers")
    sizes = torch.bincount(index, minlength=num_blocks)
    if num_blocks < 2 or int(sizes.min()) == 0:
        raise ValueError(f"There must be two or more blocks, none empty; they have {sizes.tolist()} values")
    return index


# Command line.


def _grid_option(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        return parse_grid(value)
    except ValueError as err:
        raise click.BadParameter(str(err)) from None


@click.command()
@click.option("--data", required=True, metavar="[ZIP|DIR]", help="Pictures, as for train.py, or 'demo'")
@click.option("--grid", default="4x4", show_default=True, metavar="HxW", callback=_grid_option, help="Blocks")
@click.option("--max-images", type=click.IntRange(min=2), metavar="INT", help="Use a random part of the data")
@click.option(
    "--distortion",
    type=click.Choice(["mse", "emd", "features"]),
    default="mse",
    show_default=True,
    help="Of pixels, of the colours in each block, or of perceptual features at their positions",
)
@click.option("--detector", metavar="NAME", help="Whose features  [default: efficientnet-lite0-128]")
@click.option("--tolerance", type=FiniteRange(min=0), default=1e-3, show_default=True, help="Relative gap")
@click.option("--cutoff", type=FiniteRange(0, 1), default=1e-9, show_default=True, help="Least eigenvalue")
@user_errors()
def main(
    data: str,
    grid: list[int],
    max_images: int | None,
    distortion: str,
    detector: str | None,
    tolerance: float,
    cutoff: float,
) -> None:
    """The least outside change (ldbr_dist) of any generator that has the covariance of this data."""
    from ssn_ext import spaces
    from training.configs import demo_file
    from training.dataset import ImageFolderDataset

    if detector is not None and distortion != "features":
        raise click.UsageError("--detector is for --distortion=features")

    def progress(iteration: int, high: float, low: float) -> None:
        click.echo(f"  iteration {iteration}: {low:.6f} <= floor <= {high:.6f}", err=True)

    dataset = ImageFolderDataset(demo_file("lorelei32.zip") if data == "demo" else data, max_size=max_images)
    space = spaces.open_space(distortion, grid, dataset.image_shape, detector or "efficientnet-lite0-128")
    click.echo(f"{len(dataset)} pictures {dataset.image_shape}, {grid[0]}x{grid[1]} blocks, {distortion}")
    result, share, _space = spaces.floor_of(
        space,
        map(space.values, spaces.real_pictures(dataset, len(dataset))),
        None if distortion == "mse" else spaces.MOST_VALUES,
        tolerance=tolerance,
        cutoff=cutoff,
        progress=progress,
    )
    if share < 1:
        click.echo(f"of principal components with {share:.4f} of the variance: a lower bound for the whole")
    click.echo(f"floor                  {result.floor:.6f}   (certified: at least {result.lower_bound:.6f})")
    click.echo(f"ZCA generator          {result.zca:.6f}")
    click.echo(f"two unrelated pictures {result.unrelated:.6f}")


if __name__ == "__main__":
    main()
