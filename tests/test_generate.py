# SPDX-License-Identifier: Apache-2.0
"""generate.py and style_mixing.py: every picture against the network's own answer, every option, every message."""

import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch
from click.testing import CliRunner

import generate
import style_mixing
from ssn_ext.networks import SpatialGenerator
from torch_utils import video
from torch_utils.images import read_image, to_uint8
from training import generating
from training.networks import Generator
from training.snapshot import save_network_pkl

HEIGHT, WIDTH = 8, 12


class Toy(torch.nn.Module):
    """Wide pictures [N, channels, 8, 12], linear in ws [N, 3, 6]; random noise of strength 0.2; classes shift w."""

    def __init__(self, c_dim=0, channels=3):
        super().__init__()
        self.z_dim = self.w_dim = 6
        self.num_ws, self.c_dim, self.img_channels, self.img_resolution = 3, c_dim, channels, WIDTH
        rnd = torch.Generator().manual_seed(0)
        self.paint = 0.1 * torch.randn([18, channels * HEIGHT * WIDTH], generator=rnd)
        self.w_avg = torch.randn([6], generator=rnd)
        self.classes = torch.randn([max(c_dim, 1), 6], generator=rnd)

    def mapping(self, z, c, truncation_psi=1):
        w = z.to(torch.float32) if c is None else z.to(torch.float32) + c @ self.classes
        return self.w_avg.lerp(w, truncation_psi)[:, None].repeat(1, 3, 1)

    def synthesis(self, ws, noise_mode="random"):
        images = (ws.flatten(1) @ self.paint).reshape(len(ws), -1, HEIGHT, WIDTH)
        return images + 0.2 * torch.randn_like(images) if noise_mode == "random" else images


@pytest.fixture
def use(monkeypatch):
    """use(G): whatever file is named, G is what is in it."""

    def put(G):
        monkeypatch.setattr(generating, "load_network_pkl", lambda source, trust, only: {"G_ema": G})
        return G

    return put


@pytest.fixture
def run(tmp_path):
    """Calls a script with --outdir=out; returns (folder, output)."""

    def call(*args, script=generate):
        result = CliRunner().invoke(
            script.main, ["--network=x.pkl", f"--outdir={tmp_path / 'out'}", "--device=cpu", *args]
        )
        assert result.exit_code == 0, result.output
        return tmp_path / "out", result.output

    return call


@pytest.fixture
def fails(tmp_path):
    """The last line of a call that ends with a user error and writes nothing."""

    def call(*args, script=generate):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        result = CliRunner().invoke(
            script.main, ["--network=x.pkl", f"--outdir={tmp_path / 'out'}", "--device=cpu", *args]
        )
        assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        return result.output.strip().splitlines()[-1]

    return call


def z_of(seed, z_dim=6):
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim))


def pixels(images):
    return to_uint8(images)[0].permute(1, 2, 0).numpy()


def tiny(kind, channels=3):
    """An untrained generator of 16x16 pixels, or of 24x16 ('wide'), whose noise is visible."""
    torch.manual_seed(0)
    kwargs = dict(z_dim=32, c_dim=0, w_dim=32, img_resolution=16, img_channels=channels)
    kwargs.update(mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_base": 128, "channel_max": 8})
    if kind == "wide":
        kwargs.update(img_resolution=24, img_shape=[16, 24])
    G = Generator(**kwargs) if kind == "plain" else SpatialGenerator(latent_grid=[2, 2], **kwargs)
    for module in G.modules():
        if hasattr(module, "noise_strength"):
            module.noise_strength.data.fill_(0.2)
    G.mapping.w_avg.copy_(torch.randn([32]))
    return G.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------
# Pictures of seeds


@pytest.mark.parametrize(("kind", "channels"), [("plain", 3), ("spatial", 3), ("wide", 1)])
def test_pictures_are_those_of_the_network(kind, channels, tmp_path):
    G = tiny(kind, channels)
    save_network_pkl(tmp_path / "net.pkl", G=G, D=None, G_ema=G)
    args = [
        f"--network={tmp_path / 'net.pkl'}",
        f"--outdir={tmp_path / 'out'}",
        "--seeds=0-2,7",
        "--device=cpu",
    ]
    result = CliRunner().invoke(generate.main, [*args, "--trunc=0.6", "--noise-mode=none"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"seed{i:04d}.png" for i in (0, 1, 2, 7)
    ]
    for seed in (0, 1, 2, 7):
        expected = pixels(G(z_of(seed, 32), None, truncation_psi=0.6, noise_mode="none"))
        found = read_image(tmp_path / "out" / f"seed{seed:04d}.png")
        assert found.shape == (16, 24 if kind == "wide" else 16, channels)
        assert np.abs(found.astype(int) - expected).max() <= 1 and (found == expected).mean() > 0.99
    assert "seed0000.png seed0001.png seed0002.png seed0007.png" in result.output


def test_pictures_need_not_be_square(use, run):
    G = use(Toy())
    folder, _ = run("--seeds=5")
    assert (
        read_image(folder / "seed0005.png") == pixels(G.synthesis(G.mapping(z_of(5), None), "const"))
    ).all()


def test_truncation_0_gives_the_average_and_a_half_lies_halfway(use, run):
    G = use(Toy())
    average = pixels(G.synthesis(G.w_avg.repeat(1, 3, 1), "const"))
    folder, _ = run("--seeds=0-3", "--trunc=0")
    assert all((read_image(path) == average).all() for path in folder.iterdir())
    run("--seeds=1", "--trunc=0.5", "--overwrite")
    half = (G.w_avg + z_of(1).float()) / 2
    found = read_image(folder / "seed0001.png")
    assert np.abs(found.astype(int) - pixels(G.synthesis(half.repeat(1, 3, 1), "const"))).max() <= 1
    assert not (found == average).all()


def test_random_noise_is_that_of_the_picture_whatever_its_neighbours(use, run):
    G = use(Toy())
    folder, _ = run("--seeds=0-3", "--noise-mode=random")
    together = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = torch.get_rng_state()
    run("--seeds=2", "--noise-mode=random", "--overwrite")
    assert (folder / "seed0002.png").read_bytes() == together["seed0002.png"]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert (
        read_image(folder / "seed0002.png") == pixels(G.synthesis(G.mapping(z_of(2), None), "random"))
    ).all()
    run("--seeds=2", "--overwrite")
    assert (folder / "seed0002.png").read_bytes() != together["seed0002.png"]


def test_small_pictures_are_made_many_at_a_time_with_the_same_result(use, run, monkeypatch):
    G = use(Toy())
    sizes = []
    synthesis = G.synthesis
    monkeypatch.setattr(G, "synthesis", lambda ws, **kw: sizes.append(len(ws)) or synthesis(ws, **kw))
    folder, _ = run("--seeds=0-69")
    many = {path.name: read_image(path) for path in folder.iterdir()}
    assert sizes == [32, 32, 6] and len(many) == 70
    monkeypatch.setattr(generating, "MOST_AT_A_TIME", 1)
    run("--seeds=0-69", "--overwrite")
    assert sizes[3:] == [1] * 70
    assert max(np.abs(read_image(folder / name).astype(int) - many[name]).max() for name in many) <= 1
    G.img_resolution = 1024
    assert generating.batch_size(G) == 1
    monkeypatch.undo()
    assert generating.batch_size(G) == 4  # 4 * 1024^2 = 2^22


def test_classes(use, run, fails):
    G = use(Toy(c_dim=3))
    folder, _ = run("--seeds=4", "--class=2")
    expected = G.synthesis((z_of(4).float() + G.classes[2]).repeat(1, 3, 1), "const")
    assert (read_image(folder / "seed0004.png") == pixels(expected)).all()
    message = "Must specify class label with --class when using a conditional network"
    assert message in fails("--seeds=5")
    assert "must be 0 to 2, not 3" in fails("--seeds=5", "--class=3")
    use(Toy())
    assert "Warning: --class=1 is ignored: the network is unconditional" in run("--seeds=6", "--class=1")[1]


def test_projected_latents(use, run, fails, tmp_path):
    G = use(Toy())
    ws = torch.randn([3, 3, 6], generator=torch.Generator().manual_seed(1))
    path = tmp_path / "w.npz"
    np.savez(path, w=ws.numpy())
    folder, output = run(f"--projected-w={path}", "--seeds=0", "--grid=3x1")
    assert "Warning: --seeds is ignored when using --projected-w" in output
    assert sorted(each.name for each in folder.iterdir()) == [
        "grid.png",
        *(f"proj0{i}.png" for i in range(3)),
    ]
    for i in range(3):
        assert (read_image(folder / f"proj0{i}.png") == pixels(G.synthesis(ws[i : i + 1], "const"))).all()
    np.savez(path, w=ws.numpy()[:, :2])
    assert "must hold 'w' of shape [n, 3, 6]" in fails(f"--projected-w={path}")
    np.savez(path, v=ws.numpy())
    assert "must hold 'w' of shape [n, 3, 6]" in fails(f"--projected-w={path}")
    path.write_bytes(b"no archive")
    assert f"Cannot read the latents in {path}" in fails(f"--projected-w={path}")


def test_networks_and_flags_of_the_file(use, fails, run, monkeypatch):
    asked = []
    G = Toy()
    monkeypatch.setattr(
        generating,
        "load_network_pkl",
        lambda source, trust, only: asked.append((source, trust)) or {"G_ema": G},
    )
    run("--seeds=0")
    run("--seeds=1", "--trust-pickle")
    assert asked == [("x.pkl", False), ("x.pkl", True)]
    use(torch.nn.Linear(1, 1))
    assert "--network=x.pkl: its G_ema (Linear) is no generator of this family: it has no z_dim" in fails(
        "--seeds=0"
    )


# ----------------------------------------------------------------------------------------
# Sheets and videos


def test_the_grid_shows_all_pictures_row_by_row(use, run, fails):
    use(Toy())
    folder, _ = run("--seeds=0-4", "--grid=3x2")
    grid = read_image(folder / "grid.png")
    assert grid.shape == (2 * HEIGHT, 3 * WIDTH, 3)
    for i in range(5):
        cell = grid[i // 3 * HEIGHT :, i % 3 * WIDTH :][:HEIGHT, :WIDTH]
        assert (cell == read_image(folder / f"seed{i:04d}.png")).all()
    assert (grid[HEIGHT:, 2 * WIDTH :] == 0).all()
    run("--seeds=0-4", "--grid", "--overwrite")
    assert (read_image(folder / "grid.png") == grid).all()  # as square as it goes: 3x2 too
    assert "--grid=2x2 has 4 places for 5 pictures" in fails("--seeds=10-14", "--grid=2x2")
    assert "--grid=wide: give columns x rows" in fails("--seeds=10-14", "--grid=wide")


def test_the_way_through_the_keys_is_closed_and_smooth():
    keys = torch.randn([4, 2, 3], generator=torch.Generator().manual_seed(2))
    way = torch.stack(list(generating.interpolate(keys, 10)))
    assert way.shape == (40, 2, 3)
    assert torch.equal(way[::10], keys)
    # No key is special: beginning with another one shows the same way from there, across the seam.
    turned = torch.stack(list(generating.interpolate(keys.roll(-1, dims=0), 10)))
    torch.testing.assert_close(turned, way.roll(-10, dims=0), atol=1e-5, rtol=1e-5)
    # Smooth: second differences are those of a curve with a continuous bend, also at the keys and at the seam.
    fine = torch.stack(list(generating.interpolate(keys.double(), 200))).double()
    speed = fine.roll(-1, dims=0) - fine
    jumps = (speed.roll(-1, dims=0) - speed).norm(dim=[1, 2])
    assert jumps.max() < 0.05 * speed.norm(dim=[1, 2]).max()
    # Points on a circle give a circle, within the error of a cubic.
    angle = torch.arange(8) * torch.pi / 4
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]
    radius = torch.stack(list(generating.interpolate(circle, 16))).norm(dim=2)
    assert (radius - 1).abs().max() < 5e-3
    assert len(list(generating.interpolate(keys[:2], 5))) == 10


def gif_frames(path):
    with PIL.Image.open(path) as image:
        return [np.array(each.convert("RGB")).astype(int) for each in PIL.ImageSequence.Iterator(image)]


def test_a_video_goes_through_the_pictures(use, run, tmp_path):
    use(Toy())
    folder, output = run("--seeds=0-2", "--video=walk.gif", "--frames=5", "--fps=25")
    frames = gif_frames(folder / "walk.gif")
    assert len(frames) == 15 and "15 frames, 0.6 s" in output
    for i in range(3):
        assert (
            np.abs(frames[5 * i] - read_image(folder / f"seed{i:04d}.png")).mean() < 2
        )  # a palette is between
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:] + frames[:1], strict=True)]
    assert steps[-1] < 2 * np.median(steps)  # the way back to the first is closed, too
    with PIL.Image.open(folder / "walk.gif") as image:
        assert image.info["duration"] == 40 and image.info["loop"] == 0
    elsewhere = tmp_path / "made for it" / "walk.gif"
    run("--seeds=3,4", f"--video={elsewhere}", "--frames=2")
    assert len(gif_frames(elsewhere)) == 4


@pytest.mark.skipif(not video.has_ffmpeg(), reason=f"needs an optional package: {video.INSTALL}")
def test_a_video_as_mp4(use, run):
    import imageio_ffmpeg

    use(Toy(channels=1))
    folder, _ = run("--seeds=0,1", "--video=walk.mp4", "--frames=4", "--fps=8")
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(folder / "walk.mp4"))
    assert (count, seconds) == (8, 1.0)


def test_wrong_videos(use, fails, monkeypatch):
    use(Toy())
    assert "--frames and --fps are those of a video" in fails("--seeds=0,1", "--frames=4")
    assert "--frames and --fps are those of a video" in fails("--seeds=0,1", "--fps=4")
    assert "--video moves from picture to picture: give two or more" in fails("--seeds=0", "--video=a.gif")
    assert "Videos are .mp4 or .gif files, not 'a.webm'" in fails("--seeds=0,1", "--video=a.webm")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    line = fails("--seeds=0,1", "--video=a.mp4")
    assert (
        line
        == "Error: a.mp4 needs the package imageio-ffmpeg (pip install imageio-ffmpeg); a.gif works without it"
    )


# ----------------------------------------------------------------------------------------
# Style mixing


@pytest.mark.parametrize("channels", [1, 3])
def test_style_mixing_takes_layers_from_the_columns(use, run, channels):
    G = use(Toy(channels=channels))
    folder, _ = run("--rows=0,1", "--cols=1-3", "--styles=0,2", "--trunc=0.7", script=style_mixing)
    own = {seed: G.mapping(z_of(seed), None, truncation_psi=0.7) for seed in range(4)}
    expected = {f"{s}-{s}.png": own[s] for s in range(4)}
    for row in (0, 1):
        for col in (1, 2, 3):
            mixed = [own[col][:, 0], own[row][:, 1], own[col][:, 2]]
            expected[f"{row}-{col}.png"] = torch.stack(mixed, dim=1)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*expected, "grid.png"])
    shown = {name: read_image(folder / name) for name in expected}
    for name, ws in expected.items():
        assert np.abs(shown[name].astype(int) - pixels(G.synthesis(ws, "const"))).max() <= 1
    cells = [[np.zeros([HEIGHT, WIDTH, channels]), *(shown[f"{s}-{s}.png"] for s in (1, 2, 3))]]
    cells += [[shown[f"{r}-{r}.png"], *(shown[f"{r}-{c}.png"] for c in (1, 2, 3))] for r in (0, 1)]
    grid = np.concatenate([np.concatenate(row, axis=1) for row in cells], axis=0)
    assert (read_image(folder / "grid.png") == grid).all()


def test_both_scripts_mix_alike_and_the_default_is_the_first_seven_layers(use, run, tmp_path):
    use(tiny("plain"))  # 16x16: six layers
    args = ["--rows=0", "--cols=1", "--noise-mode=random"]
    folder, _ = run(*args)
    ours = {path.name: path.read_bytes() for path in folder.iterdir()}
    run(*args, "--overwrite", script=style_mixing)
    assert ours == {path.name: path.read_bytes() for path in folder.iterdir()}
    run(*args, "--styles=0-5", "--overwrite", script=style_mixing)
    assert ours == {path.name: path.read_bytes() for path in folder.iterdir()}
    run(*args, "--styles=0", "--overwrite", script=style_mixing)
    assert ours["0-1.png"] != (folder / "0-1.png").read_bytes()
    assert (
        list(generating.mix_styles(torch.zeros(9, 1), torch.ones(9, 1), range(7))[:, 0]) == [1] * 7 + [0] * 2
    )


def test_classes_in_style_mixing(use, run, fails):
    G = use(Toy(c_dim=2))
    folder, _ = run("--rows=0", "--cols=1", "--styles=1", "--class=1", script=style_mixing)
    w = [(z_of(seed).float() + G.classes[1])[0] for seed in (0, 1)]
    assert (
        read_image(folder / "0-1.png") == pixels(G.synthesis(torch.stack([w[0], w[1], w[0]])[None], "const"))
    ).all()
    assert "Must specify class label" in fails("--rows=5", "--cols=6", script=style_mixing)


def test_wrong_style_mixing(use, fails):
    use(Toy())
    assert "there is no layer 3, the network's are 0 to 2" in fails("--rows=0", "--cols=1", "--styles=1-3")
    assert "--rows and --cols go together" in fails("--rows=0")
    assert "--styles says what is mixed" in fails("--styles=0", "--seeds=0")
    for option in ("seeds", "grid", "video"):
        value = {"seeds": "0", "grid": "1x1", "video": "a.gif"}[option]
        assert f"leave out --{option}" in fails("--rows=0", "--cols=1", f"--{option}={value}")
    assert "Missing option '--cols'" in fails("--rows=0", script=style_mixing)


# ----------------------------------------------------------------------------------------
# Calls


def test_nothing_is_overwritten_unless_allowed(use, run, fails):
    use(Toy())
    folder, _ = run("--seeds=0-2", "--video=a.gif", "--frames=1")
    first = (folder / "seed0001.png").read_bytes()
    line = fails("--seeds=1-4", "--trunc=0.5")
    assert (
        "seed0001.png and 1 more would be replaced: choose another --outdir, or allow it with --overwrite"
        in line
    )
    assert "a.gif would be replaced" in fails("--seeds=5,6", "--video=a.gif")
    run("--seeds=1-4", "--trunc=0.5", "--overwrite")
    assert (folder / "seed0001.png").read_bytes() != first
    run("--rows=0", "--cols=1")
    assert "0-0.png and 1 more would be replaced" in fails("--rows=0", "--cols=2", script=style_mixing)


def test_pictures_that_are_no_numbers_are_not_written(use, fails):
    G = use(Toy())
    G.synthesis = lambda ws, **_: torch.full([len(ws), 3, 8, 8], float("nan"))
    assert "values that are no numbers (NaN)" in fails("--seeds=0")


def test_seeds_are_required(use, fails):
    use(Toy())
    assert "--seeds option is required when not using --projected-w" in fails()
    assert "cannot read 'x'" in fails("--seeds=x")
    assert "Missing option '--network'" in CliRunner().invoke(generate.main, ["--outdir=x"]).output


def test_help_does_not_wait_for_pytorch():
    code = "import generate, style_mixing, projector, sys; print('torch' in sys.modules)"
    root = pathlib.Path(generate.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
