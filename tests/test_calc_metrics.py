# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import dnnlib.plugins
import dnnlib.util
from metrics import detectors, metric_main
from torch_utils import custom_ops
from training import networks, snapshot

ROOT = pathlib.Path(metric_main.__file__).parents[1]
spec = importlib.util.spec_from_file_location("calc_metrics", ROOT / "calc_metrics.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


class Averages(torch.nn.Module):
    """Features: the mean of each channel; perceptual features: all pixels."""

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = True,
        return_lpips: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        x = img.to(torch.float32) / 127.5
        if no_output_bias:
            return x.mean(dim=[2, 3]).softmax(dim=1)
        return x.flatten(1) if return_lpips else x.mean(dim=[2, 3])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A cache of the test's own, quick metrics, and no plug-ins but the metrics registered here."""
    dnnlib.util.set_cache_dir(str(tmp_path / "cache"))
    monkeypatch.setattr(script, "load_plugins", lambda: [])
    sizes = dict(max_real=None, num_gen=8)
    monkeypatch.setattr(metric_main.METRICS.resolve("fid5k"), "settings", sizes)
    subsets = dict(num_subsets=2, max_subset_size=5)
    monkeypatch.setattr(metric_main.METRICS.resolve("kid5k"), "settings", dict(sizes, **subsets))
    yield
    dnnlib.util.set_cache_dir(None)


@pytest.fixture(scope="module")
def networks_of_a_run():
    """G and D of 8x8 pictures."""
    common = dict(c_dim=0, img_resolution=8, img_channels=3)
    widths = dict(channel_base=64, channel_max=8)
    G = networks.Generator(z_dim=8, w_dim=8, synthesis_kwargs=widths, **common)
    return G, networks.Discriminator(**common, **widths)


@pytest.fixture
def data(tmp_path):
    """A folder of 12 pictures, 8x8."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for i, picture in enumerate(np.random.RandomState(0).randint(256, size=[12, 8, 8, 3]).astype(np.uint8)):
        PIL.Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return str(folder)


@pytest.fixture
def run_dir(tmp_path, data, networks_of_a_run):
    """A run directory with one snapshot."""
    folder = tmp_path / "00000-run"
    folder.mkdir()
    (folder / "training_options.json").write_text("{}")
    save(folder / "network-snapshot-000004.pkl", networks_of_a_run, data)
    return folder


def save(path, nets, data, **extra):
    kwargs = None
    if data is not None:
        kwargs = dict(class_name="training.dataset.ImageFolderDataset", path=data, xflip=True, **extra)
    snapshot.save_network_pkl(str(path), G=nets[0], D=nets[1], G_ema=nets[0], training_set_kwargs=kwargs)
    return str(path)


def save_script(module, path):
    """Writes a TorchScript file; returns its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return str(path)


@pytest.fixture
def detector(tmp_path):
    """A TorchScript file."""
    return save_script(Averages(), tmp_path / "averages.pt")


@pytest.fixture
def detector_pair(tmp_path):
    """A folder with both files under NVIDIA's names."""
    folder = tmp_path / "detectors"
    folder.mkdir()
    for name in detectors.OFFICIAL_FILES:
        save_script(Averages(), folder / name)
    return str(folder)


def call(*args):
    return CliRunner().invoke(script.calc_metrics, [str(a) for a in args])


def records(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines() if line.startswith('{"results"')]


@pytest.mark.parametrize(
    "name",
    ["os.system", "antigravity.Dataset", "training.dataset.torch.load", "dnnlib.util.call_func_by_name"],
)
def test_a_snapshot_does_not_choose_code(tmp_path, data, networks_of_a_run, name):
    """Its data set's class would be made: only ours may be."""
    path = save(tmp_path / "net.pkl", networks_of_a_run, data, func_name="os.abort")
    content = snapshot.load_network_pkl(path)
    content["training_set_kwargs"]["class_name"] = name
    snapshot.save_network_pkl(path, **content)
    result = call("--network", path, "--metrics=fid5k", "--gpus=0")
    assert (
        result.exit_code == 1
        and f"its data set is a {name!r}, which is not one of this program" in result.output
    )
    assert "antigravity" not in sys.modules


def test_help_is_instant():
    code = "import sys, runpy; sys.argv = ['calc_metrics.py', '--help']\n"
    code += "try: runpy.run_path('calc_metrics.py', run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False" and "--detector" in done.stdout


def test_list():
    result = call("--list")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names == metric_main.list_valid_metrics()
    assert re.search(r"^ppl2_wend +Perceptual path length", result.output, re.MULTILINE)


def test_results_go_to_the_run(run_dir, detector):
    pkl = run_dir / "network-snapshot-000004.pkl"
    result = call("--network", pkl, "--metrics=fid5k,kid5k", "--gpus=0", "--detector", detector, "--seed=3")
    fid, kid = records(result)
    assert list(fid["results"]) == ["fd5k_averages"] and list(kid["results"]) == ["kd5k_averages"]
    for record in (fid, kid):
        assert record["snapshot_pkl"] == "network-snapshot-000004.pkl"
        details = record["details"]
        assert details["num_real"] == 12 and details["num_gen"] == 8 and details["seed"] == 3
        assert details["detector"] == "averages" and len(details["detector_sha256"]) == 64
        assert details["data"] == "faces" and len(details["data_hash"]) == 64 and details["mirror"] is False
        assert details["dtype"] == "float32" and details["device"] == "cpu" and details["resize"]
    assert json.loads((run_dir / "metric-fid5k.jsonl").read_text()) == fid
    assert "Calculating kid5k..." in result.output

    again = call("--network", pkl, "--metrics=fid5k", "--gpus=0", "--detector", detector, "--verbose=0")
    assert len(again.output.splitlines()) == 1  # nothing but the result
    assert len((run_dir / "metric-fid5k.jsonl").read_text().splitlines()) == 2


def test_a_seed_is_a_result(run_dir, detector):
    def fid(*more):
        pkl = run_dir / "network-snapshot-000004.pkl"
        args = ("--network", pkl, "--metrics=fid5k", "--device=cpu", "--detector", detector, *more)
        return records(call(*args))[0]["results"]["fd5k_averages"]

    assert fid() == fid() == fid("--metrics=kid5k,fid5k", "--metrics=fid5k")
    assert fid() != fid("--seed=1")


def test_options_of_the_data(tmp_path, data, networks_of_a_run, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "launch", seen.append)
    pkl = save(tmp_path / "net.pkl", networks_of_a_run, "/elsewhere", resolution=64, max_size=7)
    assert call("--network", pkl, "--metrics=none").exit_code == 0
    assert call("--network", pkl, "--data", data, "--mirror=1", "--metrics=ppl").exit_code == 0
    assert call("--network", pkl, "--data=demo").exit_code == 0
    looked_up, given, demo = (args.dataset_kwargs for args in seen)
    name = "training.dataset.ImageFolderDataset"
    rest = dict(resolution=8, use_labels=False)
    assert looked_up == dict(class_name=name, path="/elsewhere", xflip=True, max_size=7, **rest)
    assert given == dict(class_name=name, path=data, xflip=True, **rest)
    assert demo.path == str(ROOT / "demo" / "lorelei32.zip") and os.path.isfile(demo.path)
    assert [args.metrics for args in seen] == [[], ["ppl"], ["fid50k_full"]]
    assert seen[0].run_dir is None


def error(*args):
    result = call(*args)
    assert result.exit_code != 0 and "Traceback" not in result.output
    return result.output


def test_mistakes(tmp_path, data, networks_of_a_run, detector, monkeypatch):
    pkl = save(tmp_path / "net.pkl", networks_of_a_run, None)
    net = f"--network={pkl}"
    message = error(net, "--metrics=fid5k,fid6k")
    assert "--metrics can only contain the following values:\n  fid50k_full\n  kid50k_full" in message
    assert "--gpus must be at least 1" in error(net, "--gpus=-1")
    assert "--device=cuda is not" in error(net, "--gpus=0", "--device=cuda")
    assert "--network must point to a file or URL" in error("--network=missing.pkl")
    assert "--network: " in error(f"--network={detector}")
    assert "Could not look up dataset options; please specify --data" in error(net)
    assert "--data: nowhere is not there" in error(net, "--data=nowhere")
    rest = (net, "--data", data, "--gpus=0")
    assert "--detector: 'x' is neither" in error(*rest, "--detector=x")
    assert "Inception score needs" in error(*rest, "--metrics=is50k", "--detector", detector)

    def offline(url, **_):
        raise OSError(f"Cannot download {url} (ConnectionError)")

    monkeypatch.setattr(dnnlib.util, "open_url", offline)
    message = error("--network", "https://host.name/net.pkl")
    assert "--network: " in message and "host.name" in message


def test_detector_out_of_reach(tmp_path, data, networks_of_a_run, monkeypatch):
    pkl = save(tmp_path / "net.pkl", networks_of_a_run, data)
    real_open = dnnlib.util.open_url

    def offline(url, **kwargs):
        if "://" in url:
            raise OSError(f"Cannot download {url} (ConnectionError)")
        return real_open(url, **kwargs)

    monkeypatch.setattr(dnnlib.util, "open_url", offline)
    message = error("--network", pkl, "--gpus=0")
    assert "inception-2015-12-05.pt cannot be fetched" in message
    assert "--detector=efficientnet-lite0" in message


def test_mistakes_that_show_late(tmp_path, networks_of_a_run, detector):
    pkl = save(tmp_path / "net.pkl", networks_of_a_run, None)
    large = tmp_path / "large"
    large.mkdir()
    PIL.Image.new("RGB", (16, 16)).save(large / "a.png")
    rest = ("--gpus=0", "--detector", detector, "--metrics=fid5k")
    message = error("--network", pkl, "--data", large, *rest)
    assert "do not match the specified resolution" in message


def test_kernels_that_cannot_be_had(tmp_path, networks_of_a_run, data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(custom_ops, "_mode", "auto")
    monkeypatch.setattr(custom_ops, "_decision", None)
    pkl = save(tmp_path / "net.pkl", networks_of_a_run, None)
    message = error("--network", pkl, "--metrics=ldbr_dist", "--gpus=0", "--data", data, "--ops=cuda")
    assert "--ops=cuda: the CUDA kernels cannot be used (no CUDA device)" in message


def test_too_many_gpus(tmp_path, networks_of_a_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pkl = save(tmp_path / "net.pkl", networks_of_a_run, None)
    assert "4 CUDA devices asked for, this machine has 0" in error("--network", pkl, "--gpus=4")


def test_metrics_of_one_call_share_what_can_be_shared(run_dir, detector_pair, monkeypatch):
    """Each picture passes each detector once for features, and once more for class probabilities."""
    balls = dict(nhood_size=3, row_batch_size=99, col_batch_size=99)
    for name, settings in [
        ("pr5k3", dict(max_real=None, num_gen=8, **balls)),
        ("is5k", dict(num_gen=8, num_splits=2)),
    ]:
        monkeypatch.setattr(metric_main.METRICS.resolve(name), "settings", settings)
    passed = Counter()
    forward = detectors.ScriptDetector.forward

    def counting(self, images, **flags):
        passed[(os.path.basename(self.path), *flags)] += len(images)
        return forward(self, images, **flags)

    monkeypatch.setattr(detectors.ScriptDetector, "forward", counting)
    names = ["fid5k", "kid5k", "pr5k3", "is5k"]
    pkl = run_dir / "network-snapshot-000004.pkl"
    args = ("--network", pkl, "--gpus=0", "--detector", detector_pair)
    found = records(call(*args, "--metrics", ",".join(names)))
    inception = "inception-2015-12-05.pt"
    assert passed == {
        (inception, "return_features"): 12 + 8,
        ("vgg16.pt", "return_features"): 12 + 8,
        (inception, "no_output_bias"): 8,
    }
    # A second call finds the real pictures in the cache; alone, each gives the same.
    passed.clear()
    alone = [records(call(*args, f"--metrics={name}"))[0] for name in names]
    assert sum(passed.values()) == 4 * 8
    assert [one["results"] for one in alone] == [one["results"] for one in found]


def test_grey_pictures_with_labels(tmp_path, detector, monkeypatch):
    """One channel is repeated to three; a conditional network gets labels of the data."""
    folder = tmp_path / "grey"
    folder.mkdir()
    for i, picture in enumerate(np.random.RandomState(0).randint(256, size=[12, 8, 8]).astype(np.uint8)):
        PIL.Image.fromarray(picture).save(folder / f"{i:02d}.png")
    labels = [[f"{i:02d}.png", i % 2] for i in range(12)]
    made_by = dict(resize_filter="lanczos")
    (folder / "dataset.json").write_text(json.dumps(dict(labels=labels, made_by=made_by)))
    common = dict(c_dim=2, img_resolution=8, img_channels=1)
    widths = dict(channel_base=64, channel_max=8)
    G = networks.Generator(z_dim=8, w_dim=8, synthesis_kwargs=widths, **common)
    D = networks.Discriminator(**common, **widths)
    pkl = save(tmp_path / "grey.pkl", (G, D), str(folder))
    monkeypatch.setitem(metric_main.METRICS.resolve("ppl2_wend_2k").settings, "num_samples", 8)
    args = ("--network", pkl, "--gpus=0", "--detector", detector)
    fid, ppl = records(call(*args, "--metrics=fid5k,ppl2_wend_2k"))
    assert fid["results"]["fd5k_averages"] > 0 and ppl["results"]["ppd2_wend_2k_averages"] > 0
    assert fid["details"]["data_resize"] == "lanczos" and "data_resize" not in ppl["details"]


def test_few_pictures_give_a_warning_of_one_line(run_dir, detector, monkeypatch):
    sizes = dict(max_real=2, num_gen=8)
    monkeypatch.setattr(metric_main.METRICS.resolve("fid5k"), "settings", sizes)
    pkl = run_dir / "network-snapshot-000004.pkl"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = call("--network", pkl, "--gpus=0", "--detector", detector, "--metrics=fid5k")
    assert len(records(result)) == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Warning: The Frechet distance of 2 pictures in 3 features is biased upwards")


def test_networks_are_read_safely_unless_trusted(tmp_path, data, detector):
    pkl = tmp_path / "net.pkl"
    pkl.write_bytes(pickle.dumps(dict(G=None, D=None, G_ema=Counter())))  # a class that is no network
    rest = ("--network", pkl, "--data", data, "--gpus=0", "--detector", detector)
    assert "collections.Counter" in error(*rest) and "--trust-pickle" in error(*rest)
    assert "G_ema is missing or not a network" in error(*rest, "--trust-pickle")


def test_shorthands_are_fetched_once_and_announced(networks_of_a_run, monkeypatch, tmp_path, data):
    asked, real_open = [], dnnlib.util.open_url
    local = save(tmp_path / "fetched.pkl", networks_of_a_run, data)

    def fetch(url, **kwargs):
        if "://" not in url:
            return real_open(url, **kwargs)
        asked.append((url, kwargs["verbose"]))
        return local

    monkeypatch.setattr(dnnlib.util, "open_url", fetch)
    result = call("--network=ffhq256", "--metrics=none")
    assert result.exit_code == 0, result.output
    base = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/"
    assert len(asked) == 1 and asked[0][0].startswith(base) and asked[0][1] is True


def test_what_fails_in_another_process_is_one_line(run_dir, monkeypatch):
    def fails(*_args, **_kwargs):
        trace = "\n\n-- Process 1 terminated with the following error:\nTraceback ...\nOSError: Image 'x' is broken"
        raise torch.multiprocessing.ProcessRaisedException(trace, 1, 4242)

    def dies(*_args, **_kwargs):
        raise torch.multiprocessing.ProcessExitedException(
            "process 1 terminated with signal SIGKILL", 1, 4242, -9
        )

    rest = ("--gpus=2", "--device=cpu", "--metrics=none")
    for launch, message in [
        (fails, "Error: OSError: Image 'x' is broken"),
        (dies, "Error: process 1 terminated with signal SIGKILL; the others have been stopped"),
    ]:
        monkeypatch.setattr("torch_utils.distributed.launch", launch)
        assert error("--network", run_dir / "network-snapshot-000004.pkl", *rest).splitlines()[-1] == message


def test_a_broken_plug_in(monkeypatch, tmp_path):
    def broken():
        raise dnnlib.plugins.PluginError("toy_ext does not load: oops")

    monkeypatch.setattr(script, "load_plugins", broken)
    assert "toy_ext does not load: oops" in error("--list")
    assert "toy_ext does not load: oops" in error("--network=x.pkl")
