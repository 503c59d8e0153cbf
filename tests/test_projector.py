# SPDX-License-Identifier: Apache-2.0
"""Projection: formulas against brute force, recovery of pictures that the network made, the files of projector.py."""

import inspect
import math
import re
import warnings

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch
from click.testing import CliRunner

import generate
import projector
import resample
from ssn_ext.networks import SpatialGenerator
from torch_utils import video
from torch_utils.images import read_image, to_uint8, write_png
from training import generating, projection
from training.networks import Generator
from training.snapshot import save_network_pkl

GRID = [2, 2]


class Pixels(torch.nn.Module):
    """A detector whose features are the pixels: the distance is the mean squared difference in [-1, 1]."""

    def forward(
        self, x: torch.Tensor, resize_images: bool = True, return_lpips: bool = False
    ) -> torch.Tensor:
        assert return_lpips and not resize_images
        return x.flatten(1) / 127.5 / (x.shape[1] * x.shape[2] * x.shape[3]) ** 0.5


class Blocks(torch.nn.Module):
    """w = 2 z in every block; keeps the ws it was asked to draw; pictures [N, 3, 8, 12] are made of the mean of ws."""

    def __init__(self, grid=None, channels=50):
        super().__init__()
        count = 1 if grid is None else math.prod(grid)
        if grid is not None:
            self.latent_grid = grid
        self.z_dim = self.w_dim = channels * count
        self.num_ws, self.c_dim, self.asked = 2, 0, []
        self.synthesis = torch.nn.Module()
        self.synthesis.forward = self.draw

    def mapping(self, z, c, truncation_psi=1):
        return 2 * z.to(torch.float32)[:, None].repeat(1, 2, 1)

    def draw(self, ws, noise_mode):
        Blocks.asked.append(ws.detach())
        return ws.mean(dim=[1, 2]).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 12)

    asked = []


def tiny(kind="spatial", c_dim=0, channels=3):
    """An untrained generator of 16x16 pixels, or of 24x16 ('wide'), with some noise."""
    torch.manual_seed(0)
    kwargs = dict(z_dim=32, c_dim=c_dim, w_dim=32, img_resolution=16, img_channels=channels)
    kwargs.update(mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_base": 128, "channel_max": 8})
    if kind == "wide":
        kwargs.update(img_resolution=24, img_shape=[16, 24])
    G = Generator(**kwargs) if kind == "plain" else SpatialGenerator(latent_grid=GRID, **kwargs)
    for module in G.modules():
        if hasattr(module, "noise_strength"):
            module.noise_strength.data.fill_(0.02)
    return G.eval().requires_grad_(False)


def own_picture(G, seed):
    """A picture that the network itself makes, as a target in 0..255 [C, H, W]."""
    z = torch.from_numpy(np.random.RandomState(seed).randn(1, G.z_dim))
    return to_uint8(G(z, None, noise_mode="const"))[0]


def mse(G, ws, target):
    image = G.synthesis(ws, noise_mode="const")
    return (image.clamp(-1, 1) - (target / 127.5 - 1)).square().mean().item()


# ----------------------------------------------------------------------------------------
# Formulas


def test_schedules_at_given_times():
    rate = {
        t: projection.learning_rate(t, 0.1, 0.25, 0.05) for t in (0, 0.025, 0.05, 0.5, 0.75, 0.875, 0.9375, 1)
    }
    expected = [0, 0.05, 0.1, 0.1, 0.1, 0.05, 0.05 * (1 - math.sqrt(0.5)), 0]
    assert list(rate.values()) == pytest.approx(expected, abs=1e-12)
    noise = [projection.w_noise_scale(t, 3, 0.05, 0.75) for t in (0, 0.375, 0.75, 1)]
    assert noise == pytest.approx([0.15, 0.15 / 4, 0, 0])
    assert projection.learning_rate(0, 0.1, 0, 0) == 0.1 and projection.w_noise_scale(0, 3, 0.05, 0) == 0


def test_statistics_of_w_directly():
    G = tiny("plain")
    mean, std = projection.w_statistics(G, 1500)
    w = (
        G.mapping(torch.from_numpy(np.random.RandomState(123).randn(1500, 32)), None)[:, 0]
        .numpy()
        .astype(np.float64)
    )
    np.testing.assert_allclose(mean, w.mean(axis=0), atol=1e-5)
    assert std == pytest.approx(math.sqrt(((w - w.mean(axis=0)) ** 2).sum() / 1500), rel=1e-5)


def test_statistics_of_a_grid_are_those_of_its_blocks():
    G = tiny()
    mean, std = projection.w_statistics(G, 402)  # 101 pictures of four blocks
    w = G.mapping(torch.from_numpy(np.random.RandomState(123).randn(101, 32)), None)[:, 0].reshape(
        101, 8, 2, 2
    )
    blocks = torch.cat([w[:, :, row, col] for row in range(2) for col in range(2)]).double()
    np.testing.assert_allclose(mean, blocks.mean(dim=0), atol=1e-5)
    assert std == pytest.approx(
        math.sqrt((blocks - blocks.mean(dim=0)).square().sum() / len(blocks)), rel=1e-5
    )


def test_classes_decide_the_statistics():
    G, c = tiny("plain", c_dim=2), torch.tensor([[0.0, 1.0]])
    mean, _std = projection.w_statistics(G, 100, c)
    z = torch.from_numpy(np.random.RandomState(123).randn(100, 32))
    np.testing.assert_allclose(mean, G.mapping(z, c.repeat(100, 1))[:, 0].mean(dim=0), atol=1e-5)


def regularity(noise):
    """The definition, pixel by pixel."""
    height, width = noise.shape
    right = sum(noise[y, x] * noise[y, (x + 1) % width] for y in range(height) for x in range(width))
    down = sum(noise[y, x] * noise[(y + 1) % height, x] for y in range(height) for x in range(width))
    value = (right / noise.size) ** 2 + (down / noise.size) ** 2
    if min(noise.shape) <= 8:
        return value
    half = [
        [noise[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for x in range(width // 2)]
        for y in range(height // 2)
    ]
    return value + regularity(np.array(half))


def test_regularity_of_noise_by_brute_force():
    rnd = np.random.RandomState(0)
    noises = [rnd.randn(*size) + 0.3 for size in ([4, 4], [8, 8], [32, 32], [10, 16])]
    expected = sum(regularity(each) for each in noises)
    found = projection.noise_regularity([torch.from_numpy(each) for each in noises])
    assert found.item() == pytest.approx(expected)
    assert projection.noise_regularity([]).item() == 0


def test_noise_is_normalised():
    noises = [torch.randn(4, 4) * 3 + 1, torch.randn(8, 16) - 2]
    projection.normalize_noise(noises)
    for noise in noises:
        assert noise.mean().abs() < 1e-6 and noise.square().mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("grid", "space"), [(None, "w"), ([3, 4], "blocks"), ([3, 4], "w")])
def test_the_noise_on_w_is_that_of_one_vector_in_every_block(grid, space):
    G, Blocks.asked = Blocks(grid), []
    steps = projection.projection_steps(
        G, projection.Target(np.zeros([3, 8, 12]), Pixels()), num_steps=8, w_avg_samples=2000, space=space
    )
    torch.manual_seed(0)
    found = [step.w for step in steps]
    mean, std = projection.w_statistics(G, 2000)
    # sqrt(E |w - mean|^2) of one block of 50 values with variance 4
    assert std == pytest.approx(math.sqrt(50) * 2, rel=0.02)
    free = 12 if space == "blocks" else 1
    copies = 1 if grid is None else 12 // free
    start = mean[:, None].repeat(1, free * copies).flatten()
    torch.testing.assert_close(found[0], start)  # the learning rate of the first step is 0
    drawn = Blocks.asked[0]
    assert drawn.shape == (1, 2, G.w_dim) and torch.equal(drawn[:, 0], drawn[:, 1])
    noise = (drawn[0, 0] - start).reshape(50, -1)
    assert noise.square().mean().sqrt().item() == pytest.approx(0.05 * std, rel=0.25 if free == 1 else 0.08)
    if copies > 1:
        assert (noise == noise[:, :1]).all()
    torch.testing.assert_close(Blocks.asked[7][0, 0], found[6], rtol=0, atol=0)  # t = 7/8: no more noise


# ----------------------------------------------------------------------------------------
# The target


def test_distances_are_those_of_the_detector_at_256_pixels_at_most():
    rnd = torch.Generator().manual_seed(0)
    target = torch.randint(256, [3, 32, 512], generator=rnd)
    image = torch.rand([2, 3, 32, 512], generator=rnd) * 2 - 1
    goal = projection.Target(target, Pixels())
    small = torch.nn.functional.avg_pool2d(image - (target / 127.5 - 1), 2)
    torch.testing.assert_close(goal.distance(image), small.square().mean(dim=[1, 2, 3]), rtol=1e-4, atol=1e-6)
    grey = projection.Target(target[:1, :, :100], Pixels())
    expected = (image[:, :1, :, :100] - (target[:1, :, :100] / 127.5 - 1)).square().mean(dim=[1, 2, 3])
    torch.testing.assert_close(grey.distance(image[:, :1, :, :100]), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grey.mse(image[:, :1, :, :100]), expected, rtol=1e-4, atol=1e-6)


def test_outside_the_mask_nothing_counts():
    mask = np.zeros([8, 8], dtype=np.float32)
    mask[:, :4] = 1
    target = np.random.RandomState(0).randint(256, size=[3, 8, 8])
    goal = projection.Target(target, Pixels(), mask)
    image = (torch.rand([1, 3, 8, 8]) * 2 - 1).requires_grad_()
    other = image.detach().clone()
    other[..., 4:] = 0.5
    assert torch.equal(goal.distance(image), goal.distance(other))
    goal.distance(image).sum().backward()
    assert (image.grad[..., 4:] == 0).all() and (image.grad[..., :4] != 0).any()
    square = (image.detach() - (torch.from_numpy(target) / 127.5 - 1)).square()
    assert goal.distance(image).item() == pytest.approx(square[..., :4].mean().item() / 2, rel=1e-4)
    assert goal.mse(image).item() == pytest.approx(square[..., :4].mean().item(), rel=1e-4)


def test_targets_are_cut_and_resized(tmp_path):
    path = str(tmp_path / "wide.png")
    picture = np.zeros([20, 60, 3], dtype=np.uint8)
    picture[:, 20:40] = [10, 200, 30]
    write_png(path, picture)
    assert (projection.read_target(path, [10, 10], 3) == np.reshape([10, 200, 30], [3, 1, 1])).all()
    assert projection.read_target(path, [10, 10], 1).shape == (1, 10, 10)
    whole = projection.read_target(path, [10, 30], 3)  # the network is as wide: nothing is cut
    assert whole.shape == (3, 10, 30) and (whole[:, :, :6] == 0).all()
    same = np.random.RandomState(0).randint(256, size=[12, 8, 3]).astype(np.uint8)
    write_png(path, same)
    assert (projection.read_target(path, [12, 8], 3) == same.transpose(2, 0, 1)).all()
    expected = PIL.Image.fromarray(same[2:10]).resize((4, 4), PIL.Image.Resampling.LANCZOS)
    assert (projection.read_target(path, [4, 4], 3) == np.asarray(expected).transpose(2, 0, 1)).all()
    with pytest.raises(ValueError, match="Pictures of 4 channels cannot be projected"):
        projection.read_target(path, [4, 4], 4)


def test_targets_of_all_kinds(tmp_path):
    path = str(tmp_path / "target.png")
    clear = PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 4))
    clear.save(path)
    found = projection.read_target(path, [8, 8], 3)
    assert (found[:, :4] == np.reshape([0, 0, 255], [3, 1, 1])).all() and (found[:, 4:] == 255).all()
    palette = PIL.Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(path, transparency=0)
    assert (projection.read_target(path, [8, 8], 3) == np.reshape([200, 100, 50], [3, 1, 1])).all()
    PIL.Image.fromarray(np.full([8, 8], 40000, dtype=np.uint16)).save(path)
    assert (projection.read_target(path, [8, 8], 1) == round(40000 / 257)).all()
    turned = PIL.Image.new("RGB", (8, 4), "black")
    turned.paste("white", (0, 0, 4, 4))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown 90 degrees clockwise
    turned.save(path, exif=exif)
    found = projection.read_target(path, [8, 4], 3)
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 0).all()


def test_masks_are_cut_like_their_target(tmp_path):
    target, mask = str(tmp_path / "t.png"), str(tmp_path / "m.png")
    write_png(target, np.zeros([10, 30, 3], dtype=np.uint8))
    white = np.zeros([10, 30], dtype=np.uint8)
    white[:, 10:15] = 255
    write_png(mask, white)
    found = projection.read_mask(mask, target, [10, 10])
    assert found.dtype == np.float32 and (found[:, :5] == 1).all() and (found[:, 5:] == 0).all()
    write_png(mask, np.stack([np.full_like(white, 255)] * 3 + [white], axis=2))  # transparent elsewhere
    assert np.array_equal(projection.read_mask(mask, target, [10, 10]), found)
    write_png(mask, white[:, :20])
    with pytest.raises(ValueError, match=r"m.png has 20x10 pixels, .*t.png has 30x10"):
        projection.read_mask(mask, target, [10, 10])
    write_png(mask, np.roll(white, 12, axis=1))
    with pytest.raises(ValueError, match="is black where the picture is used"):
        projection.read_mask(mask, target, [10, 10])


# ----------------------------------------------------------------------------------------
# The search


def test_project_has_the_familys_signature():
    signature = inspect.signature(projector.project)
    assert list(signature.parameters)[:2] == ["G", "target"]
    floats = "initial_noise_factor .05, initial_learning_rate .1, regularize_noise_weight 1e5, noise_ramp_length .75"
    floats += ", lr_rampup_length .05, lr_rampdown_length .25, w_avg_samples 10000, num_steps 1000"
    expected = {name: float(value) for name, value in (each.split() for each in floats.split(", "))}
    expected.update(verbose=False, device=inspect.Parameter.empty)
    found = {name: p.default for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: found[name] for name in expected} == expected
    with pytest.raises(AttributeError, match="no attribute 'projct'"):
        _ = projector.projct


@pytest.mark.parametrize(
    ("kind", "channels", "steps", "share"),
    [("plain", 3, 150, 0.3), ("spatial", 3, 60, 0.2), ("wide", 1, 60, 0.2)],
)
def test_a_picture_of_the_network_is_found_again(kind, channels, steps, share, capsys):
    G = tiny(kind, channels=channels)
    before = {name: tensor.clone() for name, tensor in G.state_dict().items()}
    target = own_picture(G, 5)
    torch.manual_seed(1)
    path = projector.project(
        G,
        target,
        num_steps=steps,
        w_avg_samples=500,
        verbose=True,
        device=torch.device("cpu"),
        detector=Pixels(),
    )
    assert path.shape == (steps, G.num_ws, 32) and torch.equal(path, path[:, :1].repeat(1, G.num_ws, 1))
    mean, _std = projection.w_statistics(G, 500)
    average = mean.repeat_interleave(32 // len(mean)).repeat(1, G.num_ws, 1)
    torch.testing.assert_close(path[:1], average)
    assert mse(G, path[-1:], target) < share * mse(G, average, target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in G.state_dict().items())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == steps and lines[0].startswith(f"step    1/{steps}: dist ")
    assert float(lines[-1].split()[3]) < share * float(lines[0].split()[3])


def test_blocks_find_what_one_vector_for_all_cannot():
    G = tiny()
    target = own_picture(G, 3)
    options = dict(num_steps=60, w_avg_samples=500, device="cpu", detector=Pixels())
    torch.manual_seed(1)
    blocks = projector.project(G, target, **options)
    single = projector.project(G, target, space="w", **options)
    values = single[-1, 0].reshape(8, 4)
    assert (values == values[:, :1]).all() and not torch.equal(values[:1], values[1:2])
    assert mse(G, blocks[-1:], target) < 0.5 * mse(G, single[-1:], target)
    with pytest.raises(ValueError, match="space is one of blocks, w, not 'z'"):
        projector.project(G, target, space="z", **options)
    with pytest.raises(ValueError, match="--space=blocks needs a network with a grid of latents"):
        projector.project(tiny("plain"), target, space="blocks", **options)
    with pytest.raises(
        ValueError, match=r"The target is \[3, 8, 8\], the network's pictures are \[3, 16, 16\]"
    ):
        projector.project(G, target[:, :8, :8], **options)


def test_the_random_state_decides_all():
    G = tiny()
    options = dict(num_steps=5, w_avg_samples=100, device="cpu", detector=Pixels())
    paths = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        paths.append(projector.project(G, own_picture(G, 3), **options))
    assert torch.equal(paths[0], paths[1]) and not torch.equal(paths[0], paths[2])


def test_the_options_of_project_do_what_they_say():
    G, target = tiny(), own_picture(tiny(), 3)
    options = dict(num_steps=4, w_avg_samples=100, device="cpu", detector=Pixels())

    def path(**changed):
        torch.manual_seed(0)
        return projector.project(G, target, **{**options, **changed})

    usual = path()
    still = path(initial_learning_rate=0)
    assert torch.equal(still[0], still[3]) and not torch.equal(usual[0], usual[3])
    assert not torch.equal(path(lr_rampup_length=0)[0], usual[0])  # the first step moves already
    for name, value in [("lr_rampdown_length", 1), ("initial_noise_factor", 0), ("noise_ramp_length", 0.1)]:
        assert not torch.equal(path(**{name: value}), usual), name
    assert not torch.equal(path(w_avg_samples=8)[0], usual[0])
    # Unregularised noise inputs follow the picture alone.
    assert not torch.equal(path(regularize_noise_weight=0), usual)


# ----------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network, a detector and a target."""
    folder = tmp_path_factory.mktemp("place")
    G = tiny()
    save_network_pkl(folder / "ssn.pkl", G=G, D=None, G_ema=G)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Pixels()), str(folder / "pixels.pt"))
    write_png(folder / "target.png", own_picture(G, 4).permute(1, 2, 0).numpy())
    return folder


@pytest.fixture
def call(place, tmp_path):
    """Calls the script with outdir=out and few steps: the result of click's runner."""

    def run(*args, **replaced):
        options = dict(network=place / "ssn.pkl", target=place / "target.png", outdir=tmp_path / "out")
        options.update(detector=place / "pixels.pt", num_steps=4, device="cpu")
        options.update(replaced)
        given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items() if value is not None]
        return CliRunner().invoke(projector.main, [*given, *args])

    return run


def latents(folder):
    with np.load(folder / "projected_w.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["w"]
        return torch.from_numpy(arrays["w"])


def test_the_script_writes_the_result(call, place, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "has_ffmpeg", lambda: False)
    result = call(num_steps=30)
    assert result.exit_code == 0, result.output
    out, G = tmp_path / "out", generating.load_generator(str(place / "ssn.pkl"), "cpu")
    assert sorted(path.name for path in out.iterdir()) == [
        "proj.gif",
        "proj.png",
        "projected_w.npz",
        "target.png",
    ]
    assert "Wrote proj.gif, since proj.mp4 needs imageio-ffmpeg (pip install imageio-ffmpeg)" in result.output
    ws = latents(out)
    assert ws.shape == (1, G.num_ws, G.w_dim)
    # The same search in a script, from the same seed.
    target = torch.from_numpy(read_image(place / "target.png")).permute(2, 0, 1)
    torch.manual_seed(303)
    path = projector.project(G, target, num_steps=30, device="cpu", detector=Pixels())
    torch.testing.assert_close(path[-1:], ws, rtol=1e-3, atol=1e-3)
    picture = generating.synthesize(G, ws)
    assert (read_image(out / "proj.png") == to_uint8(picture)[0].permute(1, 2, 0).numpy()).all()
    assert (read_image(out / "target.png") == read_image(place / "target.png")).all()
    with PIL.Image.open(out / "proj.gif") as image:
        frames = [np.array(each.convert("RGB")).astype(int) for each in PIL.ImageSequence.Iterator(image)]
        assert image.info["duration"] == 100
    assert len(frames) == 30 and frames[0].shape == (16, 32, 3)
    both = np.concatenate([read_image(out / "target.png"), read_image(out / "proj.png")], axis=1)
    assert np.abs(frames[-1] - both).mean() < 6 < np.abs(frames[0] - both).mean()  # a palette is between
    average = generating.synthesize(G, G.mapping(torch.zeros(1, 32), None, truncation_psi=0))
    expected = []
    for image in (picture, average):
        expected += [(image - (target / 127.5 - 1)).square().mean().item()]
        expected += [(image.clamp(-1, 1) - (target / 127.5 - 1)).square().mean().item()]
    numbers = re.search(
        r"30 steps in [\d.]+ s: distance (.+), pixel MSE (.+) \(of the average picture: (.+), (.+)\)",
        result.output,
    )
    assert [float(each) for each in numbers.groups()] == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not video.has_ffmpeg(), reason=f"needs an optional package: {video.INSTALL}")
def test_the_video_is_mp4_where_it_can_be(call, tmp_path):
    import imageio_ffmpeg

    result = call()
    assert result.exit_code == 0 and "proj.gif" not in result.output
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "out" / "proj.mp4"))
    assert count == 4 and seconds == pytest.approx(0.4)


def test_options_of_the_script(call, tmp_path, place):
    def ws(**options):
        result = call("--overwrite", save_video=False, **options)
        assert result.exit_code == 0, result.output
        assert not list((tmp_path / "out").glob("proj.[mg]*"))
        return latents(tmp_path / "out")

    usual = ws()
    assert torch.equal(ws(), usual) and not torch.equal(ws(seed=304), usual)
    assert not torch.equal(ws(num_steps=3), usual)
    single = ws(space="w")[0, 0].reshape(8, 4)
    assert (single == single[:, :1]).all()
    mask = np.zeros([16, 16], dtype=np.uint8)
    mask[:4, :4] = 255
    write_png(place / "mask.png", mask)
    assert not torch.equal(ws(mask=place / "mask.png"), usual)


def test_the_class_of_a_conditional_network(call, tmp_path):
    G = tiny("plain", c_dim=2)
    save_network_pkl(tmp_path / "cond.pkl", G=G, D=None, G_ema=G)
    found = []
    for number in (0, 1):
        result = call(
            "--overwrite", network=tmp_path / "cond.pkl", save_video=False, num_steps=1, **{"class": number}
        )
        assert result.exit_code == 0, result.output
        found.append(latents(tmp_path / "out")[0, 0])
        mean, _std = projection.w_statistics(G, 10000, torch.eye(2)[[number]])
        torch.testing.assert_close(found[-1], mean)
    assert not torch.equal(*found)
    result = call(network=tmp_path / "cond.pkl", outdir=tmp_path / "new")
    assert "Must specify class label with --class" in result.output and not (tmp_path / "new").exists()


def test_ctrl_c_writes_what_was_found(call, tmp_path, monkeypatch):
    whole = projection.projection_steps

    def stopped(after):
        def steps(*args, **kwargs):
            for number, step in enumerate(whole(*args, **kwargs)):
                if number == after:
                    raise KeyboardInterrupt
                yield step

        return steps

    monkeypatch.setattr(projection, "projection_steps", stopped(0))
    result = call()
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    monkeypatch.setattr(projection, "projection_steps", stopped(3))
    result = call(num_steps=10)
    assert result.exit_code == 0 and "Stopped after 3 of 10 steps: writing what was found" in result.output
    assert "3 steps in" in result.output and latents(tmp_path / "out").shape == (1, 6, 32)


def test_generate_and_resample_go_on_from_a_projection(call, place, tmp_path):
    assert call(save_video=False).exit_code == 0
    w = f"--projected-w={tmp_path / 'out' / 'projected_w.npz'}"
    network = f"--network={place / 'ssn.pkl'}"
    again = CliRunner().invoke(generate.main, [network, w, f"--outdir={tmp_path / 'again'}", "--device=cpu"])
    assert again.exit_code == 0, again.output
    expected = read_image(tmp_path / "out" / "proj.png")
    assert (read_image(tmp_path / "again" / "proj00.png") == expected).all()
    edit = CliRunner().invoke(
        resample.main,
        [network, w, "--blocks=0", "--candidates=1", f"--outdir={tmp_path / 'edit'}", "--device=cpu"],
    )
    assert edit.exit_code == 0, edit.output
    folder = tmp_path / "edit" / "00000-blocks0"
    assert (read_image(folder / "proj00-original.png") == expected).all()
    with np.load(folder / "proj00.npz") as arrays:
        kept, new = (each.reshape(-1, 8, 4) for each in arrays["ws"])
    assert (kept[..., 1:] == new[..., 1:]).all() and (kept[..., 0] != new[..., 0]).all()


def test_mistakes_are_one_line_and_change_nothing(call, place, tmp_path):
    out = tmp_path / "out"
    plain = tiny("plain")
    save_network_pkl(tmp_path / "plain.pkl", G=plain, D=None, G_ema=plain)
    (tmp_path / "text.png").write_bytes(b"no picture")
    write_png(tmp_path / "small.png", np.full([4, 4], 255, dtype=np.uint8))
    for options, message in [
        (dict(network=tmp_path / "plain.pkl", space="blocks"), "--space=blocks needs a network with a grid"),
        (dict(target=tmp_path / "text.png"), f"Not a picture of a known format: {tmp_path / 'text.png'}"),
        (dict(detector="nothing"), "--detector: 'nothing' is neither a file"),
        (dict(mask=tmp_path / "small.png"), "small.png has 4x4 pixels"),
        ({"class": 1}, "--class is of no use here"),
        (dict(network=tmp_path / "text.png"), "is not a network snapshot"),
    ]:
        result = call(**options)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        last = result.output.strip().splitlines()[-1]
        assert last.startswith("Error: ") and message in last
        assert not out.exists()
    out.mkdir()
    (out / "projected_w.npz").write_bytes(b"mine")
    result = call()
    assert "projected_w.npz would be replaced: choose another --outdir" in result.output
    assert [path.name for path in out.iterdir()] == ["projected_w.npz"]
    assert (out / "projected_w.npz").read_bytes() == b"mine"
