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
from torch.multiprocessing import ProcessExitedException

import dnnlib
import train
from dnnlib.plugins import load_plugins
from ssn_ext import transfer
from tests.helpers import other_process_locks
from torch_utils import distributed
from training import configs, snapshot, training_loop
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


# The family's table, written out: cfg, kimg, batch, mbstd, fmaps, learning rate, gamma, EMA in kimg, its ramp-up,
# mapping layers; for `auto` at 32x32 on one GPU.
TABLE = """
    auto       25000   32  4   0.5  0.0025  0.0064  10   0.05  2
    stylegan2  25000   32  4   1    0.002   10      10   None  8
    paper256   25000   64  8   0.5  0.0025  1       20   None  8
    paper512   25000   64  8   1    0.0025  0.5     20   None  8
    paper1024  25000   32  4   1    0.002   2       10   None  8
    cifar      100000  64  32  1    0.0025  0.01    500  0.05  2
"""
BATCH_GPU = dict(auto=32, stylegan2=4, paper256=8, paper512=8, paper1024=4, cifar=32)


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_configs_are_the_familys(row):
    cfg, *numbers = row.split()
    kimg, batch, mbstd, fmaps, lr, gamma, ema, ramp, layers = (
        None if n == "None" else float(n) for n in numbers
    )
    desc, c = train.setup_training_loop_kwargs(data="demo", cfg=cfg)
    assert desc == f"lorelei32-{cfg}" + ("1" if cfg == "auto" else "")
    assert (c.total_kimg, c.batch_size, c.batch_gpu) == (kimg, batch, BATCH_GPU[cfg])
    assert (c.ema_kimg, c.ema_rampup) == (ema, ramp)
    widths = dict(channel_base=int(fmaps * 32768), channel_max=512, num_fp16_res=4, conv_clamp=256)
    assert c.G_kwargs == dict(
        class_name="training.networks.Generator",
        z_dim=512,
        w_dim=512,
        mapping_kwargs=dict(num_layers=layers),
        synthesis_kwargs=widths,
    )
    D = dict(class_name="training.networks.Discriminator", block_kwargs={}, mapping_kwargs={}, **widths)
    D.update(epilogue_kwargs=dict(mbstd_group_size=mbstd))
    adam = dict(class_name="torch.optim.Adam", lr=lr, betas=[0, 0.99], eps=1e-8)
    assert c.G_opt_kwargs == c.D_opt_kwargs == adam
    loss = dict(class_name="training.loss.StyleGAN2Loss", r1_gamma=pytest.approx(gamma))
    if cfg == "cifar":
        D.update(architecture="orig")
        loss.update(pl_weight=0, style_mixing_prob=0)
    assert c.D_kwargs == D and c.loss_kwargs == loss
    assert c.ada_target == 0.6 and len(c.augment_kwargs) == 1 + 12  # bgc
    assert c.augment_kwargs.class_name == "training.augment.AugmentPipe"
    assert (c.metrics, c.random_seed, c.image_snapshot_ticks, c.network_snapshot_ticks) == (
        ["fid50k_full"],
        0,
        50,
        50,
    )
    assert c.data_loader_kwargs == dict(pin_memory=True, num_workers=3, prefetch_factor=2)


@pytest.mark.parametrize(
    "size,gpus,batch,batch_gpu,mbstd,fmaps,lr,gamma,ema",
    [
        (64, 1, 32, 32, 4, 0.5, 0.0025, 0.0256, 10),  # 0.0002 * 64^2 / 32
        (512, 2, 16, 8, 4, 1, 0.0025, 3.2768, 5),  # 2 * min(4096 / 512, 32)
        (1024, 8, 32, 4, 4, 1, 0.002, 6.5536, 10),
        (1024, 1, 4, 4, 4, 1, 0.002, 52.4288, 1.25),
        (2048, 3, 6, 2, 2, 1, 0.002, 139.81013, 1.875),
        (16, 3, 60, 20, 4, 0.5, 0.0025, 0.0512 / 60, 18.75),  # not 64, which 3 processes cannot share
    ],
)
def test_auto_follows_resolution_and_processes(size, gpus, batch, batch_gpu, mbstd, fmaps, lr, gamma, ema):
    c = dnnlib.EasyDict(training_set_kwargs=dnnlib.EasyDict(resolution=size), num_gpus=gpus)
    configs.auto(c, dnnlib.EasyDict(img_shape=[size, size], block_resolution=size))
    assert c.batch_size == batch and c.ema_kimg == ema and c.ema_rampup == 0.05
    assert c.G_opt_kwargs.lr == lr and c.loss_kwargs.r1_gamma == pytest.approx(gamma)
    assert c.D_kwargs.channel_base == int(32768 * fmaps)
    assert c.batch_gpu == batch_gpu and c.D_kwargs.epilogue_kwargs.mbstd_group_size == mbstd


FAMILYS_ORDER = """num_gpus image_snapshot_ticks network_snapshot_ticks metrics random_seed training_set_kwargs
    data_loader_kwargs G_kwargs D_kwargs G_opt_kwargs D_opt_kwargs loss_kwargs total_kimg batch_size batch_gpu ema_kimg
    ema_rampup ada_target augment_kwargs resume_pkl ada_kimg cudnn_benchmark allow_tf32""".split()


def test_options_come_in_the_familys_order(ds):
    args = [
        "--resume=ffhq256",
        "--nobench=1",
        "--allow-tf32=1",
        "--kimg=3",
        "--workers=1",
        "--log=none",
        "--subset=5",
    ]
    c = plan(*args, f"--data={ds}")
    ours = ["device", "metric_kwargs", "tick_hooks", "log", "run_dir", "command"]
    assert [name for name in c if name not in ours] == FAMILYS_ORDER
    assert list(c)[: len(FAMILYS_ORDER)] == FAMILYS_ORDER and list(c)[-2:] == ["run_dir", "command"]
    data = ["class_name", "path", "use_labels", "max_size", "xflip", "resolution", "random_seed"]
    assert list(c["training_set_kwargs"]) == data
    fixed = list(plan("--aug=fixed", "--p=0.5"))
    assert fixed[fixed.index("ema_rampup") + 1 :][:2] == ["augment_p", "augment_kwargs"]


@pytest.mark.parametrize(
    "args,name",
    [
        ([], "00000-ds-auto1"),
        (
            ["--cond=1", "--mirror=1", "--cfg=cifar", "--gamma=10", "--kimg=5", "--batch=8"],
            "00000-ds-cond-mirror-cifar-gamma10-kimg5-batch8",
        ),
        (
            ["--subset=5", "--aug=fixed", "--p=0.3", "--augpipe=bg", "--resume=ffhq256", "--freezed=2"],
            "00000-ds-subset5-auto1-fixed-p0.3-bg-resumeffhq256-freezed2",
        ),
        (["--gpus=3", "--device=cpu", "--batch=6"], "00000-ds-auto3-batch6"),
        (["--aug=ada", "--target=0.7", "--resume=noresume"], "00000-ds-auto1-ada-target0.7-noresume"),
        (["--cond=0", "--mirror=0", "--seed=3", "--snap=1", "--fp32=1", "--nhwc=1"], "00000-ds-auto1"),
        (["--cfg=ssn", "--lambda-d=10", "--aug=noaug"], "00000-ds-ssn-noaug-lambda10"),
        (
            ["--glr=0.001", "--dlr=0.002", "--initstrength=0.25", "--freezed=1"],
            "00000-ds-auto1-freezed1-glr0.001-dlr0.002-initstrength0.25",
        ),
    ],
)
def test_run_directory_names(ds, args, name):
    assert plan(f"--data={ds}", *args)["run_dir"] == os.path.join("/nowhere", name)


def test_a_new_run_takes_the_next_number(tmp_path, ds):
    for name in ["00002-b", "00010-a", "7", "notes", "x9"]:
        (tmp_path / name).mkdir()
    (tmp_path / "00099-file").write_text("")
    output, _status = run(f"--outdir={tmp_path}", f"--data={ds}", "--dry-run")
    assert f"Output directory:  {tmp_path}/00011-ds-auto1\n" in output
    assert len(list(tmp_path.iterdir())) == 6  # a dry run makes nothing


def test_transfer_settings():
    """Any transfer: ADA moves five times as fast, no EMA ramp-up."""
    c = plan("--resume=celebahq256")
    assert c["resume_pkl"] == (
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/transfer-learning-source-nets/"
        "celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl"
    )
    assert c["ada_kimg"] == 100 and c["ema_rampup"] is None
    assert "ada_kimg" not in plan("--resume=noresume") and plan()["ema_rampup"] == 0.05


def test_the_familys_function(ds):
    """setup_training_loop_kwargs: (description, options), None for what is not given, UserError for mistakes."""
    desc, args = train.setup_training_loop_kwargs(
        data=str(ds), metrics=[], mirror=True, kimg=None, cfg=None, workers=0
    )
    assert desc == "ds-mirror-auto1" and args.metrics == [] and args.training_set_kwargs.xflip is True
    training_loop.complete_config({**args, "run_dir": "x"})  # the loop knows them all
    assert json.loads(json.dumps(args)) == args
    for wrong, message in [
        (dict(gpus=-1), "--gpus must be at least 1, or 0 for the CPU"),
        (dict(workers=-1), "--workers must be at least 0"),
        (dict(aug="some"), "--aug=some is not known; there are noaug, ada, fixed"),
        (dict(augpipe="x"), "--augpipe=x is not known; there are blit, "),
        (dict(precision="fp8"), "--precision=fp8 is not known; there are fp32, fp16, bf16"),
        (dict(cfg="paper128"), "--cfg=paper128 is not known; there are auto, stylegan2, "),
        (dict(metrics=["fid"]), "--metrics can only contain the following values:\nfid50k_full\n"),
        (dict(data=None), "--data is required"),
    ]:
        with pytest.raises(train.UserError, match=re.escape(message)):
            train.setup_training_loop_kwargs(**{"data": str(ds), **wrong})
    with pytest.raises(TypeError, match="unknown options fp16, outdir"):
        train.setup_training_loop_kwargs(data=str(ds), outdir="x", fp16=True)


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
        (["--metrics=fid"], "--metrics can only contain the following values:\nfid50k_full\nkid50k_full\n"),
        (["--freezed=-1"], "--freezed must be non-negative"),
        (["--batch=0"], "--batch must be at least 1 and divisible by --gpus"),
        (["--workers=-1"], "--workers must be at least 0"),
        (["--gpus=-1"], "--gpus must be at least 1, or 0 for the CPU"),
        (["--subset=0"], "--subset must be between 1 and 2800"),
        (["--p=-0.1", "--aug=fixed"], "--p must be between 0 and 1"),
        (["--target=-0.1"], "--target must be between 0 and 1"),
        (["--p=0.5", "--aug=noaug"], "--p can only be specified with --aug=fixed"),
        (["--target=0.5", "--aug=fixed", "--p=1"], "--target can only be specified with --aug=ada"),
        (["--fp32=1", "--precision=bf16"], "--fp32=True contradicts --precision=bf16: give one of them"),
        (["--fp32=0", "--precision=fp32"], "--fp32=False contradicts --precision=fp32: give one of them"),
        (["--precision=fp8"], "Invalid value for '--precision': 'fp8' is not one of 'fp32', 'fp16', 'bf16'."),
        (["--cfg=paper128"], "Invalid value for '--cfg': 'paper128' is not one of 'auto', 'stylegan2', "),
        (
            ["--batch-gpu=0"],
            "--batch-gpu must be at least 1 and divide the 32 pictures that each process takes of",
        ),
        (["--batch=16", "--batch-gpu=32"], "--batch-gpu must be at least 1 and divide the 16 pictures"),
        (
            ["--cfg=paper256", "--batch=36", "--batch-gpu=12"],
            "--batch, --batch-gpu: 12 pictures at a time must be a",
        ),
        (
            ["--cfg=paper256", "--gpus=3", "--device=cpu"],
            "the batch of 64 cannot be shared by 3 processes; give --batch",
        ),
        (["--glr=0"], "--glr must be positive"),
        (["--dlr=-1"], "--dlr must be positive"),
        (["--keep-last=0"], "--keep-last must be at least 1"),
        (["--best=bogus"], "--best=bogus is not a number to judge by; there are fid50k_full, "),
        (["--log=tensorboard,mlflow"], "--log can only contain tensorboard, wandb, or be none: not mlflow"),
        (["--initstrength=x"], "--initstrength must be a non-negative number, or resume"),
        (["--initstrength=-1"], "--initstrength must be a non-negative number, or resume"),
        (["--initstrength=0.5", "--aug=noaug"], "--initstrength can only be specified with --aug=ada"),
        (
            ["--initstrength=resume"],
            "--initstrength=resume needs a --resume file that was trained with augmentation",
        ),
        (["--lambda-d=5"], "--lambda-d has no use with --cfg=auto; it goes with ssn, spade"),
        (["--distortion=emd"], "--distortion has no use with --cfg=auto; it goes with ssn, spade"),
        (["--cfg=ssn", "--set=loss_kwargs.kwargs=1"], "--set loss_kwargs.kwargs: kwargs is not known there"),
        (
            ["--cfg=ssn", "--latent-grid=64x64"],
            "--latent-grid: 64 rows of 64 blocks do not fit into 32x32 pixels",
        ),
        (
            ["--set=G_kwargs.synthesis_kwargs.bogus=1"],
            "--set G_kwargs.synthesis_kwargs.bogus: bogus is not known there",
        ),
        (["--gpus=0", "--ops=cuda"], "--ops=cuda needs a GPU"),
        (["--gpus=0", "--device=cuda"], "--gpus=0 is the CPU, --device=cuda is not"),
        (["--seed=-1"], "--seed must be between 0 and 2147483647"),
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
            "--resume: /no/such.pkl is neither a run directory, a file, nor a URL",
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


HELP_GROUPS = {
    "General": "--outdir --gpus --device --snap --metrics --detector --seed --dry-run --help",
    "Data": "--data --cond --subset --mirror",
    "Base config": "--cfg --gamma --kimg --batch --glr --dlr --set",
    "Augmentation": "--aug --p --target --augpipe --initstrength",
    "Transfer": "--resume --allow-partial --freezed --trust-pickle",
    "Performance": "--batch-gpu --precision --fp32 --nhwc --ops --nobench --allow-tf32 --workers",
    "Logging": "--log --best --keep-last",
    "Options of ssn_ext": "--lambda-d --lambda-interaction --distortion --dist-blocks --pl-block-beta --latent-grid "
    "--latent-grids --grid-split --encoder-init --demodulation --style-sharpness",
}


def test_help_is_in_groups():
    """Every option once, with a help text, under its heading."""
    output, status = run("--help")
    assert status == 0
    parts = re.split(r"^(\S.*):\n", output, flags=re.MULTILINE)
    found = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        found[heading] = " ".join(
            re.findall(r"^  (?:-n, )?(--[a-z0-9-]+)", text.split("\n\n")[0], re.MULTILINE)
        )
    assert {heading: flags for heading, flags in found.items() if heading in HELP_GROUPS} == HELP_GROUPS
    assert all(param.help for param in train.build_command().params)


def test_the_page_for_the_familys_users_knows_every_option():
    """And its table of configs has the numbers of the table above."""
    page = (ROOT / "docs" / "from-stylegan2-ada.md").read_text()
    ours = page[page.index("## train.py") : page.index("## generate.py")]
    for param in train.build_command().params:
        if param.name not in configs.OPTIONS:
            assert f"`{max(param.opts, key=len)}" in ours, param.opts
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ours.splitlines()
        if line.startswith("|")
    ]
    header = next(line for line in lines if "`auto`" in line)
    table = {line[0].split(" (")[0]: line for line in lines if len(line) == len(header)}
    names = [
        "kimg",
        "batch",
        "minibatch-std group",
        "learning rate",
        "R1 gamma",
        "EMA half-life, kimg",
        "EMA ramp-up",
    ]
    for row in TABLE.strip().splitlines()[1:]:
        cfg, kimg, batch, mbstd, fmaps, *rest, layers = row.replace("None", "none").split()
        column = header.index(f"`{cfg}`")
        assert [table[name][column] for name in names] == [kimg, batch, mbstd, *rest]
        assert table["mapping layers"][column] == layers
        assert int(table["channel_base"][column]) == 32768 * float(fmaps)
        assert int(table["at a time on a GPU"][column]) == BATCH_GPU[cfg]


def test_help_imports_no_torch():
    code = "import sys, train; sys.argv = ['train.py', '--help']\n"
    code += "try:\n train.build_command()()\nexcept SystemExit:\n pass\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


# --- the spatial config -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "features", "emd"])
def test_distortion_reaches_the_loss(name):
    assert plan("--cfg=ssn", f"--distortion={name}")["loss_kwargs"]["distortion"] == name
    assert "distortion" not in plan("--cfg=ssn")["loss_kwargs"]  # as before there was a choice


def test_kinds_of_styles_reach_the_network():
    kwargs = plan("--cfg=ssn", "--demodulation=local", "--style-sharpness=2")["G_kwargs"]["synthesis_kwargs"]
    assert (kwargs["demodulation"], kwargs["style_sharpness"]) == ("local", 2)
    kwargs = plan("--cfg=ssn", "--demodulation=zero-padded")["G_kwargs"]["synthesis_kwargs"]
    assert kwargs["demodulation"] == "zero_padded" and "style_sharpness" not in kwargs


def test_the_start_of_the_encoder_reaches_the_network():
    """The paper's start has its encoder, too: up to 32x32."""
    for start, encoder in [("exact", dict(channels=24, max_resolution=4)), ("random", dict(channels=24))]:
        kwargs = plan("--cfg=ssn", f"--encoder-init={start}")["G_kwargs"]["synthesis_kwargs"]
        assert (kwargs["encoder_init"], kwargs["encoder_kwargs"]) == (start, encoder)
    assert "encoder_init" not in plan("--cfg=ssn")["G_kwargs"]["synthesis_kwargs"]
    assert plan("--cfg=ssn", "--encoder-init=none")["G_kwargs"]["synthesis_kwargs"]["encoder_init"] == "none"


def test_the_weight_of_interactions_reaches_the_loss():
    assert plan("--cfg=ssn", "--lambda-interaction=5")["loss_kwargs"]["lambda_interaction"] == 5
    assert "lambda_interaction" not in plan("--cfg=ssn")["loss_kwargs"]
    assert "--lambda-interaction has no use with --cfg=auto; it goes with ssn, spade" in error(
        "--lambda-interaction=5"
    )
    assert "not in the range x>=0" in error("--cfg=ssn", "--lambda-interaction=-1")


def test_spatial_config_takes_its_widths_from_the_source(stylegan2_pkl):
    c = plan("--cfg=ssn", f"--resume={stylegan2_pkl}", "--lambda-d=7")
    G = c["G_kwargs"]
    assert G["class_name"] == "ssn_ext.networks.SpatialGenerator"
    assert G["z_dim"] == G["w_dim"] == 12 * 16 and G["latent_grid"] == [4, 4]
    assert G["mapping_kwargs"]["num_layers"] == 3 and G["synthesis_kwargs"]["channel_base"] == 128
    assert c["D_kwargs"]["channel_max"] == 16
    assert c["loss_kwargs"]["lambda_d"] == 7 and c["transfer"] == "ssn_ext.transfer.transfer"
    assert c["resume_pkl"] == str(stylegan2_pkl) and c["ada_kimg"] == 100


def test_an_average_that_begins_with_another_kind_of_network_ramps_up(stylegan2_pkl, tmp_path):
    """G_ema of a StyleGAN2 made spatial has never seen independent blocks: its weights must not stay in the average."""
    source = snapshot.load_network_pkl(stylegan2_pkl)
    S = transfer.from_stylegan2(source["G_ema"])
    snapshot.save_network_pkl(tmp_path / "spatial.pkl", G=S, D=source["D"], G_ema=S)
    c = plan("--cfg=ssn", f"--resume={stylegan2_pkl}")
    assert c["ema_rampup"] == 0.05 and "new_kind" not in c
    assert plan("--cfg=ssn", f"--resume={tmp_path / 'spatial.pkl'}")["ema_rampup"] is None
    laptop = plan("--cfg=laptop")
    shapes = dict(c_dim=0, img_resolution=32, img_channels=3)
    G, D = (dnnlib.util.construct_class_by_name(**laptop[key], **shapes) for key in ["G_kwargs", "D_kwargs"])
    snapshot.save_network_pkl(tmp_path / "laptop.pkl", G=G, D=D, G_ema=G)
    assert plan("--cfg=laptop", f"--resume={tmp_path / 'laptop.pkl'}")["ema_rampup"] is None
    assert "new_kind" not in plan("--cfg=ssn")


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
    for grid, reach in [("4x4", 4), ("8x8", 8), ("2x2", 4)]:  # never less than the source's
        encoder = plan("--cfg=ssn", f"--resume={path}", f"--latent-grid={grid}")["G_kwargs"][
            "synthesis_kwargs"
        ]
        assert encoder["encoder_kwargs"] == dict(channels=8, max_resolution=reach)


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


def test_a_file_with_the_average_alone_cannot_be_trained_on(stylegan2_pkl, tmp_path):
    from training.formats import tensors

    tensors.save(tmp_path / "net.safetensors", snapshot.load_network_pkl(stylegan2_pkl), only=["G_ema"])
    message = error(f"--resume={tmp_path / 'net.safetensors'}", "--cfg=ssn")
    assert "net.safetensors is not a network snapshot: G is missing" in message


def test_allow_partial(stylegan2_pkl):
    c = plan(f"--resume={stylegan2_pkl}", "--cfg=ssn", "--allow-partial=mapping, labels")
    assert c["allow_partial"] == c["command"]["allow_partial"] == ["mapping", "labels"]
    assert "allow_partial" not in plan(f"--resume={stylegan2_pkl}", "--cfg=ssn")
    assert error(f"--resume={stylegan2_pkl}").endswith("--allow-partial=widths,mapping")
    assert error(f"--resume={stylegan2_pkl}", "--allow-partial=mapping,depth") == (
        "--allow-partial=depth is not known; there are resolution, widths, mapping, labels"
    )
    assert error("--allow-partial=mapping").startswith("--allow-partial has no use without --resume")


def test_widths_without_a_source():
    """Below 256 pixels there is no row in the papers: the laptop's."""
    c = plan("--cfg=ssn")
    assert c["G_kwargs"]["z_dim"] == 64 * 16 and c["G_kwargs"]["synthesis_kwargs"]["channel_max"] == 96
    assert c["G_kwargs"]["synthesis_kwargs"]["encoder_kwargs"] == dict(channels=24, max_resolution=4)
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


@pytest.mark.parametrize("code,saved", [(1, False), (7, False), (7, True)])
def test_a_process_that_ends_is_one_line(monkeypatch, tmp_path, capsys, code, saved):
    """No traceback of the process that waited; nothing at all where the other one has said why."""

    def end(*args, **kwargs):
        if saved:
            (tmp_path / "a run" / "checkpoint.pt").touch()
        raise ProcessExitedException("process 1 terminated", error_index=1, error_pid=1, exit_code=code)

    monkeypatch.setattr(distributed, "launch", end)
    with pytest.raises(SystemExit) as caught:
        train.launch(dnnlib.EasyDict(run_dir=str(tmp_path / "a run"), num_gpus=2, device="cpu"), {})
    assert caught.value.code == 1
    how = f" Go on from the last checkpoint with '--resume={tmp_path}/a run'" if saved else ""
    said = f"Error: process 1 terminated; the others have been stopped.{how}\n" if code != 1 else ""
    assert capsys.readouterr().out.endswith("Launching processes...\n" + said)


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


# --- run directories of others ------------------------------------------------------------------------------


def saved_run(folder, change):
    """A run directory with changed options, as --resume takes it."""
    c, command = train.plan(
        {
            **dict.fromkeys(train._name(f) for group in train.GROUPS.values() for f in group),
            "outdir": str(folder),
        }
        | dict(data="demo", cfg="laptop", gpus=0, set=[]),
        [],
    )
    saved = json.loads(json.dumps(dict(c, command=command)))
    changed = change(saved)
    run_dir = folder / "00000-run"
    run_dir.mkdir()
    (run_dir / "training_options.json").write_text(json.dumps(saved if changed is None else changed))
    (run_dir / "checkpoint.pt").write_bytes(b"")
    return run_dir


def test_mistakes_in_numbers(tmp_path):
    """Of options and of --set, each in one line and before anything is made."""
    for args, message in [
        (["--gamma=nan"], "loss_kwargs.r1_gamma must be a finite number, not nan"),
        (["--gamma=inf"], "loss_kwargs.r1_gamma must be a finite number, not inf"),
        (["--cfg=ssn", "--lambda-d=nan"], "'--lambda-d': nan is not a finite number"),
        (["--set=G_opt_kwargs.lr=NaN"], "G_opt_kwargs.lr must be a finite number"),
        (["--set=D_opt_kwargs.betas=[0,Infinity]"], "D_opt_kwargs.betas.1 must be a finite number"),
        (["--set=batch_size=null"], "batch_size must be a positive whole number, not None"),
        (["--set=batch_size=0"], "batch_size must be a positive whole number, not 0"),
        (["--set=batch_gpu=1.5"], "batch_gpu must be a positive whole number, not 1.5"),
        (["--set=kimg_per_tick=0"], "kimg_per_tick must be a positive number, not 0"),
        (["--set=kimg_per_tick=x"], "kimg_per_tick must be a positive number, not x"),
        (["--set=total_kimg=x"], "--set total_kimg: expected a number in place of 25000, not 'x'"),
        (["--set=loss_kwargs.r1_gamma=[1]"], "--set loss_kwargs.r1_gamma: expected a number in place of"),
        (["--set=G_kwargs=5"], "--set G_kwargs: these are class_name, z_dim, w_dim, mapping_kwargs"),
        (["--set=run_dir=elsewhere"], "--set run_dir: run_dir is not known there"),
    ]:  # fmt: skip
        output, status = run(f"--outdir={tmp_path}", "--data=demo", "--gpus=0", "-n", *args)
        assert status == 2 and message in " ".join(output.split()), (args, output)
        assert "Traceback" not in output


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no more", b"\x80\x04}."])
def test_a_resume_file_that_is_no_snapshot_makes_no_run(tmp_path, content):
    (tmp_path / "net.pkl").write_bytes(content)
    output, status = run(
        f"--outdir={tmp_path / 'runs'}", "--data=demo", "--gpus=0", f"--resume={tmp_path / 'net.pkl'}"
    )
    assert status == 2 and "net.pkl is not a network snapshot" in " ".join(output.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "outdir,message", [("", "the name of the folder is empty"), ("file", "is a file, not a folder")]
)
def test_an_outdir_that_is_none(tmp_path, outdir, message):
    (tmp_path / "file").write_text("")
    output, status = run(f"--outdir={tmp_path / outdir if outdir else ''}", "--data=demo", "--gpus=0", "-n")
    assert status == 2 and message in output


def test_options_of_a_run_are_taken(tmp_path):
    run_dir = saved_run(tmp_path, lambda saved: None)
    output, status = run(f"--resume={run_dir}", "--dry-run")
    assert status == 0 and f"Output directory:  {run_dir}" in output


@pytest.mark.parametrize(
    "where", ["training_set_kwargs", "G_kwargs", "D_opt_kwargs", "loss_kwargs", "augment_kwargs"]
)
@pytest.mark.parametrize("name", [
    "os.system", "subprocess.Popen", "training.dataset.os.system", "dnnlib.util.call_func_by_name",
    "torch_utils.persistence._reconstruct_persistent_obj", "antigravity.x", "training.snapshot.load_network_pkl",
    "torch.optim.adam.torch.load", "tests.conftest.Path", "", 5, None, ["os.system"],
])  # fmt: skip
def test_options_that_name_code_from_elsewhere(tmp_path, where, name):
    """They are read from a file, which may be anybody's."""
    run_dir = saved_run(tmp_path, lambda saved: saved[where].update(class_name=name))
    output, status = run(f"--resume={run_dir}", "--dry-run")
    assert (
        status == 2
        and f"as {where}.class_name, which is neither of this program nor of a plug-in"
        in " ".join(output.split())
    )
    assert "antigravity" not in sys.modules


def test_hooks_that_a_run_directory_names(tmp_path):
    run_dir = saved_run(tmp_path, lambda saved: saved.update(tick_hooks=["shutil.rmtree"]))
    assert "asks for 'shutil.rmtree' as tick_hooks" in " ".join(
        run(f"--resume={run_dir}", "--dry-run")[0].split()
    )
    assert run(f"--resume={run_dir}", "--trust-pickle", "--dry-run")[1] == 0


@pytest.mark.parametrize("change,message", [
    (lambda saved: [saved], "is not what train.py writes"),
    (lambda saved: {}, "is not what train.py writes"),
    (lambda saved: saved.update(more=1), "is not what train.py writes"),
    (lambda saved: saved.update(total_kimg="all"), "is damaged: total_kimg is not a number"),
    (lambda saved: saved.update(command=[]), "is damaged: command is not a dict"),
    (lambda saved: saved.update(G_kwargs="x"), "is damaged: G_kwargs is not a dict"),
    (lambda saved: saved.update(metrics="fid"), "is damaged: metrics is not a list"),
])  # fmt: skip
def test_damaged_options_of_a_run(tmp_path, change, message):
    output, status = run(f"--resume={saved_run(tmp_path, change)}", "--dry-run")
    assert status == 2 and message in " ".join(output.split())


def test_one_training_at_a_time_in_a_run_directory(tiny_run):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    result = tiny_run()
    before = {path.name: path.read_bytes() for path in result.dir.iterdir()}
    with other_process_locks(result.dir / ".lock"):
        refused = tiny_run(f"--resume={result.dir}", "--kimg=2", new=False)
    assert refused.status == 1
    assert refused.output.endswith(f"Error: another training is at work in {result.dir}\n")
    assert {path.name: path.read_bytes() for path in result.dir.iterdir()} == before
    draft = result.dir / f".{'0' * 32}.tmp"
    draft.touch()  # as a training that was killed leaves it
    assert tiny_run(f"--resume={result.dir}", new=False).status == 0
    assert not draft.exists()


def test_two_trainings_that_begin_at_once_get_two_directories(tiny_run, monkeypatch):
    def other(c):
        os.makedirs(c.run_dir)  # between the plan of this training and its launch

    monkeypatch.setattr(configs, "check_resume", other)
    result = tiny_run()
    assert result.status == 0 and result.dir.name == "00001-ds-laptop-batch4" and result.snapshots()
    first = result.dir.with_name("00000-ds-laptop-batch4")
    assert f"{first} has just been made by another training; this one goes to {result.dir}\n" in result.output
    assert list(first.iterdir()) == []


def test_a_run_directory_that_is_not_there_is_said_first(tmp_path):
    for more in [[], [f"--outdir={tmp_path}"]]:
        output, status = run(f"--resume={tmp_path}/00000-typo", *more)
        message = f"--resume: {tmp_path}/00000-typo is neither a run directory, a file, nor a URL"
        assert (output.split("Error: ")[1].strip(), status) == (message, 2)


def test_pictures_that_changed_since_a_run_began(tiny_run, ds, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(ds, data)
    result = tiny_run(f"--data={data}", "--cond=True")

    def go_on():
        again = tiny_run(f"--resume={result.dir}", "--kimg=2", new=False)
        assert again.status == 1
        return again.output.splitlines()[-1]

    (data / "dataset.json").unlink()
    assert go_on().startswith(
        f"Error: G in {result.dir}/checkpoint.pt does not fit this run; has its data set changed?"
    )
    PIL.Image.new("RGB", [16, 16]).save(data / "00.png")
    assert go_on() == (
        "Error: Image files do not match the specified resolution: '00.png' is 16x16, resolution is 8"
    )
    shutil.rmtree(data)
    assert go_on() == f"Error: Path must point to a directory or zip: '{data}'"
