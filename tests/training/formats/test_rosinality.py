# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in rosinality's layout: golden pictures, what files lack, and refusals."""

import argparse
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from training.formats import rosinality

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def load():
    """The golden checkpoint, whose state dicts a test may change."""
    return rosinality.read_checkpoint(str(GOLDEN / "rosinality_64.pt"))


@pytest.fixture(scope="module")
def golden():
    said = []
    nets = rosinality.convert(load(), say=said.append)
    assert said == []  # nothing is missing
    return nets, {k: torch.as_tensor(v) for k, v in np.load(GOLDEN / "rosinality_64.npz").items()}


def close(value, expected):
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


def test_golden_pictures(golden):
    nets, expected = golden
    G = nets["G_ema"]
    close(G.mapping(expected["z"], None), expected["latents"])
    close(G(expected["z"], None, noise_mode="const"), expected["img"])
    close(G(expected["z"], None, truncation_psi=0.7, noise_mode="const"), expected["img_psi07"])


def test_golden_logits(golden):
    nets, expected = golden
    close(nets["D"](expected["img"], None), expected["logits"])


def test_networks_are_inferred(golden):
    nets, _expected = golden
    assert list(nets) == ["G", "D", "G_ema"]
    for net in nets.values():
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        assert pickle.loads(pickle.dumps(net, protocol=4)).init_kwargs == net.init_kwargs
    G, D = nets["G"], nets["D"]
    assert (G.z_dim, G.w_dim, G.c_dim, G.img_resolution, G.mapping.num_layers) == (32, 32, 0, 64, 4)
    widths = dict(channel_base=24 * 64, channel_max=24)
    assert G.init_kwargs.synthesis_kwargs == dict(widths, architecture="skip")
    assert D.init_kwargs.channel_base == 24 * 64 and D.b4.mbstd.group_size == 4


def test_g_is_its_own_network():
    checkpoint = load()
    other = checkpoint["g"]["style.3.weight"] = torch.randn(32, 32)
    nets = rosinality.convert(checkpoint)
    assert torch.equal(nets["G"].mapping.fc2.weight, other)
    assert torch.equal(nets["G_ema"].mapping.fc2.weight, checkpoint["g_ema"]["style.3.weight"])


# --- what files lack ----------------------------------------------------------------------------------------


def test_without_g_it_starts_as_g_ema():
    """Equal and apart: training changes one of them."""
    checkpoint, said = load(), []
    del checkpoint["g"]
    nets = rosinality.convert(checkpoint, say=said.append)
    assert said == ["g is not in the file: it starts as g_ema"]
    for ours, theirs in zip(nets["G"].parameters(), nets["G_ema"].parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_without_g_ema_it_starts_as_g():
    checkpoint, said = load(), []
    del checkpoint["g_ema"]
    nets = rosinality.convert(checkpoint, say=said.append)
    assert said == ["g_ema is not in the file: it starts as g"]
    assert torch.equal(nets["G_ema"].mapping.fc2.weight, checkpoint["g"]["style.3.weight"])


def test_without_d_there_is_an_untrained_one():
    checkpoint, said = load(), []
    del checkpoint["d"]
    state = torch.get_rng_state()
    nets = rosinality.convert(checkpoint, say=said.append)
    assert said == ["d is not in the file: the discriminator is new and untrained"]
    assert torch.equal(torch.get_rng_state(), state)
    like = rosinality.convert(load())["D"]
    assert nets["D"].init_kwargs == like.init_kwargs
    shapes = {name: t.shape for name, t in like.state_dict().items()}
    assert {name: t.shape for name, t in nets["D"].state_dict().items()} == shapes
    assert nets["D"](torch.zeros(4, 3, 64, 64), None).isfinite().all()


def test_w_avg_is_estimated(golden):
    """The mean of 10,000 w agrees with that of other latents to its standard error."""
    checkpoint, said = load(), []
    del checkpoint["latent_avg"]
    G = rosinality.convert(checkpoint, say=said.append)["G_ema"]
    assert said == [
        f"{key}: the file has no latent_avg; w_avg is the mean of w over 10000 latents"
        for key in ["g", "g_ema"]
    ]
    w = G.mapping(torch.randn([4000, 32], generator=torch.Generator().manual_seed(5)), None)[:, 0]
    error = (G.mapping.w_avg - w.mean(dim=0)) / (w.std(dim=0) * (1 / 4000 + 1 / 10000) ** 0.5)
    assert error.abs().max() < 4.5 and 0.5 < error.square().mean() < 2
    again = rosinality.convert(checkpoint, say=said.append)["G_ema"]
    assert torch.equal(again.mapping.w_avg, G.mapping.w_avg)


def test_old_files_without_noise(golden):
    _nets, expected = golden
    checkpoint, said = load(), []
    for key in ["g", "g_ema"]:
        checkpoint[key] = {k: v for k, v in checkpoint[key].items() if not k.startswith("noises.")}
    nets = rosinality.convert(checkpoint, say=said.append)
    assert said == [
        f"{key}: the file has no noise of its own; constant noise is random, from a fixed seed"
        for key in ["g", "g_ema"]
    ]
    G, full = nets["G_ema"], rosinality.convert(load())["G_ema"]
    assert torch.equal(G.synthesis.b64.conv1.noise_const, nets["G"].synthesis.b64.conv1.noise_const)
    assert abs(G.synthesis.b64.conv0.noise_const.std() - 1) < 0.1
    close(G(expected["z"], None, noise_mode="none"), full(expected["z"], None, noise_mode="none"))


def test_only_what_is_wanted():
    """Of what is not wanted nothing is said, and it may be broken."""
    checkpoint, said = load(), []
    del checkpoint["g"]
    checkpoint["d"] = dict(broken=torch.zeros(1))
    assert list(rosinality.convert(checkpoint, say=said.append, only=["G_ema"])) == ["G_ema"] and said == []
    with pytest.raises(ValueError, match="d: 0 convolutions are not"):
        rosinality.convert(checkpoint, only=["D"])
    del checkpoint["d"]
    assert list(rosinality.convert(checkpoint, say=said.append, only=["D"])) == ["D"] and len(said) == 1


def test_notes_are_logged(caplog):
    checkpoint = load()
    del checkpoint["d"]
    rosinality.convert(checkpoint)
    assert [r.getMessage() for r in caplog.records] == [
        "Note: d is not in the file: the discriminator is new and untrained"
    ]


# --- widths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels,base,most", [
    ({4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}, 32768, 512),
    ({4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64}, 16384, 512),
    ({4: 24, 8: 24}, 192, 24),
    ({4: 40, 8: 20, 16: 10}, 160, 40),
    ({4: 41, 8: 20, 16: 10}, 164, 41),
])  # fmt: skip
def test_widths(channels, base, most):
    found = rosinality._widths("g", channels)
    assert found == dict(channel_base=base, channel_max=most)
    assert {r: min(base // r, most) for r in channels} == channels


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match="g: 24 channels at 16x16 do not fit: .* give 24 at 4, 12 at 8, 24 at 16"
    ):
        rosinality._widths("g", {4: 24, 8: 12, 16: 24})
    checkpoint = load()
    for key in ["convs.3.conv.weight", "convs.2.conv.weight"]:
        checkpoint["g_ema"][key] = torch.zeros(1, 7, 24, 3, 3)
    with pytest.raises(ValueError, match="g_ema: 7 channels at 16x16 do not fit"):
        rosinality.convert(checkpoint)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key,name,value,message", [
    ("g", "style.3.bias", None, r"g: style.3.bias is missing, expected \[32\] for mapping.fc2.bias"),
    ("g_ema", "convs.5.noise.weight", torch.zeros(2),
     r"g_ema: convs.5.noise.weight has shape \[2\], expected that of \[\] for synthesis.b32.conv1.noise_strength"),
    ("g_ema", "noises.noise_4", None, r"g_ema: noises.noise_4 is missing, expected \[16, 16\]"),
    ("g", "to_rgbs.1.bias", torch.zeros(3), r"g: to_rgbs.1.bias has shape \[3\]"),
    ("g", "to_rgbs.1.bias", "text", r"g: to_rgbs.1.bias is not an array of floats"),
    ("g", "input.input", torch.zeros(1, 24), r"g: input.input has shape \[1, 24\], expected that of \[24, 4, 4\]"),
    ("g", "input.input", torch.zeros(3), "g: input.input is missing or not a tensor of 2 or more dimensions"),
    ("g", "convs.7.conv.weight", None, "g: 7 convolutions are not those of pictures of 8 to 4096 pixels a side"),
    ("g", "extra.weight", torch.zeros(3), "g: a StyleGAN2 has no place for 1 tensors, first 'extra.weight'"),
    ("g", "convs.0.conv.blur.kernel", torch.ones(4, 4), r"convs.0.conv.blur.kernel is not the filter \[1, 3, 3, 1\]"),
    ("g", "convs.0.conv.blur.kernel", torch.ones(2, 2), r"convs.0.conv.blur.kernel is not the filter \[1, 3, 3, 1\]"),
    ("g_ema", "to_rgbs.0.iwt.ll", torch.ones(2, 2), "g_ema is a SWAGAN"),
    ("d", "dwt.ll", torch.ones(2, 2), "d is a SWAGAN"),
    ("d", "final_linear.0.weight", torch.zeros(24, 24), r"d: final_linear.0.weight has shape \[24, 24\], expected"),
    ("d", "convs.2.skip.1.weight", None, "d: convs.2.skip.1.weight is missing, .* for b32.skip.weight"),
    ("d", 5, torch.zeros(1), "d is not a dict of tensors by name"),
    ("d", "more", torch.zeros(1), "d: a StyleGAN2 has no place for 1 tensors, first 'more'"),
])  # fmt: skip
def test_wrong_tensors_are_named(key, name, value, message):
    checkpoint = load()
    if value is None:
        del checkpoint[key][name]
    else:
        checkpoint[key][name] = value
    with pytest.raises(ValueError, match=message) as caught:
        rosinality.convert(checkpoint)
    assert "\n" not in str(caught.value)


def test_swagan_by_its_options():
    with pytest.raises(ValueError, match="is a SWAGAN"):
        rosinality.convert(dict(load(), args=argparse.Namespace(arch="swagan")))
    assert rosinality.convert(dict(load(), args=argparse.Namespace(arch="stylegan2")))


def test_no_generator():
    with pytest.raises(ValueError, match="no generator: neither g_ema nor g is there"):
        rosinality.convert(dict(d=load()["d"]))


def test_what_is_recognised():
    checkpoint = load()
    assert rosinality.recognises(checkpoint)
    assert rosinality.recognises(dict(g=checkpoint["g"]))
    for other in [
        dict(G=1, D=2, G_ema=3),
        dict(g_ema=dict()),
        dict(g=torch.zeros(1)),
        checkpoint["g"],
        (1, 2),
        None,
    ]:
        assert not rosinality.recognises(other)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints_open(tmp_path, zipped):
    """With the options and optimisers of a training, in both of PyTorch's formats, by path and by file."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    checkpoint = dict(
        load(), args=argparse.Namespace(path="data", size=64), g_optim=optimizer.state_dict(), ada_aug_p=0.25
    )
    path = tmp_path / "000100.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    again = rosinality.read_checkpoint(path)
    assert again["args"].size == 64 and again["ada_aug_p"] == 0.25
    with open(path, "rb") as f:
        assert rosinality.recognises(rosinality.read_checkpoint(f))
    assert torch.equal(again["g"]["input.input"], checkpoint["g"]["input.input"])


class Hostile:
    """Runs code where it is unpickled carelessly."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path, capsys, zipped):
    path = tmp_path / "bad.pt"
    torch.save(dict(g=Hostile()), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"bad.pt is not a checkpoint .*: it holds __builtin__.print, which is not opened"
    ) as err:
        rosinality.read_checkpoint(path)
    assert "\n" not in str(err.value) and capsys.readouterr().out == ""


def test_other_files(tmp_path):
    path = tmp_path / "no.pt"
    with pytest.raises(FileNotFoundError):
        rosinality.read_checkpoint(path)
    for content in [b"", b"hello", b"PK\x03\x04 and no more"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no.pt is not a checkpoint of tensors") as caught:
            rosinality.read_checkpoint(path)
        assert "\n" not in str(caught.value)
    torch.save(torch.zeros(1), path)
    with pytest.raises(ValueError, match="no.pt holds a Tensor, expected a dict"):
        rosinality.read_checkpoint(path)
    buffer = io.BytesIO()
    torch.save(dict(a=1), buffer)
    buffer.seek(0)
    assert rosinality.read_checkpoint(buffer) == dict(a=1)
