# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of generators, run by onnxruntime, against PyTorch."""

import copy
import sys

import numpy as np
import pytest
import torch

from ssn_ext.networks import SpatialGenerator
from training.formats import onnx_export
from training.formats.onnx_export import save_onnx
from training.networks import Generator

reason = "ONNX export is optional"
pytest.importorskip("onnxscript", reason=reason)
onnx_ir = pytest.importorskip("onnx_ir", reason=reason)
onnx = pytest.importorskip("onnx", reason=reason)
onnxruntime = pytest.importorskip("onnxruntime", reason=reason)

SIZE = dict(img_resolution=8, img_channels=3, mapping_kwargs=dict(num_layers=1))
WIDTHS = dict(channel_base=64, channel_max=8)
SSN = dict(WIDTHS, encoder_kwargs=dict(channels=4, max_resolution=4))


def randomised(G):
    """Noise, w_avg and the SSN's encoder take part: no parameter keeps a start of zero."""
    with torch.no_grad():
        for name, tensor in [*G.named_parameters(), *G.named_buffers()]:
            if name.endswith(("noise_strength", "w_avg", "bias")) or "encoder_style" in name:
                tensor.copy_(torch.randn(tensor.shape))
    return G.train()


def plain(c_dim=2, **mapping_kwargs):
    torch.manual_seed(0)
    kwargs = dict(SIZE, mapping_kwargs=dict(num_layers=1, **mapping_kwargs), synthesis_kwargs=WIDTHS)
    return randomised(Generator(z_dim=8, c_dim=c_dim, w_dim=8, **kwargs))


def spatial():
    """Pictures that are wider than high."""
    torch.manual_seed(0)
    kwargs = dict(SIZE, img_resolution=12, img_shape=[8, 12], synthesis_kwargs=SSN)
    return randomised(SpatialGenerator(z_dim=32, c_dim=0, w_dim=32, latent_grid=[2, 2], **kwargs))


CASES = {
    "plain": (plain, dict(truncation_cutoff=2)),
    "SSN": (spatial, dict(noise_mode="none")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(file, the network, options of the export, what it returned)"""
    make, options = CASES[request.param]
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    G = make()
    return path, G, options, save_onnx(path, G, **options)


@pytest.mark.parametrize("num", [1, 5])
@pytest.mark.parametrize("psi", [1, 0.4, 0])
def test_graph_draws_the_same_pictures(case, num, psi):
    path, G, options, _error = case
    rng = np.random.RandomState(num)
    z = rng.randn(num, G.z_dim).astype(np.float32)
    c = np.eye(2, dtype=np.float32)[rng.randint(2, size=num)]
    inputs = dict(z=z, psi=np.float32([psi]), **(dict(c=c) if G.c_dim else {}))
    (img,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["img"], inputs)
    options = dict(dict(noise_mode="const"), **options)
    want = G.eval()(torch.as_tensor(z), torch.as_tensor(c), truncation_psi=psi, **options).detach().numpy()
    assert img.dtype == np.float32 and img.shape == want.shape == (num, 3, *G.img_shape)
    assert np.abs(img - want).max() <= 1e-4 * want.std()


def test_the_options_matter(case):
    """The noise, the label and the cutoff that the test above compares are not without effect here."""
    _path, G, _options, _error = case
    z, c = torch.randn(2, G.z_dim), torch.eye(2)

    def picture(c=c, **kwargs):
        return G.eval()(z, c, **dict(dict(truncation_psi=0.4, noise_mode="const"), **kwargs))

    others = [picture(noise_mode="none"), picture(truncation_cutoff=2)]
    others += [picture(c=1 - c)] if G.c_dim else []
    for other in others:
        assert (picture() - other).abs().max() > 1e-2 * picture().std()


def test_the_measured_difference_is_returned(case):
    assert 0 < case[-1] < 1e-5


def test_file_says_what_it_is(case):
    path, G, _options, _error = case
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    sizes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*model.graph.input, *model.graph.output]
    }
    label = dict(c=["N", 2]) if G.c_dim else {}
    assert sizes == dict(z=["N", G.z_dim], **label, psi=[1], img=["N", 3, *G.img_shape])
    shape = "[N, 3, 8, 12]" if hasattr(G, "latent_grid") else "[N, 3, 8, 8]"
    assert model.doc_string == f"Pictures {shape} of z and c, nominally in [-1, 1]; psi 1: no truncation"
    grid = {p.key: p.value for p in model.metadata_props}.get("latent_grid")
    assert grid == ("[2, 2]" if hasattr(G, "latent_grid") else None)
    assert [p.name for p in path.parent.iterdir()] == ["net.onnx"]


def test_export_leaves_the_network_as_it_was_and_says_nothing(tmp_path, capfd):
    G = plain()
    G.synthesis.b8.conv1.weight.requires_grad_(False)
    before = {name: (t.clone(), t.requires_grad) for name, t in G.named_parameters()}
    save_onnx(tmp_path / "net.onnx", G, verify=False)
    assert G.training
    for name, tensor in G.named_parameters():
        assert torch.equal(tensor, before[name][0]) and tensor.requires_grad == before[name][1]
    assert capfd.readouterr() == ("", "")


def test_without_average_no_truncation(tmp_path):
    G = plain(c_dim=0, w_avg_beta=None)
    assert save_onnx(tmp_path / "net.onnx", G) < 1e-5
    assert [v.name for v in onnx.load(tmp_path / "net.onnx").graph.input] == ["z"]


def test_without_onnxruntime_nothing_is_measured(case, tmp_path, monkeypatch):
    path, G, options, _error = case
    monkeypatch.setattr(onnx_export, "_export", lambda *_: onnx_ir.load(path))  # what was recorded before
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert save_onnx(tmp_path / "net.onnx", G, **options) is None
    assert (tmp_path / "net.onnx").exists()


def test_a_difference_is_an_error_and_leaves_no_file(case, tmp_path, monkeypatch):
    """The graph of another network: verify must notice."""
    path, G, options, _error = case
    monkeypatch.setattr(onnx_export, "_export", lambda *_: onnx_ir.load(path))
    other = copy.deepcopy(G)
    other.synthesis.b8.torgb.bias.data[0] += 0.01
    with pytest.raises(ValueError, match=r"net.onnx was not written: .* by \d.\de-\d\d standard deviations"):
        save_onnx(tmp_path / "net.onnx", other, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(noise_mode="random"), "noise_mode 'random' cannot .* accepted: 'const', 'none'"),
        (dict(truncation_cutoff=5), "truncation_cutoff 5 is not within 0 to 4, or None"),
        (dict(truncation_cutoff=-1), "truncation_cutoff -1 is not within 0 to 4, or None"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_onnx(tmp_path / "net.onnx", plain(), **options)


def test_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="pip install onnxscript onnxruntime"):
        save_onnx(tmp_path / "net.onnx", plain())
    assert list(tmp_path.iterdir()) == []


def test_network_that_cannot_be_recorded(tmp_path):
    G = plain()
    synthesis = type(G.synthesis).forward
    G.synthesis.forward = lambda ws, **kw: synthesis(G.synthesis, ws if ws.sum() > 0 else -ws, **kw)
    with pytest.raises(ValueError, match="^this network cannot be exported to ONNX: [^\n]+$"):
        save_onnx(tmp_path / "net.onnx", G)
    assert list(tmp_path.iterdir()) == []
