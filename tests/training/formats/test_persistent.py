# SPDX-License-Identifier: Apache-2.0
"""Networks rebuilt from what the family's pickles say of them. Files of other makes are made here by rewriting what a
network of ours reduces to; their source code would leave a mark if it were run."""

import copy
import io
import pickle
import random
import time

import numpy as np
import pytest
import torch

import dnnlib
import legacy
from dnnlib.plugins import load_plugins
from ssn_ext.networks import SpatialGenerator
from torch_utils import persistence
from training import snapshot
from training.augment import AugmentPipe
from training.formats import persistent, safe_pickle
from training.networks import Discriminator, Generator
from training.snapshot import SnapshotError, load_network_pkl

load_plugins()
WIDTHS = dict(channel_base=128, channel_max=16)
SIZE = dict(img_resolution=16, img_channels=3)
RUN_MARK = "raise RuntimeError('embedded source was run')\n"


class Meta:
    """Pickles as a persistent object of the given description."""

    def __init__(self, meta):
        self.meta = meta

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


def foreign(network, edit=lambda path, state: None, source=RUN_MARK, path=""):
    """The network as a file of another make has it: other source, NumPy numbers as gains, and what edit(path, state)
    changes in the state of each part."""
    meta = copy.copy(network.__reduce__()[1][0])
    state = meta["state"] = dict(meta["state"], _init_kwargs=dnnlib.EasyDict(network.init_kwargs))
    inner = {
        name: foreign(m, edit, source, f"{path}.{name}".lstrip(".")) for name, m in state["_modules"].items()
    }
    state.update(_modules=inner, _parameters=dict(state["_parameters"]), _buffers=dict(state["_buffers"]))
    for key in ["weight_gain", "act_gain"]:
        if key in state:
            state[key] = np.float64(state[key])
    meta["module_src"] = source
    edit(path, state)
    return Meta(meta)


def build(name, seed=0):
    torch.manual_seed(seed)
    plain = dict(z_dim=8, w_dim=8, **SIZE, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=dict(WIDTHS))
    return {
        "plain": lambda: Generator(c_dim=0, **plain),
        "conditional": lambda: Generator(c_dim=3, **plain),
        "by-position": lambda: Generator(8, 0, 8, 16, 3, dict(num_layers=2), WIDTHS),
        "spatial": lambda: SpatialGenerator(c_dim=0, **dict(plain, z_dim=32, w_dim=32), latent_grid=[2, 2]),
        "two-grids": lambda: SpatialGenerator(
            c_dim=0, **dict(plain, z_dim=40, w_dim=40), latent_grids=[[1, 1], [2, 2]], grid_splits=[8]
        ),
        "D": lambda: Discriminator(c_dim=0, **SIZE, **WIDTHS),
        "D-conditional": lambda: Discriminator(c_dim=3, **SIZE, **WIDTHS, architecture="skip"),
        "D-frozen": lambda: Discriminator(c_dim=0, **SIZE, **WIDTHS, block_kwargs=dict(freeze_layers=3)),
        "augment": lambda: AugmentPipe(xflip=1, scale=1, brightness=1, imgfilter=1),
    }[name]().eval().requires_grad_(False)  # fmt: skip


NAMES = [
    "plain",
    "conditional",
    "by-position",
    "spatial",
    "two-grids",
    "D",
    "D-conditional",
    "D-frozen",
    "augment",
]


def write(path, **values):
    data = dict(training_set_kwargs=None, G=None, D=None, G_ema=None, augment_pipe=None) | values
    path.write_bytes(pickle.dumps(data, protocol=4))
    return str(path)


def rebuilt(value):
    return persistent.rebuild(safe_pickle.read(io.BytesIO(pickle.dumps(value, protocol=4))), "G")


def assert_same(a, b):
    """The same tensors bit for bit, under the same names, and the same plain settings in every part."""
    assert type(a) is type(b)
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b))
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for (name, x), (_name, y) in zip(a.named_modules(), b.named_modules(), strict=True):
        plain = [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, list))} for m in (x, y)]
        assert plain[0] == plain[1], name


@pytest.mark.parametrize("name", NAMES)
def test_rebuilt_as_it_was(name):
    network = build(name)
    for value in [network, foreign(network)]:
        result = rebuilt(value)
        assert_same(result, network)
        assert not result.training and not any(p.requires_grad for p in result.parameters())
        assert persistence.is_persistent(result)  # so that it can be written again
        if name != "by-position":
            assert result.init_kwargs == network.init_kwargs


@pytest.mark.parametrize("grown", ["flat", "nested"])
def test_stylegan3s_own_defaults(grown):
    """Where nothing is said, stylegan3's StyleGAN2 has 4 half-precision resolutions, a clamp of 256, a slower w_avg."""
    theirs = dict(WIDTHS, num_fp16_res=4, conv_clamp=256)
    torch.manual_seed(0)
    G = Generator(
        z_dim=8,
        c_dim=0,
        w_dim=8,
        **SIZE,
        mapping_kwargs=dict(num_layers=2, w_avg_beta=0.998),
        synthesis_kwargs=theirs,
    )
    D = Discriminator(c_dim=0, **SIZE, **theirs)

    def forget(path, state):
        kwargs = state["_init_kwargs"]
        if path == "" and "z_dim" in kwargs:
            flat = dict(WIDTHS, fused_modconv_default="inference_only")
            kwargs.update(mapping_kwargs=dict(num_layers=2))
            kwargs.update(flat if grown == "flat" else dict(synthesis_kwargs=flat))
            if grown == "flat":
                del kwargs["synthesis_kwargs"]
        elif path == "":
            for key in ["num_fp16_res", "conv_clamp"]:
                del kwargs[key]
        state["fused_modconv_default"] = "inference_only"  # an attribute that ours do not have

    for network in [G, D]:
        result = rebuilt(foreign(network, forget))
        assert_same(result.train(), network)
        again = type(result)(**result.init_kwargs)  # what the transfer and force_fp16 build on
        assert_same(
            snapshot.misc.copy_params_and_buffers(network, again.requires_grad_(False)) or again, network
        )


def refusal(network, edit=lambda path, state: None, change=lambda meta: None):
    value = foreign(network, edit)
    change(value.meta)
    with pytest.raises(persistent.RebuildError) as caught:
        rebuilt(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def at(where, change):
    """An edit of the part at one path."""
    return lambda path, state: change(state) if path == where else None


def test_what_cannot_be_rebuilt_is_named():
    G, conv1 = build("plain"), "synthesis.b16.conv1"
    assert "class 'Painter', which is not one of Generator, D" in refusal(
        G, change=lambda m: m.update(class_name="Painter")
    )
    assert "is of version 5" in refusal(G, change=lambda m: m.update(version=5))
    assert "no class name or no state" in refusal(G, change=lambda m: m.update(state=None))
    assert f"{conv1}.weight" in refusal(G, at(conv1, lambda s: s["_parameters"].pop("weight")))
    assert f"{conv1}.more" in refusal(G, at(conv1, lambda s: s["_buffers"].update(more=torch.ones(1))))
    assert f"{conv1}.bias has shape [5]" in refusal(
        G, at(conv1, lambda s: s["_parameters"].update(bias=torch.ones(5)))
    )
    assert "not tensors" in refusal(G, at(conv1, lambda s: s["_parameters"].update(bias=3)))
    assert "G.synthesis.b16.conv1 is a str" in refusal(
        G, at("synthesis.b16", lambda s: s["_modules"].update(conv1="x"))
    )
    assert "speed" in refusal(G, at("", lambda s: s["_init_kwargs"].update(speed=9)))
    assert "takes 8 arguments" in refusal(G, at("", lambda s: s.update(_init_args=(1,) * 9)))


@pytest.mark.parametrize(
    "where, setting, value",
    [("synthesis.b16.conv1", "activation", "relu"), ("synthesis.b8", "architecture", "orig"), ("", "z_dim", 9),
     ("synthesis.b16.conv0", "up", 1), ("synthesis.b16.conv1", "act_gain", 7.0), ("mapping", "num_layers", 3),
     ("synthesis.b16.conv1", "use_noise", False)],
)  # fmt: skip
def test_a_setting_that_our_class_would_not_reproduce(where, setting, value):
    text = refusal(build("plain"), at(where, lambda s: s.update({setting: value})))
    assert setting in text and repr(value) in text and where in text


def many_parts(part):
    """5000 names of parts, all of which are that very same dict again."""
    inner = part.meta["state"]["_modules"]
    inner.update({f"part{i}": part for i in range(4000)})
    return inner


def share_tensors(parts):
    """Gives a thousand parts the same ten thousand tensors."""
    names = {f"t{i}": torch.ones(1) for i in range(20)}
    meta = dict(parts["fc0"].meta, state=dict(parts["fc0"].meta["state"], _buffers=names))
    parts.update({f"part{i}": Meta(meta) for i in range(1000)})


HOSTILE = {
    "resolution": at("", lambda s: s["_init_kwargs"].update(img_resolution=2**40)),
    "power": at("", lambda s: s["_init_kwargs"].update(img_resolution=2**20)),
    "widths": at(
        "", lambda s: s["_init_kwargs"].synthesis_kwargs.update(channel_base=2**62, channel_max=2**62)
    ),
    "channels": at("", lambda s: s["_init_kwargs"].update(img_channels=10**12)),
    "layers": at("", lambda s: s["_init_kwargs"].mapping_kwargs.update(num_layers=10**9)),
    "number": at("", lambda s: s["_init_kwargs"].update(z_dim=10**4000)),
    "kind": at("", lambda s: s["_init_kwargs"].update(z_dim="8")),
    "negative": at("", lambda s: s["_init_kwargs"].update(z_dim=-8)),
    "filter": at("", lambda s: s["_init_kwargs"].synthesis_kwargs.update(resample_filter=[1.0] * 10**5)),
    "none": at("", lambda s: s["_init_kwargs"].clear()),
    "nan": at("synthesis", lambda s: s.update(num_ws=float("nan"))),
    "name": at("", lambda s: s["_modules"].update({"n" * 10**6: s["_modules"]["mapping"]})),
    "numbers-as-names": at("mapping", lambda s: s["_parameters"].update({5: torch.ones(1)})),
    "shared-parts": at("", lambda s: s["_modules"].update(many_parts(s["_modules"]["mapping"]))),
    "shared-tensors": at("", lambda s: share_tensors(s["_modules"]["mapping"].meta["state"]["_modules"])),
    "deep": at(
        "", lambda s: s["_modules"]["mapping"].meta["state"]["_modules"].update(fc0=s["_modules"]["mapping"])
    ),
}


@pytest.mark.parametrize("key", ["version", "class_name", "module_src"])
def test_descriptions_that_would_take_for_ever_to_print(key):
    tangled = ()
    for _ in range(60):
        tangled = (tangled, tangled)
    value = foreign(build("plain"))
    value.meta[key] = tangled
    found = safe_pickle.read(io.BytesIO(pickle.dumps(value, protocol=4)))
    assert persistent.foreign_sources([found]) == ([] if key != "version" else ["Generator"])
    if key != "module_src":
        with pytest.raises(persistent.RebuildError, match="of version a tuple|no class name"):
            persistent.rebuild(found, "G")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arguments_end_quickly(name):
    began = time.process_time()
    refusal(build("plain"), HOSTILE[name])
    assert time.process_time() - began < 5


# --- whole files


@pytest.fixture(scope="module")
def networks():
    return dict(G=build("spatial", 1), D=build("D"), G_ema=build("spatial"), augment_pipe=build("augment"))


def test_a_snapshot_of_ours(tmp_path, networks, caplog):
    snapshot.save_network_pkl(tmp_path / "net.pkl", **networks, training_set_kwargs=dict(path="x.zip"))
    for source in [str(tmp_path / "net.pkl"), tmp_path / "net.pkl", open(tmp_path / "net.pkl", "rb")]:
        data = load_network_pkl(source)
        assert data["training_set_kwargs"] == dict(path="x.zip")
        for key, network in networks.items():
            assert_same(data[key], network)
    source.close()
    assert caplog.messages == []  # nothing to tell: the source in the file is ours
    data = load_network_pkl(tmp_path / "net.pkl", only=["G_ema"])
    assert "D" not in data and data["augment_pipe"] is None and data["G_ema"].latent_grid == [2, 2]


def test_a_snapshot_of_another_make(tmp_path, networks, caplog):
    path = write(tmp_path / "net.pkl", **{key: foreign(network) for key, network in networks.items()})
    with pytest.raises(RuntimeError, match="embedded source was run"):
        pickle.loads((tmp_path / "net.pkl").read_bytes())  # so that the next line proves something
    with open(path, "rb") as f:
        data = legacy.load_network_pkl(f)
    for key, network in networks.items():
        assert_same(data[key], network)
    (note,) = caplog.messages
    assert (
        "net.pkl carries source code of its own for SpatialGenerator, Discriminator, AugmentPipe; it was not"
        in note
    )


def test_trust_runs_the_file_and_says_so(tmp_path, networks, caplog):
    path = write(tmp_path / "net.pkl", **{key: foreign(network) for key, network in networks.items()})
    with pytest.raises(SnapshotError, match="RuntimeError: embedded source was run"):
        load_network_pkl(path, trust=True)
    assert "opened by running whatever code it holds" in caplog.messages[0]
    other = torch.nn.Linear(1, 1)
    path = write(tmp_path / "other.pkl", G=other, D=other, G_ema=other)
    with pytest.raises(
        SnapshotError, match=r"asks for torch\.nn\.\S+Linear: nothing was run; if you trust .*--trust-pickle"
    ):
        load_network_pkl(path)
    assert type(legacy.load_network_pkl(path, trust=True)["G"]) is torch.nn.Linear


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!doctype html>", "neither a pickle, nor a PyTorch checkpoint, nor a safetensors file"),
        (b"", "neither a pickle"),
        (pickle.dumps([1], 4), "it holds a list, expected a dict with G, D, G_ema"),
        (pickle.dumps({}, 4), "G is missing or not a network"),
        (pickle.dumps(dict(G=1, D=2, G_ema=3), 4), "G is missing or not a network"),
    ],
)
def test_what_is_no_snapshot(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(SnapshotError, match=f"x.pkl is not a network snapshot: .*{message}"):
        load_network_pkl(tmp_path / "x.pkl")


def test_data_set_options_are_plain_values(tmp_path, networks):
    tangled = ["x"]
    for _ in range(40):
        tangled = [tangled, tangled]
    path = tmp_path / "net.pkl"
    write(path, **networks, training_set_kwargs=dict(path="x", max_size=2**30, more=tangled))
    with pytest.raises(
        snapshot.SnapshotError, match="training_set_kwargs cannot have more than 1000 arguments"
    ):
        snapshot.load_network_pkl(str(path))
    write(path, **networks, training_set_kwargs=dict(path="x", max_size=2**30))
    assert snapshot.load_network_pkl(str(path))["training_set_kwargs"] == dict(path="x", max_size=2**30)


def test_more_networks_than_any_file_has(tmp_path, networks):
    write(tmp_path / "net.pkl", **networks, **{f"x{i}": networks["D"] for i in range(20)})
    with pytest.raises(snapshot.SnapshotError, match="it holds 24 networks, the most is 16"):
        snapshot.load_network_pkl(str(tmp_path / "net.pkl"))


def test_wrong_kinds_of_what_stands_beside_the_networks(tmp_path, networks):
    nets = {key: networks[key] for key in ["G", "D", "G_ema"]}
    with pytest.raises(SnapshotError, match="training_set_kwargs is a list"):
        load_network_pkl(write(tmp_path / "a.pkl", **nets, training_set_kwargs=[]))
    with pytest.raises(SnapshotError, match="augment_pipe is a str"):
        load_network_pkl(write(tmp_path / "b.pkl", **nets, augment_pipe="bgc"))
    assert load_network_pkl(write(tmp_path / "c.pkl", **nets, extra=[1]))["extra"] == [1]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(SnapshotError, match="cannot read .*nothing.pkl: No such file"):
        load_network_pkl(tmp_path / "nothing.pkl")
    with pytest.raises(SnapshotError, match="cannot read"):
        load_network_pkl(tmp_path)


def test_truncated_and_damaged_snapshots(tmp_path):
    """One clear error each, or networks that can be used; never anything else."""
    G = build("plain")
    whole = pickle.dumps(dict(G=G, D=build("D"), G_ema=G), 4)
    rnd = random.Random(0)
    path = tmp_path / "net.pkl"
    opened = 0
    for i in range(150):
        data = bytearray(whole[: rnd.randrange(len(whole))] if i < 50 else whole)
        for _ in range(0 if i < 50 else rnd.choice([1, 4, 30])):
            data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        path.write_bytes(bytes(data))
        try:
            net = load_network_pkl(path)["G_ema"]
            assert net(torch.zeros(1, net.z_dim), None).shape[0] == 1
            opened += 1
        except SnapshotError as err:
            assert str(err).count("\n") == 0 and "net.pkl" in str(err)
    assert 0 < opened < 100


def test_force_fp16(tmp_path, networks):
    networks = dict(networks, G=build("plain"))
    path = write(tmp_path / "net.pkl", **networks)
    data = load_network_pkl(path, force_fp16=True)
    for key in ["G", "G_ema"]:
        assert data[key].init_kwargs.synthesis_kwargs == dict(WIDTHS, num_fp16_res=4, conv_clamp=256)
    assert data["D"].init_kwargs.num_fp16_res == 4 and data["D"].init_kwargs.conv_clamp == 256
    assert [getattr(data["G"].synthesis, f"b{r}").use_fp16 for r in (4, 8, 16)] == [False, True, True]
    z = torch.randn(2, 32)
    expected = networks["G_ema"](z, None, noise_mode="const")
    assert torch.allclose(
        data["G_ema"](z, None, noise_mode="const"), expected, atol=1e-5
    )  # on a CPU: float32
