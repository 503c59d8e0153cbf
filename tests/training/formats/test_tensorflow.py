# SPDX-License-Identifier: Apache-2.0
"""TensorFlow pickles: golden pictures, and networks written in TensorFlow's layout by hand and read back."""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from training import snapshot
from training.formats import tensorflow
from training.networks import Discriminator, Generator

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


class Net:
    """What a network of such a pickle unpickles to; its state comes as attributes."""

    def __init__(self, static_kwargs, variables, components=None, version=4):
        self.version, self.static_kwargs = version, static_kwargs
        self.variables, self.components = variables, components or {}


class Unpickler(pickle.Unpickler):
    """Opens nothing but networks of arrays."""

    def find_class(self, module, name):
        if (module, name) == ("dnnlib.tflib.network", "Network"):
            return Net
        if module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


@pytest.fixture(scope="module")
def golden():
    with open(GOLDEN / "tf_stylegan2_32.pkl", "rb") as f:
        nets = Unpickler(f).load()
    assert tensorflow.recognises(nets)
    return tensorflow.convert(*nets), np.load(GOLDEN / "tf_stylegan2_32.npz")


@pytest.mark.parametrize("name", ["G", "G_ema"])
def test_golden_pictures(golden, name):
    nets, expected = golden
    img = nets[name](torch.as_tensor(expected["z"]), None, noise_mode="const")
    torch.testing.assert_close(img, torch.as_tensor(expected[f"img_{name}"]), atol=1e-4, rtol=0)


def test_golden_logits(golden):
    """Those of G_ema's pictures."""
    nets, expected = golden
    logits = nets["D"](torch.as_tensor(expected["img_G_ema"]), None)
    torch.testing.assert_close(logits, torch.as_tensor(expected["logits"]), atol=1e-4, rtol=0)


def test_networks_are_ready_for_a_snapshot(golden):
    nets, _expected = golden
    assert list(nets) == ["G", "D", "G_ema"]
    for net in nets.values():
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert pickle.loads(pickle.dumps(net, protocol=4)).init_kwargs == net.init_kwargs
    assert nets["D"].b4.mbstd.group_size == 4 and nets["G"].mapping.num_layers == 4
    assert nets["G"].init_kwargs.synthesis_kwargs["resample_filter"] == [1, 3, 3, 1]


def test_numbers_without_dimensions(golden, tmp_path):
    """Strengths as TensorFlow's session gives them: NumPy numbers, not arrays. By the restricted reader."""
    with open(GOLDEN / "tf_stylegan2_32.pkl", "rb") as f:
        nets = Unpickler(f).load()
    changed = 0
    for net in nets:
        for part in [net, *net.components.values()]:
            part.variables = [
                (name, np.float32(value) if np.ndim(value) == 0 else value) for name, value in part.variables
            ]
            changed += sum(type(value) is np.float32 for _name, value in part.variables)
    assert changed > 10
    data = pickle.dumps(nets, 2).replace(
        b"ctests.training.formats.test_tensorflow\nNet\n", b"cdnnlib.tflib.network\nNetwork\n"
    )
    (tmp_path / "net.pkl").write_bytes(data)
    found, expected = snapshot.load_network_pkl(str(tmp_path / "net.pkl")), golden[0]
    for name in expected:
        for ours, theirs in zip(
            found[name].state_dict().values(), expected[name].state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", [
    lambda net: net.static_kwargs.update(nonlinearity=TANGLED),
    lambda net: net.static_kwargs.update(resample_kernel=TANGLED),
    lambda net: net.static_kwargs.update(resolution=TANGLED),
    lambda net: net.variables.extend((f"v{i}", None) for i in range(10_001)),
    lambda net: net.variables.append(("n" * 1000, None)),
    lambda net: net.components.update({"n" * 1000: net.components["mapping"]}),
    lambda net: net.components.update({"n" * 400: Net({}, [], {"n" * 400: Net({}, [])})}),
])  # fmt: skip
def test_tangled_and_huge_descriptions_end_soon(change):
    nets = written()
    change(nets[0])
    assert len(refusal(nets)) < 300


TANGLED = ()
for _ in range(40):
    TANGLED = (TANGLED, TANGLED)


def test_one_array_under_many_names_is_not_copied_often():
    """Sixteen weights that are one piece of memory."""
    nets = written()
    shared = np.zeros(
        max(np.size(value) for _name, value in nets[0].components["synthesis"].variables), np.float32
    )
    for part in [nets[0], *nets[0].components.values()]:
        part.variables = [(name, shared[: np.size(v)].reshape(np.shape(v))) for name, v in part.variables]
    assert "bytes are views of less memory" in refusal(nets)


def test_only_what_is_wanted():
    nets = written()
    nets[0].variables = nets[1].variables = "broken"
    assert list(tensorflow.convert(*nets, only=["G_ema"])) == ["G_ema"]


# --- networks written in TensorFlow's layout ----------------------------------------------------------------


def kernel(t):
    """[out, in, h, w] -> [h, w, in, out]."""
    return t.transpose(2, 3, 1, 0)


def turned(t):
    return kernel(t[:, :, ::-1, ::-1])


def layer_variables(path, layer, weight):
    """Variables of one layer: `path/weight`, ..."""
    values = {name: t.detach().numpy() for name, t in [*layer.named_parameters(), *layer.named_buffers()]}
    found = [(f"{path}/weight", weight(values["weight"]))]
    for ours, theirs, change in [
        ("bias", "bias", lambda t: t),
        ("noise_strength", "noise_strength", lambda t: t),
        ("affine.weight", "mod_weight", lambda t: t.T),
        ("affine.bias", "mod_bias", lambda t: t - 1),
    ]:
        if ours in values:
            found.append((f"{path}/{theirs}", change(values[ours])))
    return found


def dense(path, layer):
    return layer_variables(path, layer, lambda t: t.T)


def write_generator(G, static_kwargs, lods=False):
    """A generator as TensorFlow keeps it: the mapping and the synthesis network are components."""
    mapping = dense("LabelEmbed", G.mapping.embed) if G.c_dim else []
    for i in range(G.mapping.num_layers):
        mapping += dense(f"Dense{i}", getattr(G.mapping, f"fc{i}"))
    synthesis = [("4x4/Const/const", G.synthesis.b4.const.detach().numpy()[None])]
    numbers = iter(range(100))
    for res in G.synthesis.block_resolutions:
        block = getattr(G.synthesis, f"b{res}")
        for ours, theirs, weight in [
            ("conv0", "Conv0_up", turned),
            ("conv1", "Conv1" if res > 4 else "Conv", kernel),
            ("torgb", "ToRGB", kernel),
            ("skip", "Skip", turned),
        ]:
            if not hasattr(block, ours):
                continue
            layer = getattr(block, ours)
            path = f"{res}x{res}/{theirs}"
            if lods and ours == "torgb":
                path = f"ToRGB_lod{int(math.log2(G.img_resolution // res))}"
            synthesis += layer_variables(path, layer, weight)
            if hasattr(layer, "noise_const"):
                synthesis.append((f"noise{next(numbers)}", layer.noise_const.numpy()[None, None]))
    own = [("lod", np.float32(0)), ("dlatent_avg", G.mapping.w_avg.numpy())]
    return Net(static_kwargs, own, dict(mapping=Net({}, mapping), synthesis=Net({}, synthesis)))


def write_discriminator(D, static_kwargs, lods=False):
    """A discriminator as TensorFlow keeps it."""
    found = []
    if D.c_dim:
        found += dense("LabelEmbed", D.mapping.embed)
        for i in range(D.mapping.num_layers):
            found += dense(f"Mapping{i}", getattr(D.mapping, f"fc{i}"))
    for res in [*D.block_resolutions, 4]:
        block = getattr(D, f"b{res}")
        for ours, theirs in [
            *[("fromrgb", "FromRGB"), ("conv0", "Conv0"), ("conv1", "Conv1_down"), ("skip", "Skip")],
            ("conv", "Conv"),
        ]:
            if hasattr(block, ours):
                path = f"{res}x{res}/{theirs}"
                if lods and ours == "fromrgb":
                    path = f"FromRGB_lod{int(math.log2(D.img_resolution // res))}"
                found += layer_variables(path, getattr(block, ours), kernel)
    found += dense("4x4/Dense0", D.b4.fc) + dense("Output", D.b4.out)
    if lods:  # those of lower resolutions are there, too, and lead nowhere
        found += [("FromRGB_lod1/weight", np.zeros([1, 1, 3, 4], np.float32))]
    return Net(static_kwargs, found)


def networks(G_kwargs, D_kwargs):
    """A generator and a discriminator of 16x16 pixels, none of whose values is that of a fresh one."""
    torch.manual_seed(0)
    data = dict(img_resolution=16, img_channels=3)
    D_widths = {} if "channel_base" in D_kwargs else dict(channel_base=64, channel_max=8)
    G_kwargs = dict(
        G_kwargs,
        mapping_kwargs=dict(dict(num_layers=2), **G_kwargs.get("mapping_kwargs", {})),
        synthesis_kwargs=dict(channel_base=64, channel_max=8, **G_kwargs.get("synthesis_kwargs", {})),
    )
    G = Generator(**dict(dict(z_dim=8, c_dim=0, w_dim=8), **G_kwargs), **data)
    D = Discriminator(**dict(dict(c_dim=0), **D_kwargs), **D_widths, **data)
    with torch.no_grad():
        for net in [G, D]:
            for name, t in [*net.named_parameters(), *net.named_buffers()]:
                if not name.endswith("resample_filter"):
                    t += 0.1 * torch.randn(t.shape)
    return G.eval(), D.eval()


SMALL = dict(resolution=16, num_channels=3, fmap_base=32, fmap_max=8)
SMALL_G = dict(SMALL, latent_size=8, dlatent_size=8, mapping_layers=2)
# A name, our arguments of G, TensorFlow's, our arguments of D, TensorFlow's.
CASES = {
    "skip": (
        dict(synthesis_kwargs=dict(architecture="skip")), dict(architecture="skip"),
        dict(architecture="skip"), dict(architecture="skip"),
    ),
    "resnet": (
        dict(synthesis_kwargs=dict(architecture="resnet")), dict(architecture="resnet"), dict(), dict(),
    ),
    "orig": (
        dict(synthesis_kwargs=dict(architecture="orig")), dict(architecture="orig"),
        dict(architecture="orig"), dict(architecture="orig"),
    ),
    "conditional": (
        dict(c_dim=3, mapping_kwargs=dict(embed_features=5, layer_features=6)),
        dict(label_size=3, label_fmaps=5, mapping_fmaps=6),
        dict(c_dim=3, cmap_dim=6, mapping_kwargs=dict(num_layers=2, embed_features=6, layer_features=6,
             lr_multiplier=0.1)),
        dict(label_size=3, mapping_fmaps=6, mapping_layers=2),
    ),
    "conditional without layers": (
        dict(c_dim=2), dict(label_size=2),
        dict(c_dim=2, mapping_kwargs=dict(num_layers=0)), dict(label_size=2),
    ),
    "settings": (
        dict(
            mapping_kwargs=dict(activation="relu", lr_multiplier=0.1, w_avg_beta=1),
            synthesis_kwargs=dict(
                use_noise=False, activation="swish", resample_filter=[1, 2, 1], conv_clamp=0.5, num_fp16_res=1
            ),
        ),
        dict(
            mapping_nonlinearity="relu", mapping_lrmul=0.1, w_avg_beta=None, use_noise=False, nonlinearity="swish",
            resample_kernel=[1, 2, 1], conv_clamp=0.5, num_fp16_res=np.int64(1), truncation_psi=0.5,
            truncation_cutoff=8, style_mixing_prob=0.9, structure="fixed",
        ),
        dict(
            num_fp16_res=1, conv_clamp=0.5,
            block_kwargs=dict(activation="swish", resample_filter=[1, 2, 1], freeze_layers=1),
            epilogue_kwargs=dict(mbstd_group_size=2, mbstd_num_channels=2, activation="swish"),
        ),
        dict(
            num_fp16_res=1, conv_clamp=0.5, nonlinearity="swish", resample_kernel=np.array([1, 2, 1]),
            freeze_layers=1, mbstd_group_size=2, mbstd_num_features=2, structure="auto",
        ),
    ),
}  # fmt: skip


def check_equal(ours, theirs, *inputs, **kwargs):
    """Same tensors and the same result."""
    state = dict([*theirs.named_parameters(), *theirs.named_buffers()])
    got = dict([*ours.named_parameters(), *ours.named_buffers()])
    assert got.keys() == state.keys()
    for name, t in got.items():
        torch.testing.assert_close(t, state[name], atol=1e-6, rtol=1e-6, check_stride=False, msg=name)
    torch.testing.assert_close(ours(*inputs, **kwargs), theirs(*inputs, **kwargs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_written_networks_are_read_back(case):
    G_kwargs, G_theirs, D_kwargs, D_theirs = CASES[case]
    D_kwargs = {
        "epilogue_kwargs": dict(mbstd_group_size=None),
        **D_kwargs,
    }  # TensorFlow's default: the whole batch
    G, D = networks(G_kwargs, D_kwargs)
    nets = tensorflow.convert(
        write_generator(G, {**SMALL_G, **G_theirs}),
        write_discriminator(D, {**SMALL, **D_theirs}),
        write_generator(G, {**SMALL_G, **G_theirs}),
    )
    c = torch.eye(max(G.c_dim, 1))[[0, -1, 0, 0, -1, 0]] if G.c_dim else None
    check_equal(nets["G"], G, torch.randn(6, 8), c, noise_mode="const", truncation_psi=0.5)
    check_equal(nets["G_ema"], G, torch.randn(6, 8), c, noise_mode="const")
    check_equal(nets["D"], D, torch.randn(6, 3, 16, 16), c)


def test_group_of_the_whole_batch():
    """The default of TensorFlow's discriminator: statistics over all samples, unlike groups of four."""
    _G, D = networks({}, dict(epilogue_kwargs=dict(mbstd_group_size=None)))
    net = tensorflow.convert(*written()[:1], write_discriminator(D, SMALL), *written()[2:])["D"]
    img = torch.randn(8, 3, 16, 16)
    assert net.b4.mbstd.group_size is None
    shuffled = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    torch.testing.assert_close(net(img[shuffled], None), net(img, None)[shuffled], atol=1e-5, rtol=1e-5)


def test_names_by_level_of_detail_mean_the_orig_architecture():
    G, D = networks(
        dict(synthesis_kwargs=dict(architecture="orig")),
        dict(architecture="orig", epilogue_kwargs=dict(mbstd_group_size=None)),
    )
    written_G = write_generator(G, SMALL_G, lods=True)
    assert any(name.startswith("ToRGB_lod0") for name, _v in written_G.components["synthesis"].variables)
    nets = tensorflow.convert(written_G, write_discriminator(D, SMALL, lods=True), written_G)
    check_equal(nets["G"], G, torch.randn(2, 8), None, noise_mode="const")
    check_equal(nets["D"], D, torch.randn(2, 3, 16, 16), None)
    assert nets["G"].init_kwargs.synthesis_kwargs["architecture"] == "orig"
    assert nets["D"].init_kwargs["architecture"] == "orig"


# --- refusals -----------------------------------------------------------------------------------------------


def written(G_changes=(), D_changes=()):
    """[G, D, Gs] of small networks, their arguments changed."""
    G, D = networks({}, dict(epilogue_kwargs=dict(mbstd_group_size=None)))
    return [
        write_generator(G, {**SMALL_G, **dict(G_changes)}),
        write_discriminator(D, {**SMALL, **dict(D_changes)}),
        write_generator(G, SMALL_G),
    ]


def refusal(nets):
    with pytest.raises(ValueError) as caught:
        tensorflow.convert(*nets)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize("version", [3, "4", None])
def test_old_versions(version):
    nets = written()
    nets[2].version = version
    assert refusal(nets) == "TensorFlow pickle version too low"


def test_unknown_kwargs_are_named():
    assert refusal(written(dict(fmap_decay=2))) == "Unknown TensorFlow kwarg: 'fmap_decay'"
    assert refusal(written((), dict(randomize_noise=True))) == "Unknown TensorFlow kwarg: 'randomize_noise'"


@pytest.mark.parametrize("net,part,name,message", [
    (0, "synthesis", "4x4/ToRGB/mod_bias",
     "TensorFlow network G: variable synthesis/4x4/ToRGB/mod_bias {} for synthesis.b4.torgb.affine.bias"),
    (0, "mapping", "Dense1/weight", "TensorFlow network G: variable mapping/Dense1/weight {} for mapping.fc1.weight"),
    (0, "synthesis", "noise3",
     "TensorFlow network G: variable synthesis/noise3 {} for synthesis.b16.conv0.noise_const"),
    (2, None, "dlatent_avg", "TensorFlow network Gs: variable dlatent_avg {} for mapping.w_avg"),
    (1, None, "4x4/Dense0/weight", "TensorFlow network D: variable 4x4/Dense0/weight {} for b4.fc.weight"),
])  # fmt: skip
def test_missing_and_wrong_variables_are_named(net, part, name, message):
    for wrong, what in [
        (None, "is missing, expected ["),
        (np.zeros([2, 2, 2, 2, 2], np.float32), "has shape [2, 2, 2, 2, 2], expected that of ["),
        (np.zeros([], np.float32), "has shape [], expected that of ["),
        (np.array("x" * 100), "is not an array of floats"),
        ("x", "is not an array of floats"),
    ]:
        nets = written()
        holder = nets[net] if part is None else nets[net].components[part]
        holder.variables = [(n, v) for n, v in holder.variables if n != name]
        if wrong is not None:
            holder.variables.append((name, wrong))
        start, end = message.split("{}")
        text = refusal(nets)
        assert text.startswith(start + what), text
        assert text.endswith(end) or what.endswith("floats"), text


@pytest.mark.parametrize("changes,message", [
    (dict(resolution=2**30), "argument img_resolution is 1073741824, the most"),
    (dict(resolution=2**20, fmap_base=2**22), "variable synthesis/32x32/Conv0_up/weight is missing|has more than"),
    (dict(resolution=24), r"variable synthesis/4x4/Const/const has shape \[1, 8, 4, 4\], expected that of \[8, 6, 6\]"),
    (dict(resolution=2), "Generator cannot be built from its arguments: "),
    (dict(resolution="16"), "TensorFlow kwarg resolution is '16', not a whole number"),
    (dict(fmap_base=10**15), "argument channel_base is 2000000000000000, the most"),
    (dict(fmap_base=1.5), "TensorFlow kwarg fmap_base is 1.5, not a whole number"),
    (dict(fmap_base=10 ** (10**4)), "argument channel_base is a number of 33221 bits"),
    (dict(fmap_base=float("inf")), "TensorFlow kwarg fmap_base is inf, not a whole number"),
    (dict(mapping_layers=10**9), "argument num_layers is 1000000000, the most"),
    (dict(latent_size=2**24), "variable mapping/Dense0/weight has shape"),
    (dict(mapping_nonlinearity="gelu"), "kwarg mapping_nonlinearity is 'gelu', accepted: linear, relu,"),
    (dict(nonlinearity=["lrelu"]), r"nonlinearity is a list, accepted: linear,"),
    (dict(architecture="other"), "kwarg architecture is 'other', accepted: orig, skip, resnet"),
])  # fmt: skip
def test_absurd_arguments_end_soon(changes, message):
    assert re.search(message, refusal(written(changes)))


def test_parts_that_contain_themselves():
    nets = written()
    nets[0].components["mapping"].components = dict(again=nets[0])
    assert refusal(nets) == "TensorFlow network G has more than 100 parts"
    for wrong in [5, [5], [(1, 2)], [("name",)], None]:
        nets = written()
        nets[1].variables = wrong
        assert refusal(nets) == "TensorFlow network D: it is not of the known form"
    nets = written()
    nets[2].components["mapping"] = "mapping"
    assert refusal(nets) == "TensorFlow network Gs: mapping/ is not of the known form"


def test_what_is_recognised():
    nets = tuple(written())
    assert tensorflow.recognises(nets)
    for other in [nets[:2], list(nets), dict(G=1), (1, 2, 3), None]:
        assert not tensorflow.recognises(other)
