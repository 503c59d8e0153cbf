# SPDX-License-Identifier: Apache-2.0
"""train.py: from a command to options, its messages, continuation, and stopping a real process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from click.testing import CliRunner

import dnnlib
import train
from dnnlib.plugins import load_plugins
from ssn_ext import transfer
from training import snapshot
from training.networks import Discriminator, Generator

ROOT = Path(__file__).parents[1]
load_plugins()


def run(*args):
    """Output and exit status of the command, in this process."""
    result = CliRunner().invoke(train.build_command(), [str(arg) for arg in args])
    return result.output, result.exit_code


def plan(*args):
    """The options that --dry-run prints."""
    output, status = run("--outdir=/nowhere", "--data=demo", "--dry-run", *args)
    assert status == 0, output
    text = output.split("Training options:\n")[1]
    return json.loads(text[: text.index("\n}\n") + 2])


def error(*args):
    """The one line of a refused command."""
    output, status = run(
        "--outdir=/nowhere",
        "--dry-run",
        *([] if any("--data" in a for a in args) else ["--data=demo"]),
        *args,
    )
    assert status == 2, output
    return output.split("Error: ")[1].strip()


@pytest.fixture(scope="module")
def stylegan2_pkl(tmp_path_factory):
    """A snapshot of small untrained 32x32 networks."""
    widths = dict(channel_base=128, channel_max=16)
    data = dict(img_resolution=32, img_channels=3, c_dim=0)
    G = Generator(
        z_dim=12, w_dim=12, mapping_kwargs=dict(num_layers=3), synthesis_kwargs=dict(widths), **data
    )
    D = Discriminator(**widths, **data)
    path = tmp_path_factory.mktemp("snapshots") / "plain.pkl"
    snapshot.save_network_pkl(path, G=G, D=D, G_ema=G)
    return path


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg,kimg,batch,gamma,lr,layers,base",
    [
        ("stylegan2", 25000, 32, 10, 0.002, 8, 32768),
        ("paper256", 25000, 64, 1, 0.0025, 8, 16384),
        ("paper512", 25000, 64, 0.5, 0.0025, 8, 32768),
        ("paper1024", 25000, 32, 2, 0.002, 8, 32768),
        ("cifar", 100000, 64, 0.01, 0.0025, 2, 32768),
        ("auto", 25000, 32, 0.0002 * 32**2 / 32, 0.0025, 2, 16384),
    ],
)
def test_configs_are_the_familys(cfg, kimg, batch, gamma, lr, layers, base):
    c = plan(f"--cfg={cfg}")
    assert (c["total_kimg"], c["batch_size"], c["loss_kwargs"]["r1_gamma"]) == (kimg, batch, gamma)
    assert c["G_opt_kwargs"] == dict(class_name="torch.optim.Adam", lr=lr, betas=[0.0, 0.99], eps=1e-8)
    assert c["G_kwargs"]["mapping_kwargs"]["num_layers"] == layers
    assert c["G_kwargs"]["synthesis_kwargs"]["channel_base"] == c["D_kwargs"]["channel_base"] == base
    assert c["metrics"] == ["fid50k_full"]
    assert c["ada_target"] == 0.6 and len(c["augment_kwargs"]) == 1 + 12  # bgc


@pytest.mark.parametrize(
    "args,name",
    [
        ([], "00000-lorelei32-auto1"),
        (
            ["--mirror=1", "--cfg=cifar", "--gamma=10", "--kimg=5", "--batch=8"],
            "00000-lorelei32-mirror-cifar-gamma10-kimg5-batch8",
        ),
        (
            ["--subset=5", "--aug=fixed", "--p=0.3", "--augpipe=bg"],
            "00000-lorelei32-subset5-auto1-fixed-p0.3-bg",
        ),
        (["--cfg=ssn", "--lambda-d=10", "--aug=noaug"], "00000-lorelei32-ssn-noaug-lambda10"),
    ],
)
def test_run_directory_names(args, name):
    assert plan(*args)["run_dir"] == os.path.join("/nowhere", name)


def test_options_do_what_they_say(tmp_path):
    c = plan(
        "--gamma=3",
        "--kimg=7",
        "--batch=8",
        "--snap=2",
        "--seed=5",
        "--subset=10",
        "--mirror=1",
        "--workers=0",
    )
    assert (
        c["loss_kwargs"]["r1_gamma"] == 3
        and c["total_kimg"] == 7
        and c["batch_size"] == 8
        and c["random_seed"] == 5
    )
    assert c["image_snapshot_ticks"] == c["network_snapshot_ticks"] == 2
    data = c["training_set_kwargs"]
    assert data["max_size"] == 10 and data["random_seed"] == 5 and data["xflip"] is True
    assert c["data_loader_kwargs"] == dict(pin_memory=True, num_workers=0)
    assert plan("--metrics=none")["metrics"] == [] and plan("--metrics=fid5k,kid5k")["metrics"] == [
        "fid5k",
        "kid5k",
    ]
    assert plan("--cfg=laptop")["metrics"] == []
    assert plan("--gpus=0")["device"] == "cpu" and plan("--device=cpu")["device"] == "cpu"
    assert plan("--aug=noaug").get("augment_kwargs") is None
    assert plan("--set=loss_kwargs.pl_weight=0")["loss_kwargs"]["pl_weight"] == 0
    assert plan("--cfg=ssn", "--set=loss_kwargs.pl_weight=0")["loss_kwargs"]["pl_weight"] == 0
    assert plan("--resume=noresume")["run_dir"].endswith("-auto1-noresume")
    assert not os.path.exists("/nowhere")


@pytest.mark.parametrize(
    "args,message",
    [
        (["--data=/no/such"], "--data: "),
        (["--gamma=-1"], "--gamma must be non-negative"),
        (["--kimg=0"], "--kimg must be at least 1"),
        (["--snap=0"], "--snap must be at least 1"),
        (["--batch=3", "--gpus=2", "--device=cpu"], "--batch must be at least 1 and divisible by --gpus"),
        (["--subset=99999"], "--subset must be between 1 and 2800"),
        (["--cond=1"], "--cond=True requires labels specified in dataset.json"),
        (["--p=0.5"], "--p can only be specified with --aug=fixed"),
        (["--aug=fixed"], "--aug=fixed requires specifying --p"),
        (["--aug=fixed", "--p=2"], "--p must be between 0 and 1"),
        (["--target=0.5", "--aug=noaug"], "--target can only be specified with --aug=ada"),
        (["--target=7"], "--target must be between 0 and 1"),
        (["--augpipe=bg", "--aug=noaug"], "--augpipe cannot be specified with --aug=noaug"),
        (["--metrics=fid"], "--metrics can only contain the following values:"),
        (["--lambda-d=5"], "--lambda-d has no use with --cfg=auto; it goes with ssn"),
        (["--cfg=ssn", "--set=loss_kwargs.kwargs=1"], "--set loss_kwargs.kwargs: kwargs is not known there"),
        (
            ["--cfg=ssn", "--latent-grid=64x64"],
            "--latent-grid: 64 rows of 64 blocks do not fit into 32x32 pixels",
        ),
        (
            ["--set=G_kwargs.synthesis_kwargs.bogus=1"],
            "--set G_kwargs.synthesis_kwargs.bogus: bogus is not known there",
        ),
        (["--gpus=0", "--device=cuda"], "--gpus=0 is the CPU, --device=cuda is not"),
        (["--seed=-1"], "Invalid value for '--seed'"),
        (["--resume=/no/such.pkl"], "--resume: /no/such.pkl is neither a run directory, a file, nor a URL"),
        (["--cfg=ssn", "--latent-grid=4"], "--latent-grid=4: expected rows x columns, such as 4x4"),
        (["--set=G_kwarg.x=1"], "--set G_kwarg.x: no G_kwarg; there are "),
        (
            ["--set=loss_kwargs.gamma=1"],
            "--set loss_kwargs.gamma: gamma is not known there; there are D, G_mapping",
        ),
        (["--set=nonsense"], "--set nonsense: expected name=value"),
        (
            ["--resume=/no/such.pkl", "--cfg=ssn"],
            "--resume: cannot read /no/such.pkl: No such file or directory",
        ),
        (["--resume=latest"], "--resume=latest: no run with a checkpoint.pt in /nowhere"),
    ],
)
def test_mistakes_get_one_clear_line(args, message):
    assert error(*args).startswith(message)


def test_missing_options_are_named():
    output, status = run("--outdir=/nowhere", "--dry-run")
    assert status == 2 and "--data is required" in output
    output, status = run("--data=demo", "--dry-run")
    assert status == 2 and "--outdir is required" in output
    output, status = run("--resume=latest", "--dry-run")
    assert status == 2 and "--resume=latest needs --outdir" in output


@pytest.mark.parametrize(
    "size,message",
    [
        (
            (66, 44),
            "pictures of 66x44 pixels are 33x22 doubled 1 times, and 32x32 is the most that can be doubled; 64x44",
        ),
        ((2, 16), "pictures must be at least 4 pixels a side, not 2x16"),
        ((31, 20), "pictures of 31x20 pixels cannot be halved; their sides must be even, and 8 at least"),
    ],
)
def test_pictures_of_unusable_sizes(tmp_path, size, message):
    PIL.Image.new("RGB", size).save(tmp_path / "one.png")
    assert error(f"--data={tmp_path}").startswith(f"--data: {message}")


def picture_folder(path, width, height):
    path.mkdir()
    PIL.Image.new("RGB", (width, height)).save(path / "one.png")
    return f"--data={path}"


def test_shape_decides_the_default_grid_and_the_row(tmp_path):
    wide = picture_folder(tmp_path / "wide", 32, 24)
    c = plan("--cfg=ssn", wide)
    assert c["training_set_kwargs"]["resolution"] == 32
    assert c["G_kwargs"]["latent_grid"] == [3, 4] and c["G_kwargs"]["z_dim"] == 64 * 12
    assert plan("--cfg=ssn", wide, "--latent-grid=2x5")["G_kwargs"]["latent_grid"] == [2, 5]
    message = "--latent-grid: 25 rows of 4 blocks do not fit into 32x24 pixels"
    assert error("--cfg=ssn", wide, "--latent-grid=25x4") == message
    # 9x16 doubled five times: the last block is b128, below any row of the papers, yet no drawing
    large = plan("--cfg=ssn", picture_folder(tmp_path / "large", 512, 288))
    assert large["G_kwargs"]["latent_grid"] == [4, 7]
    assert large["G_kwargs"]["synthesis_kwargs"]["channel_base"] == 16384
    tall = plan("--cfg=ssn", picture_folder(tmp_path / "tall", 512, 768))  # 6x4 doubled seven times
    assert tall["G_kwargs"]["latent_grid"] == [6, 4]
    assert tall["G_kwargs"]["synthesis_kwargs"]["channel_base"] == 32768
    # auto weighs R1 by the number of pixels
    c = plan(wide)
    assert c["loss_kwargs"]["r1_gamma"] == pytest.approx(0.0002 * 24 * 32 / c["batch_size"])


def test_networks_that_know_squares_only_are_named(tmp_path):
    data = picture_folder(tmp_path / "wide", 32, 24)
    message = error(data, "--set=G_kwargs.class_name=training.networks.MappingNetwork")
    assert (
        message
        == "--data: pictures are 32x24 pixels, and training.networks.MappingNetwork knows square ones only"
    )


def test_a_source_of_another_shape_is_refused(stylegan2_pkl, tmp_path):
    data = picture_folder(tmp_path / "wide", 32, 24)
    message = error("--cfg=ssn", data, f"--resume={stylegan2_pkl}")
    assert message == (
        "--resume: the network makes 32x32 pictures, --data has 32x24;"
        " --allow-partial=resolution takes what they share"
    )


def test_help_shows_plugin_options_under_their_heading():
    output, status = run("--help")
    assert status == 0
    ours = output[output.index("Options of ssn_ext:") :]
    assert "--lambda-d" in ours and "--outdir DIR" not in ours


def test_help_imports_no_torch():
    code = "import sys, train; sys.argv = ['train.py', '--help']\n"
    code += "try:\n train.build_command()()\nexcept SystemExit:\n pass\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


# --- the spatial config -------------------------------------------------------------------------------------


def test_spatial_config_takes_its_widths_from_the_source(stylegan2_pkl):
    c = plan("--cfg=ssn", f"--resume={stylegan2_pkl}", "--lambda-d=7")
    G = c["G_kwargs"]
    assert G["class_name"] == "ssn_ext.networks.SpatialGenerator"
    assert G["z_dim"] == G["w_dim"] == 12 * 16 and G["latent_grid"] == [4, 4]
    assert G["mapping_kwargs"]["num_layers"] == 3 and G["synthesis_kwargs"]["channel_base"] == 128
    assert c["D_kwargs"]["channel_max"] == 16
    assert c["loss_kwargs"]["lambda_d"] == 7 and c["transfer"] == "ssn_ext.transfer.transfer"
    assert c["resume_pkl"] == str(stylegan2_pkl) and c["ada_kimg"] == 100


def test_spatial_config_takes_the_grid_of_a_spatial_source(stylegan2_pkl, tmp_path):
    source = snapshot.load_network_pkl(stylegan2_pkl)
    S = transfer.from_stylegan2(source["G_ema"], latent_grid=[2, 4])
    path = tmp_path / "spatial.pkl"
    snapshot.save_network_pkl(path, G=S, D=source["D"], G_ema=S)
    c = plan("--cfg=ssn", f"--resume={path}")
    assert c["G_kwargs"]["latent_grid"] == [2, 4] and c["G_kwargs"]["z_dim"] == 12 * 8
    # the encoder of the source, whatever its widths: the loop can build on it
    kwargs = dict(c["G_kwargs"], img_resolution=32, img_channels=3, c_dim=0)
    assert S.state_dict().keys() == dnnlib.util.construct_class_by_name(**kwargs).state_dict().keys()
    c = plan("--cfg=ssn", f"--resume={path}", "--latent-grid=4x4")
    assert c["G_kwargs"]["latent_grid"] == [4, 4] and c["G_kwargs"]["z_dim"] == 12 * 16


def test_spatial_config_from_another_resolution(stylegan2_pkl, tmp_path):
    """32x32 pictures from 16x16 networks: refused, or the widths go on as the source's do."""
    G = Generator(
        z_dim=12, w_dim=12, c_dim=0, img_resolution=16, img_channels=3,
        synthesis_kwargs=dict(channel_base=128, channel_max=16),
    )  # fmt: skip
    D = Discriminator(c_dim=0, img_resolution=16, img_channels=3, channel_base=128, channel_max=16)
    path = tmp_path / "16.pkl"
    snapshot.save_network_pkl(path, G=G, D=D, G_ema=G)
    message = error("--cfg=ssn", f"--resume={path}")
    assert message.startswith("--resume: the network makes 16x16 pictures, --data has 32x32")
    assert message.endswith("--allow-partial=resolution takes what they share")
    c = plan("--cfg=ssn", f"--resume={path}", "--allow-partial=resolution")
    data = dict(img_resolution=32, img_channels=3, c_dim=0)
    S, new_D = (dnnlib.util.construct_class_by_name(**c[key], **data) for key in ["G_kwargs", "D_kwargs"])
    rows = transfer.transfer(snapshot.load_network_pkl(path), S, new_D, S, c["allow_partial"])
    new = {row.name for row in rows["G"] if row.what == "re-initialised"}
    assert {name for name in new if "encoder" not in name} == {
        name for name in S.state_dict() if name.startswith("synthesis.b32.") and "encoder" not in name
    }
    assert S.synthesis.b32.conv1.weight.shape[:2] == (4, 4)  # 128 // 32


def test_allow_partial(stylegan2_pkl):
    c = plan(f"--resume={stylegan2_pkl}", "--allow-partial=mapping, labels")
    assert c["allow_partial"] == c["command"]["allow_partial"] == ["mapping", "labels"]
    assert plan(f"--resume={stylegan2_pkl}")["allow_partial"] == []
    assert "allow_partial" not in plan()
    assert error(f"--resume={stylegan2_pkl}", "--allow-partial=mapping,depth") == (
        "--allow-partial=depth is not known; there are resolution, widths, mapping, labels"
    )
    assert error("--allow-partial=mapping").startswith("--allow-partial has no use without --resume")


def test_widths_without_a_source():
    """Below 256 pixels there is no row in the papers: the laptop's."""
    c = plan("--cfg=ssn")
    assert c["G_kwargs"]["z_dim"] == 64 * 16 and c["G_kwargs"]["synthesis_kwargs"]["channel_max"] == 96
    assert c["loss_kwargs"]["lambda_d"] == 100


# --- real processes -----------------------------------------------------------------------------------------

TINY = [
    *[
        "--cfg=laptop",
        "--data=demo",
        "--subset=50",
        "--gpus=0",
        "--batch=4",
        "--workers=0",
        "--aug=noaug",
        "--kimg=1",
    ],
    *[
        "--set=G_kwargs.synthesis_kwargs.channel_max=4",
        "--set=D_kwargs.channel_max=4",
        "--set=kimg_per_tick=0.02",
    ],
    *["--set=image_snapshot_ticks=null", "--set=network_snapshot_ticks=1000"],
]


def start(*args):
    """train.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_a_terminated_run_saves_and_goes_on(tmp_path):
    """SIGTERM to the whole group, workers included, as `timeout` and job schedulers send it; then
    --resume=latest with fewer options and with refused ones."""
    with start(f"--outdir={tmp_path}", *TINY, "--workers=1") as process:
        for line in process.stdout:
            if line.startswith("tick 2"):
                os.killpg(process.pid, signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode == 130, output
    (run_dir,) = (path for path in tmp_path.iterdir())
    stopped = re.search(r"Stopped at (\S+) kimg; go on with --resume=(\S+)", output)
    assert stopped and stopped[2] == str(run_dir)
    assert (run_dir / "checkpoint.pt").exists()

    kimg = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])["Progress/kimg"]["mean"]
    output, status = run(f"--outdir={tmp_path}", "--resume=latest", "--gamma=5", "--dry-run")
    assert (
        status == 2
        and "goes on with the run's own options, but the command says --gamma=5.0 (was None)" in output
    )
    output, status = run(f"--outdir={tmp_path}", f"--resume={run_dir}", "--kimg=2", "--dry-run")
    assert status == 0 and "Training duration: 2 kimg" in output and f"Output directory:  {run_dir}" in output

    # the shortest end: as if the run had been all but complete
    saved = json.loads((run_dir / "training_options.json").read_text())
    saved["total_kimg"] = kimg + 0.03
    (run_dir / "training_options.json").write_text(json.dumps(saved))
    with start(f"--outdir={tmp_path}", "--resume=latest") as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert f"Continuing at {float(stopped[1]):.1f} kimg..." in output and "Exiting..." in output
    assert [path.name for path in tmp_path.iterdir()] == [run_dir.name]
    assert len(list(run_dir.glob("network-snapshot-*.pkl"))) >= 1
    log = (run_dir / "log.txt").read_text()
    assert "Stopped at" in log and "Continuing at" in log
    ticks = [
        json.loads(line)["Progress/tick"]["mean"]
        for line in (run_dir / "stats.jsonl").read_text().splitlines()
    ]
    assert ticks == list(range(len(ticks)))


# --- the house's promises -----------------------------------------------------------------------------------

TOY_PLUGIN = '''
from metrics.metric_main import METRICS
from training.configs import CONFIGS, add_option

def register():
    CONFIGS.register("toy", "toy_ext.plugin.toy")
    METRICS.register("toy_metric", "toy_ext.plugin.toy_metric")
    add_option("--toyness", heading="toy_ext", configs=["toy"], desc="toy{}", type=int, help="How much of a toy")

def toy(c, opts):
    """A toy."""
    from training.configs import laptop
    laptop(c, opts)
    c.loss_kwargs.r1_gamma = opts.toyness or 1

def toy_metric(opts):
    """The answer."""
    return dict(toy_metric=42.0)
'''


def test_a_dropped_in_plugin_adds_config_option_and_metric(tmp_path):
    for name in ["dnnlib", "torch_utils", "training", "metrics", "demo"]:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["train.py", "calc_metrics.py"]:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "toy_ext").mkdir()
    (tmp_path / "toy_ext" / "plugin.py").write_text(TOY_PLUGIN)

    def output(*args):
        return subprocess.run(
            [sys.executable, *args], cwd=tmp_path, text=True, check=True, capture_output=True
        ).stdout

    text = output(
        "train.py",
        "--outdir=runs",
        "--data=demo",
        "--cfg=toy",
        "--toyness=3",
        "--metrics=toy_metric",
        "--dry-run",
    )
    assert '"r1_gamma": 3' in text and "00000-lorelei32-toy-toy3" in text and "Dry run; exiting." in text
    assert "Options of toy_ext:" in output("train.py", "--help")
    assert "toy_metric" in output("calc_metrics.py", "--list")


def test_nothing_below_the_plugin_names_it():
    word = re.compile(r"\bssn", re.IGNORECASE)
    places = ["train.py", "calc_metrics.py", "training", "metrics", "torch_utils", "dnnlib"]
    files = [
        f
        for place in places
        for f in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*"))
    ]
    found = [str(f) for f in files if f.is_file() and word.search(f.read_bytes().decode("latin-1"))]
    assert found == []
