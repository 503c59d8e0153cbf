# SPDX-License-Identifier: Apache-2.0
"""legacy.py: from a file of one kind to a file of another, as a command."""

import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import legacy
from training.formats import onnx_export
from training.networks import Discriminator, Generator
from training.snapshot import load_network_pkl, save_network_pkl

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


def test_safetensors_and_back(tmp_path):
    dest = tmp_path / "net.safetensors"
    assert run("--source", DEMO, "--dest", dest)[0] == 0
    assert run("--source", dest, "--dest", tmp_path / "back.pkl")[0] == 0
    assert same_networks(load_network_pkl(DEMO), load_network_pkl(tmp_path / "back.pkl"))
    with open(DEMO, "rb") as f:
        assert load_network_pkl(dest)["training_set_kwargs"] == pickle.load(f)["training_set_kwargs"]


def test_safetensors_of_one_network_to_share(tmp_path):
    """No G, no D, and nothing about where the data set was."""
    dest = tmp_path / "net.safetensors"
    assert run("--source", DEMO, "--dest", dest, "--only=G_ema")[0] == 0
    data = load_network_pkl(dest, only=["G_ema"])
    assert torch.equal(data["G_ema"].mapping.w_avg, load_network_pkl(DEMO)["G_ema"].mapping.w_avg)
    assert "D" not in data and data["training_set_kwargs"] is None
    with open(dest, "rb") as f:  # the family's own lines
        assert torch.equal(legacy.load_network_pkl(f)["G_ema"].mapping.w_avg, data["G_ema"].mapping.w_avg)
    status, output = run("--source", dest, "--dest", tmp_path / "back.pkl")
    assert status == 1 and "G is missing or not a network" in output
    dest.unlink()
    status, output = run("--source", DEMO, "--dest", dest)
    assert status == 1 and f"{dest}.json is there already; --overwrite replaces it" in output
    assert run("--source", DEMO, "--dest", dest, "--overwrite")[0] == 0 and load_network_pkl(dest)["D"]


def test_onnx(tmp_path):
    """A tiny network; that graphs draw the right pictures is tested with the export itself."""
    pytest.importorskip("onnxscript", reason="ONNX export is optional")
    pytest.importorskip("onnxruntime", reason="ONNX export is optional")
    size, widths = dict(c_dim=0, img_resolution=4, img_channels=1), dict(channel_base=16, channel_max=4)
    G = Generator(z_dim=4, w_dim=4, **size, mapping_kwargs=dict(num_layers=1), synthesis_kwargs=widths)
    save_network_pkl(tmp_path / "net.pkl", G=G, D=Discriminator(**size, **widths), G_ema=G)
    status, output = run("--source", tmp_path / "net.pkl", "--dest", tmp_path / "net.onnx")
    assert status == 0 and re.search(r"differ from PyTorch's by at most \d.\de-\d\d standard", output)
    assert (tmp_path / "net.onnx").stat().st_size > 1000


def test_onnx_that_was_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "save_onnx", lambda path, G: None)  # as without onnxruntime
    status, output = run("--source", DEMO, "--dest", tmp_path / "net.onnx")
    assert status == 0 and "were not compared with PyTorch's: pip install onnxruntime" in output


@pytest.mark.parametrize(
    ("suffix", "package", "message"),
    [
        (".safetensors", "safetensors.torch", "pip install safetensors"),
        (".onnx", "onnxscript", "pip install onnxscript onnxruntime"),
    ],
)
def test_missing_packages(tmp_path, monkeypatch, suffix, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    status, output = run("--source", DEMO, "--dest", tmp_path / f"net{suffix}")
    assert status == 1 and message in output.splitlines()[-1] and list(tmp_path.iterdir()) == []
