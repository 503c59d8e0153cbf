# SPDX-License-Identifier: Apache-2.0
"""What is found out before a run directory is made."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from training import configs, rehearsal, snapshot, training_loop

SSN = ["--cfg=ssn", "--latent-grid=2x2"]


@pytest.mark.parametrize(
    "options, message",
    [
        ([*SSN, "--set=loss_kwargs.distortion=typo"], "distortion 'typo' is not known; there are mse, features, emd"),
        ([*SSN, "--set=loss_kwargs.lambda_d=-1"], "lambda_d must be a number from 0 on, not -1"),
        ([*SSN, "--set=loss_kwargs.lambda_d=null"], "lambda_d must be a number from 0 on, not None"),
        ([*SSN, "--set=loss_kwargs.dist_interval=0"], "dist_interval must be a whole number from 1 on, not 0"),
        ([*SSN, "--set=loss_kwargs.dist_blocks=1.5"], "dist_blocks must be a whole number from 1 on, not 1.5"),
        ([*SSN, "--set=loss_kwargs.dist_batch_shrink=x"], "dist_batch_shrink must be a whole number"),
        ([*SSN, "--set=G_kwargs.latent_grid=4"], "TypeError: 'int' object is not subscriptable"),
        (["--set=loss_kwargs.style_mixing_prob=2"], "style_mixing_prob must be a number from 0 to 1, not 2"),
        (["--set=loss_kwargs.pl_weight=[1]"], "pl_weight must be a number from 0 on, not [1]"),
        (["--set=loss_kwargs.pl_batch_shrink=0"], "pl_batch_shrink must be a whole number from 1 on, not 0"),
        (["--set=loss_kwargs.pl_decay=1.5"], "pl_decay must be a number from 0 to 1, not 1.5"),
        (["--set=loss_kwargs.r1_gamma=-1"], "r1_gamma must be a number from 0 on, not -1"),
        (["--set=G_kwargs.synthesis_kwargs.architecture=foo"], "AssertionError: foo"),
        (["--set=G_kwargs.mapping_kwargs.activation=foo"], "AssertionError: act is 'foo'; accepted: linear"),
        (["--set=D_kwargs.epilogue_kwargs.mbstd_group_size=0"], "RuntimeError: "),
        (["--set=G_opt_kwargs.lr=-1"], "Invalid learning rate"),
        (["--set=D_opt_kwargs.betas=5"], "TypeError: 'int' object is not iterable"),
        (["--set=G_opt_kwargs.nope=1"], "--set G_opt_kwargs.nope: nope is not known there"),
        (["--set=augment_kwargs.xflip=[1]"], "--set augment_kwargs.xflip: expected a number"),
        (["--set=training_set_kwargs.resolution=64"], "is 8x8, resolution is 64"),
        (["--set=training_set_kwargs.path=nowhere"], "Path must point to a directory or zip: 'nowhere'"),
    ],
)  # fmt: skip
def test_a_set_option_that_cannot_be_is_named_before_anything_is_made(tiny_run, options, message):
    result = tiny_run(*options)
    lines = [line for line in result.output.splitlines() if "Error: " in line]
    assert result.status == 2 and result.dir is None and len(lines) == 1
    name = options[-1].removeprefix("--set=").partition("=")[0]
    assert (
        "Error: --set " in lines[0] and name in lines[0] and message in lines[0]
    )  # beside others of its part


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("G_reg_interval=0", "G_reg_interval must be a positive whole number or null, not 0"),
        ("D_reg_interval=x", "D_reg_interval must be a positive whole number or null, not x"),
        ("image_snapshot_ticks=1.5", "image_snapshot_ticks must be a positive whole number or null, not 1.5"),
        ("network_snapshot_ticks=-1", "network_snapshot_ticks must be a positive whole number or null, not -1"),
        ("ada_interval=0", "ada_interval must be a positive whole number, not 0"),
        ("ada_kimg=0", "ada_kimg must be a positive number, not 0"),
        ("ada_target=2", "ada_target must be a number from 0 to 1 or null, not 2"),
        ("augment_p=abc", "augment_p must be a number from 0 on, not abc"),
        ("ema_kimg=-1", "ema_kimg must be a number from 0 on, not -1"),
        ("ema_rampup=0", "ema_rampup must be a positive number or null, not 0"),
        ("random_seed=-1", "random_seed must be a whole number from 0 to 2147483647, not -1"),
        ("total_kimg=0", "total_kimg must be a positive number, not 0"),
        ("kimg_per_tick=true", "expected a number in place of"),
        ("batch_size=null", "batch_size must be a positive whole number, not None"),
        ("data_loader_kwargs.num_workers=-1", "data_loader_kwargs.num_workers must be a whole number from 0 on"),
        ("data_loader_kwargs.prefetch_factor=0", "data_loader_kwargs.prefetch_factor must be a positive whole"),
        ("training_set_kwargs.max_size=0", "training_set_kwargs.max_size must be a positive whole number or null"),
        ("training_set_kwargs.use_labels=5", "training_set_kwargs.use_labels must be true or false, not 5"),
        ("cudnn_benchmark=abc", "cudnn_benchmark must be true or false, not abc"),
        ("G_kwargs.z_dim=1.5", "G_kwargs.z_dim must be a positive whole number, not 1.5"),
        ("G_kwargs.w_dim=null", "G_kwargs.w_dim must be a positive whole number, not None"),
        ("D_kwargs.channel_max=0", "D_kwargs.channel_max must be a positive whole number, not 0"),
        ("G_kwargs.mapping_kwargs.num_layers=-1", "num_layers must be a whole number from 0 on, not -1"),
        ("metrics=fid50k", 'metrics must be a list of names, not "fid50k"'),
        ('metrics=["nope"]', "--metrics can only contain the following values"),
        ('log=["nope"]', "--log can only contain tensorboard, wandb"),
        ('tick_hooks=["no.such.Hook"]', "there is no 'no.such.Hook' to import"),
        ("transfer=no.such", "there is no 'no.such' to import"),
        ("G_kwargs.class_name=training.networks.Nope", "there is no 'training.networks.Nope' to import"),
        ("loss_kwargs.class_name=5", "--set loss_kwargs.class_name: there is no 5 to import"),
        ("resume_pkl=some.pkl", "resume_pkl is not known there"),
    ],
)  # fmt: skip
def test_limits(tiny_run, assignment, message):
    result = tiny_run(f"--set={assignment}")
    assert result.status == 2 and result.dir is None and message in result.output, result.output


def test_what_may_be_null_may(tiny_run):
    result = tiny_run("--set=G_reg_interval=null", "--set=network_snapshot_ticks=null", "--dry-run")
    assert result.status == 0, result.output


def test_the_rehearsal_draws_no_random_numbers(ds):
    """And gives no tensor a value."""
    before = torch.get_rng_state()
    options = dict(cfg="laptop", data=str(ds), gpus=0, set=["G_kwargs.z_dim=8"])
    configs.make_config(options)
    assert torch.equal(torch.get_rng_state(), before)


# --- the --resume file --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(ds, tmp_path_factory):
    """A snapshot of tiny networks."""
    from pathlib import Path

    from click.testing import CliRunner

    import train
    from tests.conftest import SHORT, TINY

    outdir = tmp_path_factory.mktemp("trained")
    args = [f"--outdir={outdir}", f"--data={ds}", *TINY, *SHORT]
    assert CliRunner().invoke(train.build_command(), args).exit_code == 0
    return sorted(Path(outdir).rglob("network-snapshot-*.pkl"))[-1]


def test_networks_that_do_not_match_leave_no_run_directory(tiny_run, trained):
    result = tiny_run(f"--resume={trained}", "--set=G_kwargs.mapping_kwargs.num_layers=3")
    assert result.status == 2 and result.dir is None
    assert "Error: --resume: " in result.output and "--allow-partial=mapping" in result.output
    allowed = tiny_run(
        f"--resume={trained}", "--set=G_kwargs.mapping_kwargs.num_layers=3", "--allow-partial=mapping"
    )
    assert allowed.status == 0, allowed.output


def test_so_do_those_of_a_url(tiny_run, trained, tmp_path):
    """Which a dry run does not fetch."""
    wrong = [f"--resume=file://{trained}", "--set=G_kwargs.mapping_kwargs.num_layers=3"]
    assert tiny_run(*wrong, "--dry-run").status == 0
    result = tiny_run(*wrong)
    assert result.status == 2 and result.dir is None and "Error: --resume: " in result.output
    missing = tiny_run(f"--resume=file://{tmp_path}/missing.pkl")
    assert missing.status == 2 and missing.dir is None and "cannot read" in missing.output


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_resume_file_is_read_once(tiny_run, trained, monkeypatch, scheme):
    reads = []
    original = snapshot.load_network_pkl
    monkeypatch.setattr(
        snapshot, "load_network_pkl", lambda source, **kw: (reads.append(source), original(source, **kw))[1]
    )
    result = tiny_run(f"--resume={scheme}{trained}")
    assert result.status == 0, result.output
    assert [str(each) for each in reads] == [f"{scheme}{trained}"] and not snapshot._planned


def test_a_file_that_changed_after_planning_is_read_again(trained, tmp_path):
    path = tmp_path / "a.pkl"
    shutil.copy(trained, path)
    first = snapshot.load_planned(path)
    assert snapshot.take_planned(path) is first
    assert snapshot.take_planned(path) is not first  # handed over once
    first = snapshot.load_planned(path)
    path.write_bytes(path.read_bytes() + b" ")
    assert snapshot.take_planned(path) is not first
    first = snapshot.load_planned(path)
    snapshot.forget_planned()
    assert snapshot.take_planned(path) is not first


def test_several_processes_keep_nothing_of_it_in_the_first(trained):
    snapshot.load_planned(trained)
    configs.check_resume(configs.dnnlib.EasyDict(resume_pkl=str(trained), num_gpus=2))
    assert not snapshot._planned


def test_square_networks_into_pictures_that_are_not(tiny_run, trained, tmp_path):
    """With --allow-partial=resolution: the constant is resized, what has a value per pixel starts anew."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        PIL.Image.fromarray(np.full([8, 12, 3], 20 * i, dtype=np.uint8)).save(flat / f"{i}.png")
    refused = tiny_run(f"--data={flat}", f"--resume={trained}")
    assert refused.status == 2 and refused.dir is None and "--allow-partial=resolution" in refused.output
    result = tiny_run(f"--data={flat}", f"--resume={trained}", "--allow-partial=resolution")
    assert result.status == 0, result.output
    assert "G, G_ema resized (resolution): synthesis.b4.const" in result.output
    assert "D re-initialised (resolution): b4.fc.weight" in result.output
    assert "Image resolution:  12 x 8 (width x height)" in result.output
    square = tiny_run("--dry-run")
    assert "Image resolution:  8\n" in square.output


def test_the_rehearsal_builds_what_the_loop_builds(ds):
    """The same arguments, from one function."""
    assert rehearsal.network_shapes is training_loop.network_shapes
    options = dict(cfg="laptop", data=str(ds), gpus=0)
    c, _desc = configs.make_config(options)
    assert json.dumps(c.training_set_kwargs)
    rehearsal.check_parts(c, [])
