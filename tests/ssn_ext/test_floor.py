# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.floor against closed forms, other solvers of the same problem, and simulated generators."""

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from ssn_ext import covariance
from ssn_ext.blocks import block_masks
from ssn_ext.floor import efficiency, kept_covariance, ldbr_floor, main

TIGHT = dict(tolerance=1e-7, max_iterations=3000, cutoff=1e-13)
UNEQUAL = [0, 0, 0, 0, 1, 1, 2, 2, 2]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_cov(size, seed=0, rank=None):
    A = torch.randn([size, rank or 2 * size], dtype=torch.float64, generator=rng(seed))
    return A @ A.T / A.shape[1]


def root(C):
    values, vectors = torch.linalg.eigh(C)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def index_of(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def price(index):
    """[B, D]: what ldbr_dist pays per squared change of a value when a block is re-drawn."""
    outside = index[None] != torch.arange(int(index.max()) + 1)[:, None]
    return outside.double() / (outside.sum(dim=1, keepdim=True) * len(outside))


def simulate(generator, index, size, count, seed=0):
    """ldbr_dist of y = generator(z), z [N, size] cut into equal blocks of latents: by resampling, sample by sample."""
    num_blocks = int(index.max()) + 1
    z, fresh = torch.randn([2, count, size], dtype=torch.float64, generator=rng(seed))
    y = generator(z)
    total = torch.zeros([count], dtype=torch.float64)
    for a, cells in enumerate(torch.arange(size).chunk(num_blocks)):
        edited = z.clone()
        edited[:, cells] = fresh[:, cells]
        change = (generator(edited) - y) ** 2
        total += change[:, index != a].mean(dim=1) / num_blocks
    return float(total.mean()), float(total.std()) / count**0.5, y


# Closed forms.


def test_independent_blocks_have_floor_zero():
    C = torch.block_diag(random_cov(3, 1), random_cov(3, 2), random_cov(3, 3))
    result = ldbr_floor(C, index_of([3, 3, 3]))
    assert result.floor == pytest.approx(0, abs=1e-12) and result.lower_bound == 0
    assert result.success == pytest.approx(float(C.trace()))


@pytest.mark.parametrize("num_blocks", [2, 5])
def test_one_direction_shared_by_all_values(num_blocks):
    # Whatever block owns it, all other values change by 2 sigma^2 when it is drawn again: once in B resamplings.
    size = 3 * num_blocks
    result = ldbr_floor(torch.full([size, size], 0.7), index_of([3] * num_blocks), **TIGHT)
    assert result.floor == pytest.approx(2 * 0.7 / num_blocks)
    assert result.lower_bound == pytest.approx(result.floor)
    assert result.unrelated == pytest.approx(2 * 0.7)
    assert result.rank == 1


@pytest.mark.parametrize("sizes", [[2, 2], [4, 4], [2, 5], [1, 6]])
def test_two_blocks_agree_with_helstrom(sizes):
    # min over 0 <= Q <= 1 of tr Q D_0 + tr (1 - Q) D_1  =  tr D_1 - tr (D_1 - D_0)_+
    index = index_of(sizes)
    C = random_cov(len(index), 4)
    cost = [root(C) @ torch.diag(w) @ root(C) for w in price(index)]
    gain = torch.linalg.eigvalsh(cost[1] - cost[0]).clamp(min=0).sum()
    expected = 2 * float(cost[1].trace() - gain)
    result = ldbr_floor(C, index, **TIGHT)
    assert result.floor == pytest.approx(expected, rel=1e-6)
    assert result.lower_bound == pytest.approx(expected, rel=1e-5)


def test_equally_correlated_values_are_best_served_by_zca():
    # C = (1 - r) 1 + r J over B single values is symmetric under all permutations; then Q_a = P_a is optimal.
    B, r = 6, 0.4
    C = (1 - r) * torch.eye(B, dtype=torch.float64) + r
    low, high = (1 - r) ** 0.5, (1 - r + B * r) ** 0.5
    diagonal = low + (high - low) / B  # of C^(1/2)
    result = ldbr_floor(C, torch.arange(B), **TIGHT)
    assert result.floor == pytest.approx(2 * (B - B * diagonal**2) / (B * (B - 1)), rel=1e-9)
    assert result.zca == pytest.approx(result.floor, rel=1e-9)


def test_all_pictures_alike():
    result = ldbr_floor(torch.zeros([8, 8]), index_of([4, 4]), return_generator=True)
    assert (result.floor, result.lower_bound, result.unrelated, result.rank) == (0, 0, 0, 0)
    assert result.generator.shape == (8, 8)


# The same number by other means.


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [4, 2, 3]])
def test_equals_the_literal_iteration(sizes):
    """Q_a <- X^-1 M_a Q_a M_a X^-1 with full matrices, M_a = C^(1/2) (top - w_a (1 - P_a)) C^(1/2)."""
    index = index_of(sizes)
    C = random_cov(len(index), 5)
    w = price(index)
    M = torch.stack([root(C) @ torch.diag(w.max() - row) @ root(C) for row in w])
    Q = torch.stack([torch.diag((index == a).double()) for a in range(len(w))])
    for _ in range(3):
        X = torch.linalg.inv(root((M @ Q @ M).sum(dim=0)))
        Q = X @ M @ Q @ M @ X
    expected = 2 * float(w.max() * C.trace() - torch.einsum("aij,aji->", Q, M))
    result = ldbr_floor(C, index, tolerance=0, max_iterations=3, cutoff=0)
    assert result.iterations == 3
    assert result.floor == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "sizes, rank", [([3, 3, 3], None), ([4, 2, 3], None), ([4, 4, 4], 5), ([6, 1, 2], 4)]
)
def test_no_decomposition_found_by_descent_is_better(sizes, rank):
    """Plain gradient descent over C_a = A Q_a A^T with full-rank Q_a ends at the floor, for unequal blocks too."""
    index = index_of(sizes)
    C = random_cov(len(index), 6, rank)
    result = ldbr_floor(C, index, **TIGHT)
    values, vectors = torch.linalg.eigh(C)
    A = (vectors * values.clamp(min=0).sqrt())[:, values > 1e-10]
    k = A.shape[1]
    w = price(index)
    raw = torch.randn([k, len(w) * k], dtype=torch.float64, generator=rng(1)).requires_grad_()
    descent = torch.optim.LBFGS([raw], max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def cost():
        V = torch.linalg.solve_triangular(torch.linalg.cholesky(raw @ raw.T), raw, upper=False)  # V V^T = 1
        spread = (A @ V).reshape(len(index), len(w), k).square().sum(dim=2)  # [D, B]: diagonals of the C_a
        return 2 * (w.T * spread).sum()

    def closure():
        descent.zero_grad()
        loss = cost()
        loss.backward()
        return loss

    descent.step(closure)
    reached = float(cost().detach())
    assert result.lower_bound <= result.floor + 1e-12
    assert reached >= result.lower_bound - 1e-12
    assert reached == pytest.approx(result.floor, rel=1e-4)
    assert result.gap <= 1e-4 * result.floor


def test_certificate_holds_at_every_iteration():
    C = random_cov(12, 7, rank=9)
    best = ldbr_floor(C, index_of([3] * 4), **TIGHT)
    seen = []
    ldbr_floor(C, index_of([3] * 4), tolerance=1e-6, progress=lambda *args: seen.append(args))
    assert [count for count, _, _ in seen] == list(range(len(seen))) and len(seen) > 2
    for _, high, low in seen:
        assert low <= best.floor * (1 + 1e-9) and high >= best.lower_bound
    highs = [high for _, high, _ in seen]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(highs, highs[1:], strict=False))


@pytest.mark.parametrize("index", [index_of([3] * 4), index_of([5, 4, 2, 1])])
def test_permuting_blocks_and_values_changes_nothing(index):
    C = random_cov(12, 8)
    order = torch.randperm(12, generator=rng(3))
    renamed = torch.tensor([2, 0, 3, 1])[index]
    first = ldbr_floor(C, index, **TIGHT)
    second = ldbr_floor(C[order][:, order], renamed[order], **TIGHT)
    assert first.floor == pytest.approx(second.floor, rel=1e-6)
    assert first.zca == pytest.approx(second.zca, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_zca_is_at_most_twice_the_floor(seed):
    result = ldbr_floor(random_cov(12, seed, rank=3 + 3 * seed), index_of([3] * 4))
    assert result.floor <= result.zca * (1 + 1e-12)
    assert result.zca <= 2 * result.floor


def test_floor_is_homogeneous_and_convex():
    a, b = random_cov(9, 20, rank=4), random_cov(9, 21, rank=4)
    at = [ldbr_floor(C, torch.tensor(UNEQUAL), **TIGHT).floor for C in (a, b, a + b, 3 * a)]
    assert at[2] <= at[0] + at[1]
    assert at[3] == pytest.approx(3 * at[0])


# Generators.


@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 2, 3]])
def test_the_optimum_as_a_generator_attains_the_floor(sizes):
    index = index_of(sizes)
    C = random_cov(9, 9, rank=7)
    result = ldbr_floor(C, index, return_generator=True, **TIGHT)
    F = result.generator
    assert torch.allclose(F @ F.T, C)
    changes = torch.stack(
        [2 * F[:, index == a].square().sum(dim=1) for a in range(3)]
    )  # E (y - y^a)^2, [B, D]
    assert float((price(index) * changes).sum()) == pytest.approx(result.floor)
    own = sum(F[index == a][:, index == a].square().sum() for a in range(3))
    assert result.success == pytest.approx(float(own))


def test_the_optimum_resampled():
    index = torch.tensor([0, 1, 2] * 3)  # not in the order of blocks, as pixels of pictures are not
    result = ldbr_floor(random_cov(9, 10), index, return_generator=True, **TIGHT)
    latents = torch.argsort(index, stable=True)  # simulate() cuts its latents into consecutive blocks
    mean, error, _ = simulate(lambda z: z @ result.generator[:, latents].T, index, size=9, count=20000)
    assert mean == pytest.approx(result.floor, abs=4 * error)
    assert 0.95 < efficiency(result.floor, mean) < 1.05


@pytest.mark.parametrize("frequency", [0.3, 1.0, 3.0])
def test_nonlinear_generators_respect_the_floor_of_their_own_covariance(frequency):
    index = index_of([4, 4, 4])
    inner = frequency * torch.randn([12, 30], dtype=torch.float64, generator=rng(11))
    outer = torch.randn([30, 12], dtype=torch.float64, generator=rng(12))
    mean, error, y = simulate(lambda z: torch.sin(z @ inner) @ outer, index, size=12, count=5000)
    own = ldbr_floor(samples=y, masks=index)
    assert mean - 5 * error > own.floor
    assert own.unrelated > 0.9 * mean


# Covariance, cut-off, masks, data types.


@pytest.mark.parametrize("count", [20, 400])
def test_samples_equal_their_covariance(count):
    pictures = torch.randn([count, 3, 4, 4], generator=rng(13)) @ torch.randn([4, 4], generator=rng(14))
    masks = block_masks([2, 2], [4, 4])
    cov = np.cov(pictures.flatten(1).double().numpy(), rowvar=False, bias=True)
    assert np.allclose(covariance.covariance(pictures), cov)
    from_samples = ldbr_floor(samples=pictures.numpy(), masks=masks.numpy(), return_generator=True)
    from_cov = ldbr_floor(cov, masks, return_generator=True)
    assert from_samples.floor == pytest.approx(from_cov.floor, rel=1e-5)
    assert from_samples.rank == from_cov.rank == min(count - 1, 48)
    assert torch.allclose(from_samples.generator @ from_samples.generator.T, torch.from_numpy(cov))


def test_masks_are_the_block_of_each_value():
    masks = block_masks([2, 3], [4, 6])
    C = random_cov(48, 15)
    rows, columns = torch.meshgrid(torch.arange(4) // 2, torch.arange(6) // 2, indexing="ij")
    index = (rows * 3 + columns).flatten().repeat(2)  # two channels
    assert ldbr_floor(C, masks) == ldbr_floor(C, index)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [7, 2, 4, 3]])
@pytest.mark.parametrize("cutoff", [2e-2, 2e-4])
def test_floor_and_bound_hold_for_the_whole_covariance_whatever_is_cut_off(sizes, cutoff):
    scales = torch.logspace(0, -3, 16, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn([16, 16], dtype=torch.float64, generator=rng(16))).Q
    C = (basis * scales**2) @ basis.T
    whole = ldbr_floor(C, index_of(sizes), **TIGHT)
    part = ldbr_floor(C, index_of(sizes), tolerance=1e-6, max_iterations=1000, cutoff=cutoff)
    assert part.rank == int((scales**2 > cutoff).sum()) < whole.rank == 16
    assert part.lower_bound <= whole.floor and whole.lower_bound <= part.floor
    lost = float((scales**2)[part.rank :].sum() / (scales**2).sum())
    assert part.discarded == pytest.approx(lost)
    assert part.trace == pytest.approx(whole.trace) and part.unrelated == pytest.approx(whole.unrelated)


def test_small_eigenvalues_are_reached_through_the_coarse_problem():
    # More than a factor of 1e6 between the eigenvalues: two stages, of which the second starts from the first.
    scales = torch.logspace(0, -4, 24, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn([24, 24], dtype=torch.float64, generator=rng(17))).Q
    seen = []
    result = ldbr_floor(
        (basis * scales**2) @ basis.T,
        index_of([12, 12]),
        cutoff=1e-12,
        tolerance=1e-6,
        max_iterations=2000,
        progress=lambda *args: seen.append(args),
    )
    assert [count for count, _, _ in seen].count(0) == 2
    assert result.rank == 24 and result.gap <= 1e-5 * result.floor


# Beside the floor.


def test_efficiency():
    assert efficiency(0.01, 0.04) == 0.25
    assert efficiency(0.0, 0.0) == 1.0
    with pytest.raises(ValueError, match="negative"):
        efficiency(-0.1, 1)


def test_kept_covariance_is_one_for_equal_and_for_larger_covariances():
    C = random_cov(6, 18)
    assert kept_covariance(C, C) == pytest.approx(1)
    assert kept_covariance(C + random_cov(6, 19, rank=2), C) == pytest.approx(1)
    assert kept_covariance(torch.zeros(6, 6), C) == pytest.approx(0)
    assert kept_covariance(0.3 * C, C) == pytest.approx(0.3)


def test_kept_covariance_loses_exactly_the_share_of_what_is_dropped():
    C = random_cov(6, 18)
    values, vectors = torch.linalg.eigh(C)
    dropped = C - values[2] * torch.outer(vectors[:, 2], vectors[:, 2])
    assert kept_covariance(dropped, C) == pytest.approx(1 - float(values[2] / values.sum()))
    part = random_cov(6, 19, rank=2)  # an independent part of the picture, in directions of its own
    assert kept_covariance(C, C + part) == pytest.approx(float(C.trace() / (C + part).trace()))
    # Excess in one direction does not make up for another: the ties between values are lost here, their variance not.
    assert kept_covariance(torch.eye(4), torch.ones(4, 4)) == pytest.approx(1 / 4)


@pytest.mark.parametrize("size", [8, 300])
def test_kept_covariance_of_samples_equals_that_of_their_covariances(size):
    made, data = torch.randn([2, 50, size], generator=rng(20))
    made = (0.5 * made + 1)[:30]
    from_cov = kept_covariance(covariance.covariance(made), covariance.covariance(data))
    assert kept_covariance(samples_generator=made, samples_data=data) == pytest.approx(from_cov)
    assert 0 < from_cov < 0.6


# Errors and the command.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(masks=torch.zeros(4, dtype=torch.long)), "either a covariance or samples"),
        (dict(cov=torch.eye(4), masks=torch.tensor([0, 0, 0, 0])), "two or more blocks"),
        (dict(cov=torch.eye(4), masks=torch.tensor([0, 2, 0, 2])), "none empty"),
        (dict(cov=torch.eye(4), masks=torch.tensor([0, 1, 0])), "the block of each of 4 values"),
        (dict(cov=torch.eye(4), masks=torch.ones([2, 2, 2], dtype=torch.bool)), "exactly one"),
        (dict(cov=torch.eye(6), masks=block_masks([2, 2], [2, 2])), "channels"),
        (dict(cov=torch.ones(4, 3), masks=torch.tensor([0, 1, 0, 1])), "square"),
        (dict(cov=-torch.eye(4), masks=torch.tensor([0, 1, 0, 1])), "negative eigenvalue"),
        (dict(cov=torch.eye(4) * torch.nan, masks=torch.tensor([0, 1, 0, 1])), "not finite"),
        (dict(samples=torch.ones(1, 4), masks=torch.tensor([0, 1, 0, 1])), "two or more pictures"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ldbr_floor(**arguments)


def test_kept_covariance_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="different sizes"):
        kept_covariance(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match="either two"):
        kept_covariance(torch.eye(3), samples_data=torch.eye(3))
    with pytest.raises(ValueError, match="nothing to keep"):
        kept_covariance(torch.eye(3), torch.zeros(3, 3))


def test_the_command_prints_the_floor(tmp_path):
    pixels = torch.randint(0, 256, [12, 4, 4, 3], dtype=torch.uint8, generator=rng(21)).numpy()
    for i, picture in enumerate(pixels):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    outcome = CliRunner().invoke(main, [f"--data={tmp_path}", "--grid=2x2"])
    assert outcome.exit_code == 0, outcome.output
    values = pixels.transpose(0, 3, 1, 2) / 127.5 - 1
    expected = ldbr_floor(samples=torch.from_numpy(values), masks=block_masks([2, 2], [4, 4]))
    assert f"{expected.floor:.6f}" in outcome.output and f"{expected.unrelated:.6f}" in outcome.output
    assert "rows x columns" in CliRunner().invoke(main, [f"--data={tmp_path}", "--grid=2"]).output
    assert CliRunner().invoke(main, ["--data=nowhere.zip"]).exit_code == 1
