# SPDX-License-Identifier: Apache-2.0
"""Latents at several scales: the exact start, independence, which layers follow which grid, names and numbers."""

import math

import numpy as np
import pytest
import torch

from ssn_ext import blocks, distortion, grids, metric, resampling, transfer
from ssn_ext.loss import DistortionRegularizedLoss, block_path_lengths, estimate_distortion
from ssn_ext.networks import SpatialGenerator
from training.networks import Generator

GRIDS, SPLITS = [[2, 2], [4, 4]], [8]


def plain_generator(architecture="skip", resolution=32, c_dim=0):
    """A small random StyleGAN2 whose noise, biases and w_avg are not zero."""
    torch.manual_seed(0)
    sides = dict(img_resolution=resolution)
    if not isinstance(resolution, int):
        sides = dict(img_resolution=max(resolution), img_shape=resolution)
    G = Generator(
        z_dim=16, c_dim=c_dim, w_dim=24, img_channels=3, mapping_kwargs=dict(num_layers=2), **sides,
        synthesis_kwargs=dict(channel_base=256, channel_max=16, architecture=architecture),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.3)
            if name.endswith(".bias"):
                p.add_(torch.randn_like(p) * 0.1)
        G.mapping.w_avg.normal_()
    return G.eval().requires_grad_(False)


def spatial_generator(resolution=16, encoder_init="exact", **grid):
    """A small random network whose encoder acts; `grid`: latent_grid, or latent_grids and grid_splits."""
    torch.manual_seed(1)
    grid = grid or dict(latent_grids=GRIDS, grid_splits=SPLITS)
    count = sum(grids.block_counts(grid.get("latent_grids") or grid["latent_grid"]))
    G = SpatialGenerator(
        z_dim=6 * count, c_dim=0, w_dim=8 * count, img_resolution=resolution, img_channels=3, **grid,
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(
            channel_base=128, channel_max=8, encoder_init=encoder_init,
            encoder_kwargs=dict(channels=4, max_resolution=8),
        ),
    )  # fmt: skip
    with torch.no_grad():
        for name, p in G.named_parameters():
            if "encoder_style" in name:
                p.normal_()
            if name.endswith("noise_strength"):
                p.fill_(0.2)
    return G.eval().requires_grad_(False)


def constant(vectors, of):
    """One vector [N, C] a grid, the same in all of its blocks -> flat latents."""
    counts = grids.block_counts(of)
    parts = [v[:, :, None].expand(-1, -1, count) for v, count in zip(vectors, counts, strict=True)]
    return torch.cat(parts, dim=2).flatten(1)


def assert_close(got, want):
    assert (got - want).abs().max() <= 1e-4 * want.std()


# --- the exact start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize(
    ("of", "splits"),
    [
        ([[4, 4], [8, 8]], None),  # 16
        ([[2, 2], [4, 4], [8, 8]], None),  # 8, 16
        ([[1, 1], [8, 8]], [32]),
        ([[2, 3], [4, 6]], [8]),
    ],
)
def test_start_is_stylegan2_with_style_mixing_at_the_splits(architecture, of, splits):
    """One vector a grid: the plain generator's picture of ws that change vector where the layers change grid."""
    G = plain_generator(architecture)
    S = transfer.from_stylegan2(G, latent_grid=of, grid_splits=splits)
    vectors = torch.randn(len(of), 2, G.z_dim)
    ws = G.mapping(vectors[0], None)
    for split, vector in zip(S.grid_splits, vectors[1:], strict=True):
        first = 2 * int(math.log2(split / 4))  # ws of b4: 1 and torgb's; two for each further resolution
        ws[:, first:] = G.mapping(vector, None)[:, first:]
    want = G.synthesis(ws, noise_mode="const")
    assert_close(S(constant(vectors, of), None, noise_mode="const"), want)
    same = constant([vectors[0]] * len(of), of)
    assert_close(S(same, None, noise_mode="const"), G(vectors[0], None, noise_mode="const"))
    cut = dict(truncation_psi=0.6, truncation_cutoff=3, noise_mode="const")
    assert_close(S(same, None, **cut), G(vectors[0], None, **cut))


def test_conditional_and_wide_start():
    G = plain_generator(c_dim=3, resolution=[32, 48])
    S = transfer.from_stylegan2(G, latent_grid=[[2, 3], [4, 6]])
    assert S.grid_splits == [8] and S.z_dim == 16 * 30 and S.latent_grid == [1, 30]
    z, c = torch.randn(3, G.z_dim), torch.eye(3)
    assert_close(S(constant([z, z], S.latent_grids), c, noise_mode="const"), G(z, c, noise_mode="const"))


def test_start_from_a_network_with_one_grid():
    """Every tensor goes on, the encoder's too; where all blocks are alike the picture is the single grid's."""
    S = transfer.from_stylegan2(plain_generator(), latent_grid=[4, 4])
    S.synthesis.b8.encoder.conv0.weight.add_(1)
    T = transfer.from_stylegan2(plain_generator(), latent_grid=[[4, 4], [8, 8]])
    rows = transfer.spatial_from(S, T)
    assert rows and S.state_dict().keys() == T.state_dict().keys()
    for (name, a), b in zip(S.state_dict().items(), T.state_dict().values(), strict=True):
        if name == "mapping.w_avg":
            torch.testing.assert_close(b.reshape(24, 80), a.reshape(24, 16)[:, :1].expand(-1, 80))
        else:
            assert torch.equal(a, b), name
    z = torch.randn(2, S.block_z_dim)
    assert_close(
        T(constant([z, z], T.latent_grids), None, noise_mode="const"),
        S(constant([z], [4, 4]), None, noise_mode="const"),
    )


# --- independence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder_init", ["exact", "random", "none"])
def test_redrawing_all_blocks_of_all_grids_is_a_fresh_sample(encoder_init):
    """In any order, bit for bit; and the edit of z is the edit of ws."""
    G = spatial_generator(encoder_init=encoder_init)
    z, fresh = torch.randn(2, 2, G.z_dim)
    want = G(fresh, None, noise_mode="const")
    assert not torch.equal(want, G(z, None, noise_mode="const"))
    rnd = np.random.RandomState(0)
    for _ in range(2):
        edited, ws = z, G.mapping(z, None)
        for block in rnd.permutation(20).tolist():
            edited = blocks.replace_blocks(edited, fresh, [block], GRIDS)
            ws = blocks.replace_blocks(ws, G.mapping(fresh, None), [block], GRIDS)
            assert torch.equal(G.mapping(edited, None), ws)
        assert torch.equal(edited, fresh)
        assert torch.equal(G(edited, None, noise_mode="const"), want)
        assert torch.equal(G.synthesis(ws, noise_mode="const"), want)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_a_fine_block_changes_nothing_below_the_split(architecture):
    """Outputs of every layer, encoder branch and block: bit for bit the same exactly where the input is coarse."""
    S = transfer.from_stylegan2(plain_generator(architecture), latent_grid=[[2, 2], [4, 4]], grid_splits=[16])
    for name, p in S.named_parameters():
        if "encoder_style" in name:
            p.normal_()
    seen = {}
    for name, module in S.synthesis.named_modules():
        if name.count(".") == 1:
            module.register_forward_hook(
                lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out.clone())
            )
    z, fresh = torch.randn(2, 2, S.z_dim)
    for changed, coarse in [([4 + 5], False), ([2], True)]:
        seen.clear()
        for each in [z, blocks.replace_blocks(z, fresh, changed, S.latent_grids)]:
            S(each, None, noise_mode="const")
        for name, (before, after) in seen.items():
            block, layer = name.split(".")
            below = int(block[1:]) < 16 or (block == "b16" and layer in ("conv0", "skip"))
            if layer == "encoder":  # these read latents only
                assert torch.equal(before, after) == (below != coarse), name
            else:
                assert torch.equal(before, after) == (below and not coarse), name
        assert {"b8.conv1", "b16.conv0", "b16.conv1", "b16.encoder"} <= seen.keys()


def test_one_of_several_is_one_grid():
    """[[4, 4]] has the tensors and the picture of [4, 4], whose constructor arguments stay as they were."""
    one = spatial_generator(latent_grid=[4, 4])
    listed = spatial_generator(latent_grids=[[4, 4]])
    assert list(one.state_dict()) == list(listed.state_dict())
    z = torch.randn(2, one.z_dim)
    assert torch.equal(one(z, None, noise_mode="const"), listed(z, None, noise_mode="const"))
    for module in [one, one.mapping, one.synthesis]:
        assert not {"latent_grids", "grid_splits"} & set(module.init_kwargs)
    assert one.latent_grids == [one.latent_grid] == [[4, 4]] and one.grid_splits == []


def test_boundary_of_several_grids():
    """Totals, the row of all blocks, z of either shape, float64, ws that may be written into."""
    G = spatial_generator()
    assert (G.z_dim, G.w_dim, G.latent_grid) == (6 * 20, 8 * 20, [1, 20])
    assert (G.latent_grids, G.block_z_dim, G.block_w_dim) == (GRIDS, 6, 8)
    z = torch.from_numpy(np.random.RandomState(0).randn(2, G.z_dim))
    picture = G(z, None, noise_mode="const")
    assert torch.equal(G(z.reshape(2, 6, 1, 20), None, noise_mode="const"), picture)
    ws, other = G.mapping(z, None), G.mapping(z.flip(0), None)
    assert list(ws.shape) == [2, G.num_ws, G.w_dim]
    # the fine blocks' part of an entry that coarse layers read has no effect; the coarse part has
    maps = ws.reshape(2, G.num_ws, 8, 20)
    maps[:, :2, :, 4:] = other.reshape(maps.shape)[:, :2, :, 4:]
    assert torch.equal(G.synthesis(ws, noise_mode="const"), picture)
    maps[:, :2] = other.reshape(maps.shape)[:, :2]
    assert not torch.equal(G.synthesis(ws, noise_mode="const"), picture)


def test_path_length_gradients_reach_every_parameter():
    G = spatial_generator().train().requires_grad_(True)
    ws = G.mapping(torch.randn(2, G.z_dim), None)
    img = G.synthesis(ws)
    (jacobian,) = torch.autograd.grad((img * torch.randn_like(img)).sum(), ws, create_graph=True)
    assert jacobian.shape == ws.shape
    jacobian.square().sum().backward()
    used = {name for name, p in G.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert used == {name for name, _p in G.named_parameters() if not name.endswith("torgb.bias")}


def test_training_keeps_the_average_constant_over_all_blocks():
    G = spatial_generator().train()
    G.mapping(torch.randn(4, G.z_dim), None)
    average = G.mapping.w_avg.reshape(8, 20)
    assert torch.equal(average, average[:, :1].expand_as(average)) and bool((average != 0).all())


@pytest.mark.parametrize(
    ("of", "splits"),
    [(GRIDS, []), (GRIDS, [4]), (GRIDS, [32]), (GRIDS, [12]), ([*GRIDS, [8, 8]], [16, 8])],
)
def test_networks_refuse_grids_without_layers(of, splits):
    with pytest.raises(AssertionError, match="grid_splits must"):
        spatial_generator(latent_grids=of, grid_splits=splits)


# --- the loss -----------------------------------------------------------------------------------------------


def test_random_blocks_are_uniform_in_grids_and_blocks():
    of = [[1, 1], [2, 2], [3, 4]]
    torch.manual_seed(0)
    count = 24000
    freq = grids.random_blocks(of, [count]).bincount(minlength=17).double() / count
    want = torch.tensor([0] + [1 / 8] * 4 + [1 / 24] * 12)
    assert freq[0] == 0  # a grid of one block has no outside
    assert bool(((freq - want).abs() <= 4 * (want / count).sqrt()).all())


def test_random_blocks_of_one_grid_draw_as_ever():
    torch.manual_seed(3)
    got = grids.random_blocks([[3, 4]], [2, 5])
    torch.manual_seed(3)
    assert torch.equal(got, torch.randint(12, [2, 5]))


@pytest.mark.parametrize("of", [[[2, 2], [4, 4]], [[1, 1], [2, 3]], [[2, 2]], [[4, 6]]])
def test_estimator_is_unbiased(of):
    """Against eq. (2), every a and every b != a in each grid, divided by B (B - 1): the mean over the grids."""
    torch.manual_seed(0)
    count, total = 300 if len(of) > 1 else 150, sum(grids.block_counts(of))
    G = SpatialGenerator(
        z_dim=2 * total, c_dim=0, w_dim=4 * total, img_resolution=48 if of == [[4, 6]] else 16, img_channels=1,
        latent_grids=of, grid_splits=[8] * (len(of) - 1), mapping_kwargs=dict(num_layers=1),
        synthesis_kwargs=dict(channel_base=32, channel_max=2, encoder_init="none"),
        img_shape=[32, 48] if of == [[4, 6]] else None,
    ).requires_grad_(False)  # fmt: skip
    z, fresh = torch.randn(2, count, G.z_dim)
    before, terms = G(z, None, noise_mode="none"), []
    for number, grid in enumerate(of):
        masks, chosen = blocks.block_masks(grid, G.img_shape), grids.blocks_of_grid(of, number)
        if len(chosen) == 1:
            continue
        each = 0
        for a, block in enumerate(chosen):
            after = G(blocks.replace_blocks(z, fresh, [block], of), None, noise_mode="none")
            changes = distortion.block_change(before, after, masks)  # [N, B]
            each = each + changes.sum(dim=1) - changes[:, a]
        terms.append(each / (len(chosen) * (len(chosen) - 1)))
    truth = torch.stack(terms).mean(dim=0)
    z = torch.randn(4 * count, G.z_dim)
    draws = estimate_distortion(G.mapping, G.synthesis, z, torch.zeros(4 * count, 0), num_blocks=2)
    error = float((truth.var() / len(truth) + draws.var() / len(draws)).sqrt())
    assert abs(float(draws.mean() - truth.mean())) < 4 * error
    assert error < 0.12 * float(truth.mean())


@pytest.mark.parametrize("grid", [[2, 2], [4, 6], [8, 8], [16, 16]])
def test_scale_is_that_of_one_pair_for_every_grid(grid):
    """Eq. (2) divided by B (B - 1): where every block leaks alike into every other, the number of blocks cancels."""
    size, leak = math.prod(grid), 0.3

    class Leaky(torch.nn.Module):
        latent_grid = grid

        def forward(self, ws, noise_mode="const"):
            values = ws[:, 0] + leak * (ws[:, 0].sum(dim=1, keepdim=True) - ws[:, 0])
            return values.reshape(-1, 1, *grid)

    def mapping(z, c, skip_w_avg_update):
        return z[:, None]

    draws = estimate_distortion(mapping, Leaky(), torch.randn(20000, size), None)
    assert float(draws.mean()) == pytest.approx(2 * leak**2, abs=4 * float(draws.std()) / 20000**0.5)
    assert float(draws.std()) / 20000**0.5 < 0.02 * 2 * leak**2


def test_path_lengths_by_block_count_all_grids():
    """Against gradients by the entries of one block alone, put into ws at their place in [N, num_ws, C, B]."""
    G, beta = spatial_generator(), 0.5
    count = 8
    ws = G.mapping(torch.randn(count, G.z_dim), None).requires_grad_()
    torch.manual_seed(0)
    got = block_path_lengths(G.synthesis(ws, noise_mode="const"), ws, GRIDS, beta).detach()
    torch.manual_seed(0)
    picks, noise = torch.randint(20, [count]), torch.randn(count, 3, 16, 16) / 16
    assert {bool(pick >= 4) for pick in picks} == {False, True}  # blocks of both grids
    for n, pick in enumerate(picks.tolist()):
        maps = ws[n : n + 1].detach().reshape(1, G.num_ws, 8, 20).clone()
        own = maps[..., pick].clone().requires_grad_()
        maps[..., pick] = own
        img = G.synthesis(maps.flatten(2), noise_mode="const")[0]
        inside = blocks.block_masks(GRIDS, [16, 16])[pick]
        (grad,) = torch.autograd.grad((img * noise[n] * torch.where(inside, 1, 1 / beta)).sum(), own)
        assert float(got[n]) == pytest.approx(float(grad.square().sum() / G.num_ws) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("of", "there"), [([[1, 1]], False), ([[1, 1], [2, 2]], True), (GRIDS, True)])
def test_the_phase_is_there_where_a_grid_has_an_outside(of, there):
    G = spatial_generator(latent_grids=of, grid_splits=[8] * (len(of) - 1))
    loss = DistortionRegularizedLoss(
        device="cpu", G_mapping=G.mapping, G_synthesis=G.synthesis, D=None, lambda_d=1
    )
    assert ("Gdist" in [row.name for row in loss.phase_rows(4, 16)]) == there


# --- measuring ----------------------------------------------------------------------------------------------


class TwoScales(torch.nn.Module):
    """8x8 grey pictures of z [coarse 2x2, fine 4x4], one channel a block: coarse * up(z0) + fine * up(z1), and
    `leak` times the sum of all coarse z0 everywhere."""

    z_dim, w_dim, c_dim, img_resolution, img_channels, num_ws = 20, 20, 0, 8, 1, 1
    latent_grid, latent_grids, grid_splits = [1, 20], GRIDS, SPLITS

    def __init__(self, coarse, fine, leak=0.0):
        super().__init__()
        self.gains = coarse, fine, leak

    def mapping(self, z, c, truncation_psi=1):
        return z.to(torch.float32)[:, None]

    def synthesis(self, ws, noise_mode="const", force_fp32=False):
        coarse, fine, leak = self.gains
        z = [
            part.reshape(-1, 1, side, side)
            for part, side in zip(ws[:, 0].split([4, 16], 1), [2, 4], strict=True)
        ]
        maps = [
            x.repeat_interleave(8 // side, 2).repeat_interleave(8 // side, 3)
            for x, side in zip(z, [2, 4], strict=True)
        ]
        return coarse * maps[0] + fine * maps[1] + leak * z[0].sum(dim=(2, 3), keepdim=True)

    def forward(self, z, c, noise_mode="const"):
        return self.synthesis(self.mapping(z, c), noise_mode)


def calc(name, G, **kwargs):
    from dnnlib.plugins import load_plugins
    from metrics import metric_main

    load_plugins()
    return metric_main.calc_metric(name, G=G, device="cpu", **kwargs).results


def test_ldbr_dist_of_two_grids(tmp_path, monkeypatch):
    monkeypatch.setattr(metric, "NUM_LATENTS", 400)
    coarse, fine, leak = 0.08, 0.05, 0.02
    got = calc("ldbr_dist", TwoScales(coarse, fine, leak), run_dir=str(tmp_path))
    assert got["ldbr_dist_2x2"] == pytest.approx(2 * leak**2, abs=4 * got["ldbr_dist_stderr_2x2"])
    inside = 2 * (coarse + leak) ** 2
    assert got["ldbr_dist_inside_2x2"] == pytest.approx(inside, abs=4 * got["ldbr_dist_inside_stderr_2x2"])
    assert got["ldbr_dist_4x4"] == 0  # the fine grid reaches nothing outside its own blocks
    assert got["ldbr_dist_inside_4x4"] == pytest.approx(2 * fine**2, rel=0.1)
    for key in ["ldbr_dist", "ldbr_dist_inside"]:
        assert got[key] == pytest.approx((got[f"{key}_2x2"] + got[f"{key}_4x4"]) / 2)
    assert got["ldbr_dist_stderr"] == pytest.approx(got["ldbr_dist_stderr_2x2"] / 2)
    shapes = {name: np.shape(got[f"ldbr_dist_influence_{name}"]) for name in ["2x2", "4x4"]}
    assert shapes == {"2x2": (4, 4), "4x4": (16, 16)}
    assert "ldbr_dist_nohalo_4x4" in got and "ldbr_dist_nohalo_2x2" not in got
    assert {path.name for path in tmp_path.iterdir()} == {"influence_2x2.png", "influence_4x4.png"}


def test_floor_of_two_grids(tmp_path, monkeypatch, own_cache):
    """Each grid is held against the variance that it moves: a local one attains its floor of zero, a symmetric leak
    attains its floor, and the shares are those of the variances."""
    import PIL.Image

    monkeypatch.setattr(metric, "NUM_LATENTS", 600)
    rnd = np.random.RandomState(0)
    for i in range(40):
        levels = np.clip(128 + 12 * rnd.randn(4, 4), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(np.kron(levels, np.ones([2, 2], dtype=np.uint8))).save(tmp_path / f"{i:03d}.png")
    data = dict(class_name="training.dataset.ImageFolderDataset", path=str(tmp_path))
    coarse, fine, leak = 0.08, 0.05, 0.04
    got = calc("ldbr_floor", TwoScales(coarse, fine, leak), dataset_kwargs=data)
    assert got["ldbr_floor_efficiency_2x2"] == pytest.approx(1, rel=0.1)
    assert got["ldbr_floor_distortion_2x2"] == pytest.approx(2 * leak**2, rel=0.1)
    assert got["ldbr_floor_own_4x4"] < 1e-3 * 2 * fine**2 and got["ldbr_floor_distortion_4x4"] == 0
    moved = (coarse + leak) ** 2 + 3 * leak**2
    assert got["ldbr_floor_share_2x2"] == pytest.approx(moved / (moved + fine**2), rel=0.05)
    assert got["ldbr_floor_share_4x4"] == pytest.approx(fine**2 / (moved + fine**2), rel=0.1)
    assert 0 < got["ldbr_floor_kept"] <= 1


def test_a_single_block_has_no_distortion():
    G = TwoScales(1, 1)
    G.latent_grid, G.latent_grids = [1, 1], [[1, 1]]
    with pytest.raises(ValueError, match="a single block: nothing is outside it"):
        calc("ldbr_dist", G)


def test_influence_follows_the_grid_and_the_hash_its_splits():
    G = spatial_generator()
    z, fresh = torch.randn(2, 2, G.z_dim)
    fine = resampling.influence(G, z, None, fresh, grid=1)
    assert fine.shape == (2, 16, 16)
    before, after = (
        G(each, None, noise_mode="const") for each in (z, blocks.replace_blocks(z, fresh, [4 + 6], GRIDS))
    )
    square = (
        (after.clamp(-1, 1) - before.clamp(-1, 1))
        .square()
        .mean(dim=1)[:, blocks.block_masks([4, 4], [16, 16])[3]]
    )
    torch.testing.assert_close(fine[:, 6, 3], square.mean(dim=1), rtol=1e-3, atol=1e-6)
    other = spatial_generator(latent_grids=GRIDS, grid_splits=[16])
    other.load_state_dict(G.state_dict())
    assert resampling.network_hash(other) != resampling.network_hash(G)


# --- names and numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3", [3]),
        ("1:0", [4]),
        ("0:1,3,1:row1", [1, 3, 8, 9, 10, 11]),
        ("1:all,0:0", [0, *range(4, 20)]),
        ("all", list(range(20))),
        (" 1 : cols0-1 ", [4, 5, 8, 9, 12, 13, 16, 17]),
    ],
)
def test_parse_blocks_of_several_grids(text, expected):
    assert blocks.parse_blocks(text, GRIDS) == expected
    names = ",".join(grids.block_name(block, GRIDS) for block in expected)
    assert blocks.parse_blocks(names, GRIDS) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "'3' is of which grid\\? write '0:...' for 2x2 or '1:...' for 4x4"),
        ("2:3", "There is no grid '2': write '0:...' for 2x2 or '1:...' for 4x4"),
        ("x:3", "There is no grid 'x'"),
        ("0:4", "'4' is outside the 2x2 grid: blocks are 0 to 3"),
        ("1:row4", "'row4' is outside the 4x4 grid"),
        ("0:1:2", "There is no grid '0:1'"),
        ("0:", "Cannot read ''"),
    ],
)
def test_parse_blocks_of_several_grids_refuses_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        blocks.parse_blocks(text, GRIDS)
    assert "\n" not in str(error.value)


def test_names_of_one_grid():
    assert blocks.parse_blocks("0:5", [3, 4]) == [5] and grids.block_name(5, [[3, 4]]) == "5"
    assert grids.grid_name([3, 4]) == "3x4" and grids.grid_name(GRIDS) == "2x2,4x4"


def test_check_blocks_counts_over_all_grids():
    blocks.check_blocks([19], GRIDS)
    with pytest.raises(ValueError, match="Block 20 is outside the 2x2,4x4 grid: blocks are 0 to 19"):
        blocks.check_blocks([20], GRIDS)


def test_masks_of_several_grids_are_those_of_each():
    masks = blocks.block_masks(GRIDS, [8, 12])
    assert torch.equal(masks, torch.cat([blocks.block_masks(grid, [8, 12]) for grid in GRIDS]))
    touched = torch.zeros([8, 12], dtype=torch.bool)
    touched[7, 11] = True  # the last block of either grid
    assert blocks.blocks_of_mask(touched, GRIDS) == [3, 19]
    assert torch.equal(blocks.union_mask([3, 19], GRIDS, [8, 12]), masks[3])


@pytest.mark.parametrize(
    ("of", "shape", "last", "splits"),
    [
        ([[4, 4], [8, 8]], [32, 32], 32, [16]),
        ([[4, 4], [8, 8]], [256, 256], 256, [16]),
        ([[4, 4], [16, 16]], [32, 32], 32, [32]),
        ([[2, 2], [4, 4], [8, 8]], [64, 64], 64, [8, 16]),
        ([[1, 1], [2, 2]], [16, 16], 16, [8]),
        ([[2, 3], [4, 6]], [128, 192], 128, [8]),  # b8 makes 8x12
        ([[4, 4], [32, 32]], [32, 32], 32, [32]),  # nothing finer is left
        ([[4, 4]], [32, 32], 32, []),
    ],
)
def test_default_splits(of, shape, last, splits):
    assert grids.default_splits(of, shape, last) == splits
