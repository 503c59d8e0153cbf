# SPDX-License-Identifier: Apache-2.0
"""legacy.py: from a file of one kind to a file of another, as a command."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import legacy
from training.snapshot import load_network_pkl

DEMO = Path(__file__).parents[1] / "demo" / "lorelei32.pkl"


def run(*args):
    """Exit status and output of the command, in this process."""
    result = CliRunner().invoke(legacy.main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def same_networks(a, b):
    for key in ["G", "D", "G_ema"]:
        ours, theirs = a[key].state_dict(), b[key].state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return True


def test_pickle_to_pickle(tmp_path):
    dest = tmp_path / "copy.pkl"
    status, output = run("--source", DEMO, "--dest", dest)
    assert status == 0 and output.splitlines()[-1] == "Done."
    assert same_networks(load_network_pkl(DEMO), load_network_pkl(dest))
    with open(dest, "rb") as f:  # the family's own way of opening it
        assert list(pickle.load(f)) == ["training_set_kwargs", "G", "D", "G_ema", "augment_pipe"]


def test_nothing_is_overwritten_unasked(tmp_path):
    dest = tmp_path / "copy.pkl"
    dest.write_bytes(b"precious")
    status, output = run("--source", DEMO, "--dest", dest)
    assert (
        status == 1
        and "is there already; --overwrite replaces it" in output
        and dest.read_bytes() == b"precious"
    )
    assert run("--source", DEMO, "--dest", dest, "--overwrite")[0] == 0
    assert load_network_pkl(dest)["G_ema"].z_dim == 1024


def test_force_fp16(tmp_path):
    status, _output = run("--source", DEMO, "--dest", tmp_path / "half.pkl", "--force-fp16=1")
    half = load_network_pkl(tmp_path / "half.pkl")
    assert status == 0 and half["G_ema"].init_kwargs.synthesis_kwargs["num_fp16_res"] == 4
    assert half["D"].b32.use_fp16 and not load_network_pkl(DEMO)["D"].b32.use_fp16


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dest=x.bin"], "--dest=x.bin: the name must end in .pkl, .safetensors, .onnx"),
        (["--dest=nowhere/x.pkl"], "there is no folder"),
        (["--dest=x.pkl", "--only=G_ema"], "--only=G_ema goes with .safetensors"),
        (["--dest=x.pkl", "--source=missing.pkl"], "cannot read missing.pkl"),
        (["--dest=x.pkl", "--source=page.pkl"], "page.pkl is not a network snapshot"),
        (["--dest=x.pkl", "--source=evil.pkl"], "evil.pkl asks for builtins.eval: nothing was run"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    Path("page.pkl").write_text("<html>")
    Path("evil.pkl").write_bytes(b"\x80\x02cbuiltins\neval\nV1\n\x85R.")
    source = [] if any(arg.startswith("--source") for arg in args) else [f"--source={DEMO}"]
    status, output = run(*source, *args)
    error = output.strip().splitlines()[-1]
    assert status == 1 and error.startswith("Error: ") and message in error
    assert not Path("x.pkl").exists()


def test_trust_pickle(tmp_path):
    layer = torch.nn.Linear(1, 1)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(dict(G=layer, D=layer, G_ema=layer)))
    source = ["--source", tmp_path / "net.pkl", "--dest", tmp_path / "copy.pkl"]
    assert "torch.nn.modules.linear.Linear" in run(*source)[1]
    assert run(*source, "--trust-pickle")[0] == 0 and (tmp_path / "copy.pkl").exists()


def test_open_files_and_urls(tmp_path):
    shutil.copy(DEMO, tmp_path / "net.pkl")
    with open(tmp_path / "net.pkl", "rb") as f:
        data = legacy.load_network_pkl(f)
    assert same_networks(data, legacy.load_network_pkl((tmp_path / "net.pkl").as_uri()))
    assert same_networks(data, legacy.load_network_pkl(str(tmp_path / "net.pkl")))
