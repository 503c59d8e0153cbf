# SPDX-License-Identifier: Apache-2.0
"""Snapshots as safetensors: what comes back equals what was written; what is wrong is refused in one line."""

import copy
import io
import json
import struct
import sys

import numpy as np
import pytest
import torch

import dnnlib
from ssn_ext.networks import SpatialGenerator
from torch_utils import misc
from training.augment import AugmentPipe
from training.formats import tensors
from training.networks import Discriminator, Generator
from training.snapshot import load_network_pkl, network_for_snapshot, save_network_pkl

safetensors = pytest.importorskip("safetensors", reason="safetensors is optional")
pytest.importorskip("safetensors.torch")

SIZE = dict(c_dim=2, img_resolution=8, img_channels=1)
WIDTHS = dict(channel_base=64, channel_max=8)
GENERATOR = dict(SIZE, z_dim=8, w_dim=8, mapping_kwargs=dict(num_layers=1), synthesis_kwargs=WIDTHS)


def load(path):
    with open(path, "rb") as f:
        return tensors.load(f)


def randomised(network, seed):
    """Every tensor random, so that none can be right by its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in misc.params_and_buffers(network):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return network_for_snapshot(network)


@pytest.fixture(scope="module")
def snapshot():
    """A whole snapshot of a plain generator; its label embedding and one frozen layer included."""
    G = Generator(**dnnlib.EasyDict(GENERATOR, synthesis_kwargs=dnnlib.EasyDict(WIDTHS)))
    D = Discriminator(
        **SIZE, **WIDTHS, block_kwargs=dict(freeze_layers=1), epilogue_kwargs=dict(mbstd_group_size=2)
    )
    pipe = AugmentPipe(xflip=1, scale=0.5, imgfilter=1, imgfilter_bands=[1, 0, 1, 1])
    return dict(
        G=randomised(G, 0),
        D=randomised(D, 1),
        G_ema=randomised(copy.deepcopy(G), 2),
        augment_pipe=randomised(pipe, 3),
        training_set_kwargs=dict(path="faces.zip", max_size=np.int64(70), resolution=8),
    )


def assert_same(got, want):
    """The same network: class, arguments, state, kind and bits of every tensor."""
    assert type(got) is type(want)
    assert got.init_kwargs == want.init_kwargs and got.init_args == ()
    assert not got.training and not any(p.requires_grad for p in got.parameters())
    for ours, theirs in [
        (got.named_parameters(), want.named_parameters()),
        (got.named_buffers(), want.named_buffers()),
    ]:
        ours, theirs = dict(ours), dict(theirs)
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    plain = [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} for m in got.modules()]
    assert plain == [
        {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} for m in want.modules()
    ]


def test_round_trip_bit_for_bit(snapshot, tmp_path):
    path = tmp_path / "net.safetensors"
    tensors.save(path, snapshot)
    back = load(path)
    assert set(back) == {"G", "D", "G_ema", "augment_pipe", "training_set_kwargs"}
    for name in tensors.NAMES:
        assert_same(back[name], snapshot[name])
    assert back["training_set_kwargs"] == dict(path="faces.zip", max_size=70, resolution=8)
    z, c = torch.randn(2, 8), torch.eye(2)
    img = back["G_ema"](z, c, noise_mode="const")
    assert torch.equal(img, snapshot["G_ema"](z, c, noise_mode="const"))
    assert torch.equal(back["D"](img, c), snapshot["D"](img, c))
    images = torch.randn(2, 1, 32, 32)
    torch.manual_seed(0)
    changed = back["augment_pipe"](images)
    torch.manual_seed(0)
    assert torch.equal(changed, snapshot["augment_pipe"](images))


def test_round_trip_through_a_pickle(snapshot, tmp_path):
    """pkl -> safetensors -> pkl loses nothing."""
    save_network_pkl(tmp_path / "1.pkl", **snapshot)
    tensors.save(tmp_path / "2.safetensors", load_network_pkl(tmp_path / "1.pkl"))
    save_network_pkl(tmp_path / "3.pkl", **load(tmp_path / "2.safetensors"))
    back = load_network_pkl(tmp_path / "3.pkl")
    for name in tensors.NAMES:
        assert_same(back[name], snapshot[name])


@pytest.mark.parametrize("encoder_init", ["exact", "random", "none"])
def test_round_trip_of_an_ssn(encoder_init, tmp_path):
    encoder = {} if encoder_init == "none" else dict(encoder_kwargs=dict(channels=4, max_resolution=4))
    kwargs = dict(GENERATOR, z_dim=32, w_dim=32, latent_grid=[2, 2], c_dim=0)
    kwargs["synthesis_kwargs"] = dict(WIDTHS, encoder_init=encoder_init, **encoder)
    kwargs.update(img_resolution=12, img_shape=[8, 12])
    G = randomised(SpatialGenerator(**kwargs), 4)
    tensors.save(tmp_path / "ssn", dict(G_ema=G))
    back = load(tmp_path / "ssn")["G_ema"]
    assert_same(back, G)
    z = torch.randn(2, 32)
    assert torch.equal(back(z, None, noise_mode="const"), G(z, None, noise_mode="const"))


def test_format(snapshot, tmp_path):
    """Tensors by their names for any reader of safetensors, the description twice."""
    path = tmp_path / "net.safetensors"
    tensors.save(path, snapshot)
    with safetensors.safe_open(path, framework="np") as f:
        const = f.get_tensor("G_ema.synthesis.b4.const")
        text = f.metadata()["snapshot"]
    assert np.array_equal(const, snapshot["G_ema"].synthesis.b4.const.numpy())
    beside = json.loads((tmp_path / "net.safetensors.json").read_text())
    assert beside == json.loads(text)
    assert beside["format_version"] == 1
    assert beside["networks"]["D"]["class_name"] == "Discriminator"
    assert beside["networks"]["G"]["init_kwargs"] == GENERATOR
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "net.safetensors.json"]


def test_only_some_networks(snapshot, tmp_path):
    tensors.save(tmp_path / "all", snapshot)
    tensors.save(tmp_path / "one", snapshot, only=["G_ema"])
    back = load(tmp_path / "one")
    assert_same(back["G_ema"], snapshot["G_ema"])
    assert list(back) == ["G_ema", "training_set_kwargs"] and back["training_set_kwargs"] is None
    assert_same(load_network_pkl(tmp_path / "one", only=["G_ema"])["G_ema"], snapshot["G_ema"])
    assert "faces.zip" not in (tmp_path / "one.json").read_text()
    values = sum(t.numel() for t in misc.params_and_buffers(snapshot["G_ema"]))
    assert (tmp_path / "one").stat().st_size < 4 * values + 20_000 < (tmp_path / "all").stat().st_size


def test_numpy_numbers_and_tuples_become_plain(tmp_path):
    G = Generator(
        **dict(GENERATOR, z_dim=np.int64(8), synthesis_kwargs=dict(WIDTHS, resample_filter=(1, 3, 3, 1)))
    )
    tensors.save(tmp_path / "net", dict(G_ema=G))
    kwargs = load(tmp_path / "net")["G_ema"].init_kwargs
    assert type(kwargs.z_dim) is int and kwargs.synthesis_kwargs["resample_filter"] == [1, 3, 3, 1]


class Stranger(torch.nn.Module):
    """A network that no registry knows."""

    init_args, init_kwargs = (), {}


def positional():
    return Generator(8, 2, 8, 8, 1, mapping_kwargs=dict(num_layers=1), synthesis_kwargs=WIDTHS)


@pytest.mark.parametrize(
    ("make", "only", "message"),
    [
        (Stranger, None, "G_ema cannot be written as tensors: unknown network class 'Stranger'; known: Generator, "),
        (positional, None, "positional arguments"),
        (lambda: Generator(**GENERATOR).half(), None, r"const is torch.float16, such files hold torch.float32"),
        (lambda: None, None, "cannot write no networks: the snapshot has no networks"),
        (lambda: Generator(**GENERATOR), ["D"], "cannot write D: the snapshot has G_ema"),
        (lambda: Generator(**GENERATOR), ["g_ema"], "cannot write g_ema: the snapshot has G_ema"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_again_is_not_written(make, only, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tensors.save(tmp_path / "net", dict(G_ema=make()), only=only)
    assert list(tmp_path.iterdir()) == []


def test_other_code_under_our_class_name_is_not_written(tmp_path):
    """E.g. a generator that a pickle has brought its own code for: the name would promise ours."""
    other = type("Generator", (Stranger,), {})
    with pytest.raises(
        ValueError, match="G_ema cannot be written.*its class Generator is not the one of this"
    ):
        tensors.save(tmp_path / "net", dict(G_ema=other()))
    assert list(tmp_path.iterdir()) == []


def test_more_tensors_than_the_arguments_make_are_not_written(snapshot, tmp_path):
    G = copy.deepcopy(snapshot["G_ema"])
    G.extra = torch.nn.Parameter(torch.zeros([1]))
    with pytest.raises(ValueError, match="G_ema cannot be written.*'extra' is not one of its tensors"):
        tensors.save(tmp_path / "net", dict(G_ema=G))


def test_data_set_arguments_that_json_cannot_hold(snapshot, tmp_path):
    data = dict(snapshot, training_set_kwargs=dict(path=tmp_path))
    with pytest.raises(ValueError, match="training_set_kwargs holds a (Posix|Windows)Path"):
        tensors.save(tmp_path / "net", data)


@pytest.mark.parametrize(
    "call", [lambda path: tensors.save(path, dict(G_ema=None)), lambda path: tensors.load(io.BytesIO())]
)
def test_missing_package_names_the_command(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        call(tmp_path / "net")


def test_the_face_names_the_file_and_the_problem(parts, tmp_path, monkeypatch):
    """training.snapshot.load_network_pkl tells the kinds of files apart."""
    path = written(tmp_path / "net", *edited(parts, WRONG["class"][0]))
    with pytest.raises(
        ValueError, match=r"net is not a network snapshot: G_ema: unknown network class 'os.system'"
    ):
        load_network_pkl(path, only=["G_ema"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="net cannot be opened: .* not installed: pip install safetensors"):
        load_network_pkl(path, only=["G_ema"])


# --- files that are not what they should be ---------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A good file of one generator: (tensors, description)."""
    path = tmp_path_factory.mktemp("good") / "net"
    tensors.save(path, dict(G_ema=Generator(**GENERATOR)))
    return safetensors.torch.load_file(path), json.loads((path.parent / "net.json").read_text())


def written(path, own, about):
    """A file of these tensors and this description (a dict, or text)."""
    text = about if isinstance(about, str) else json.dumps(about)
    path.write_bytes(safetensors.torch.save(own, metadata={"snapshot": text}))
    return path


def refused(path):
    """The one line that refuses a file."""
    with pytest.raises(ValueError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    return text


def test_the_parts_are_good(parts, tmp_path):
    assert load(written(tmp_path / "net", *parts))["G_ema"] is not None


def raw(header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(first, last, shape=(2,), dtype="F32"):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[first, last])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04}\x94." + bytes(100),  # a pickle
        struct.pack("<Q", 2**60) + b"{}",
        raw(b"{{{"),
        raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        raw({"a": entry(0, 8)}, bytes(4)),
        raw({"a": entry(0, 8)}, bytes(80)),
        raw({"a": entry(0, 8, shape=[2**40, 2**40])}, bytes(8)),
        raw({"a": entry(0, 8, dtype="OBJECT")}, bytes(8)),
        raw({"a": entry(0, 1, dtype="F4")}, bytes(1)),
        raw({"__metadata__": {"snapshot": {}}}),
    ],
)  # fmt: skip
def test_files_that_are_not_safetensors(content, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(content)
    assert "it is not a safetensors file: " in refused(path)


@pytest.mark.parametrize("length", [2**23 + 1, 2**40, 2**63])
def test_a_header_that_is_too_long(length, tmp_path):
    """Each of its entries would become an object."""
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=f"a header of {length:,} bytes"):
        load(tmp_path / "x.safetensors")


def test_tensors_without_a_description(parts, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(safetensors.torch.save(parts[0]))
    assert "nothing says what networks they are of" in refused(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its description is not JSON"),
        ("[" * 200_000, "its description is not JSON"),
        ("[]", "format version None, this program reads 1"),
        ('{"format_version": 2}', "format version 2, this program reads 1"),
        ('{"format_version": 1}', "lacks a part"),
        ('{"format_version": 1, "networks": {}, "training_set_kwargs": null}', "lacks a part"),
        ('{"format_version": 1, "networks": {"G": 1}, "training_set_kwargs": null}', "lacks a part"),
    ],
)
def test_descriptions_that_are_none(text, message, parts, tmp_path):
    assert message in refused(written(tmp_path / "net", parts[0], text))


def edited(parts, change):
    own, about = dict(parts[0]), copy.deepcopy(parts[1])
    change(own, about, about["networks"]["G_ema"])
    return own, about


WRONG = {
    "class": (
        lambda own, about, net: net.update(class_name="os.system"),
        "G_ema: unknown network class 'os.system'; known: Generator, Discriminator, AugmentPipe",
    ),
    "long class": (lambda own, about, net: net.update(class_name="x" * 9999), "unknown network class 'xxxx"),
    "class that is no text": (
        lambda own, about, net: net.update(class_name=[1]),
        "its description of G_ema is not a class_name and its init_kwargs",
    ),
    "more than a class": (lambda own, about, net: net.update(module_src="x"), "description of G_ema is not"),
    "name": (
        lambda own, about, net: about["networks"].update(G2=about["networks"].pop("G_ema")),
        "it names a network 'G2'; known: G, D, G_ema, augment_pipe",
    ),
    "more than networks": (lambda own, about, net: about.update(code="x"), "one that is not known"),
    "data set": (
        lambda own, about, net: about.update(training_set_kwargs=[1]),
        "training_set_kwargs are not",
    ),
    "dtype": (
        lambda own, about, net: own.update({"G_ema.mapping.w_avg": torch.zeros([8], dtype=torch.int32)}),
        "G_ema.mapping.w_avg holds torch.int32, such files hold torch.float32",
    ),
    "half": (
        lambda own, about, net: own.update({"G_ema.mapping.w_avg": torch.zeros([8]).half()}),
        "G_ema.mapping.w_avg holds torch.float16, such files hold torch.float32",
    ),
    "shape": (
        lambda own, about, net: own.update({"G_ema.mapping.w_avg": torch.zeros([9])}),
        "mapping.w_avg has shape [9], expected [8]",
    ),
    "missing": (lambda own, about, net: own.pop("G_ema.mapping.w_avg"), "mapping.w_avg [8] is missing"),
    "superfluous": (
        lambda own, about, net: own.update({"G_ema.more": torch.zeros([1])}),
        "'more' is not one of its tensors",
    ),
    "of no network": (
        lambda own, about, net: own.update({"D.b4.out.bias": torch.zeros([1])}),
        "'D.b4.out.bias' belongs to none of its networks",
    ),
    "unknown argument": (lambda own, about, net: net["init_kwargs"].update(x=1), "cannot be built"),
    "huge network": (
        lambda own, about, net: net["init_kwargs"].update(img_resolution=2**40),
        "argument img_resolution is 1099511627776, the most",
    ),
    "wide network": (
        lambda own, about, net: net["init_kwargs"].update(
            synthesis_kwargs=dict(channel_base=2**24, channel_max=2**24)
        ),
        "tensors do not fit its arguments",
    ),
    "deep network": (
        lambda own, about, net: net["init_kwargs"].update(mapping_kwargs=dict(num_layers=10**6)),
        "argument num_layers is 1000000, the most",
    ),
    "nested arguments": (
        lambda own, about, net: net["init_kwargs"].update(mapping_kwargs=json.loads("[" * 50 + "]" * 50)),
        "nested 8 deep",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parts_are_named(case, parts, tmp_path):
    change, message = WRONG[case]
    assert message in refused(written(tmp_path / "net", *edited(parts, change)))
