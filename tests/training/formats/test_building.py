# SPDX-License-Identifier: Apache-2.0
"""Networks from arguments and tensors: equal to constructed ones, and safe against absurd arguments."""

import pickle
import time

import numpy as np
import pytest
import torch

import dnnlib
from ssn_ext.networks import SpatialGenerator
from training.augment import AugmentPipe
from training.formats.building import build_from_tensors, layout, named_tensors
from training.networks import Discriminator, Generator

WIDTHS = dict(channel_base=128, channel_max=16, num_fp16_res=2)
G_KWARGS = dict(
    z_dim=8, c_dim=3, w_dim=12, img_resolution=16, img_channels=3, mapping_kwargs=dict(num_layers=2)
)
CASES = {
    "generator": (Generator, dict(G_KWARGS, synthesis_kwargs=dict(WIDTHS, fp16_channels_last=True))),
    "discriminator": (Discriminator, dict(c_dim=3, img_resolution=16, img_channels=3, **WIDTHS)),
    "frozen": (
        Discriminator,
        dict(c_dim=0, img_resolution=16, img_channels=1, block_kwargs=dict(freeze_layers=3), **WIDTHS),
    ),
    "augment": (AugmentPipe, dict(xflip=1, imgfilter=1, imgfilter_bands=[1, 0, 1, 1])),
    "spatial": (
        SpatialGenerator,
        dict(G_KWARGS, z_dim=8 * 6, w_dim=12 * 6, latent_grid=[2, 3], synthesis_kwargs=dict(WIDTHS)),
    ),
    "two-grids": (
        SpatialGenerator,
        dict(
            G_KWARGS,
            z_dim=8 * 8,
            w_dim=12 * 8,
            latent_grids=[[1, 2], [2, 3]],
            grid_splits=[16],
            synthesis_kwargs=dict(WIDTHS),
        ),
    ),
}


def generator(**changes):
    """(arguments, tensors) of a small generator."""
    torch.manual_seed(0)
    kwargs = dict(G_KWARGS, synthesis_kwargs=dict(WIDTHS), **changes)
    return kwargs, named_tensors(Generator(**kwargs))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_constructed_network(case):
    """Values, formats, gradients, arguments and pickles are those of a network built as usual."""
    cls, kwargs = CASES[case]
    torch.manual_seed(0)
    usual = cls(**kwargs)
    for t in named_tensors(usual).values():
        t.data = t.data + torch.rand(t.shape)  # no value is the one that a constructor gives
    state = torch.get_rng_state()
    ours = build_from_tensors(cls, kwargs, named_tensors(usual))
    assert torch.equal(torch.get_rng_state(), state)
    theirs = named_tensors(usual)
    assert list(named_tensors(ours)) == list(theirs)
    for name, t in named_tensors(ours).items():
        other = theirs[name]
        assert torch.equal(t, other) and t.dtype == other.dtype and t.device == other.device, name
        assert t.requires_grad == other.requires_grad and type(t) is type(other), name
        assert t.is_contiguous(memory_format=torch.channels_last) == other.is_contiguous(
            memory_format=torch.channels_last
        )
        assert t.data_ptr() != other.data_ptr(), name
    assert ours.init_kwargs == usual.init_kwargs and ours.training
    again = pickle.loads(pickle.dumps(ours, protocol=4))
    assert all(torch.equal(t, theirs[name]) for name, t in named_tensors(again).items())


def test_runs_as_the_constructed_network():
    kwargs, tensors = generator()
    usual, ours = Generator(**kwargs), build_from_tensors(Generator, kwargs, tensors)
    usual.load_state_dict(tensors)
    z, c = torch.randn(2, 8), torch.eye(3)[:2]
    assert torch.equal(ours(z, c, noise_mode="const"), usual(z, c, noise_mode="const"))
    ours(z, c).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_half_precision_becomes_float32_and_numpy_numbers_plain():
    kwargs, tensors = generator()
    half = {name: t.detach().to(torch.float16) for name, t in tensors.items()}
    kwargs["z_dim"], kwargs["mapping_kwargs"] = np.int64(8), dnnlib.EasyDict(num_layers=np.int32(2))
    G = build_from_tensors(Generator, kwargs, half)
    for name, t in named_tensors(G).items():
        assert t.dtype == torch.float32 and torch.equal(t, half[name].to(torch.float32))
    assert type(G.z_dim) is int and type(G.init_kwargs.mapping_kwargs.num_layers) is int
    assert isinstance(G.init_kwargs.mapping_kwargs, dnnlib.EasyDict)


def test_filters_follow_from_the_arguments():
    """The only tensors that a layout has: a reader of files without filters takes them from there."""
    kwargs, _tensors = generator()
    kwargs["synthesis_kwargs"]["resample_filter"] = [1, 2, 1]
    own = named_tensors(layout(Generator, kwargs, 100))
    expected = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1])) / 16
    for block in ["b8", "b16"]:
        assert torch.equal(own[f"synthesis.{block}.conv0.resample_filter"], expected)
    for name, t in own.items():
        assert (t.device.type == "meta") != name.endswith("resample_filter")


def test_networks_of_one_set_of_tensors_share_nothing():
    kwargs, tensors = generator()
    first, second = (build_from_tensors(Generator, kwargs, tensors) for _ in range(2))
    with torch.no_grad():
        first.mapping.fc0.weight.zero_()
    assert torch.equal(second.mapping.fc0.weight, tensors["mapping.fc0.weight"])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("mapping.fc1.weight"), r"1 tensors .*: mapping.fc1.weight \[12, 12\] is missing"),
        (
            lambda t: t.update({"mapping.fc1.weight": torch.zeros(12, 1)}),
            r"mapping.fc1.weight has shape \[12, 1\], expected \[12, 12\]",
        ),
        (lambda t: t.update(other=torch.zeros(1)), "'other' is not one of its tensors"),
        (
            lambda t: t.update({"mapping.w_avg": torch.zeros(12, dtype=torch.int64)}),
            "mapping.w_avg holds torch.int64",
        ),
        (
            lambda t: t.update({"mapping.w_avg": torch.zeros(12).to_sparse()}),
            "mapping.w_avg holds torch.float32, torch.sparse_coo",
        ),
        (
            lambda t: t.update({"mapping.w_avg": torch.zeros(12, device="meta")}),
            "mapping.w_avg .* on meta, not plain floats",
        ),
        (
            lambda t: t.update({"synthesis.b4.conv1.weight": torch.zeros(1, 1, 1, 1).expand(16, 16, 3, 3)}),
            "views of less memory",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message):
    kwargs, tensors = generator()
    change(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        build_from_tensors(Generator, kwargs, tensors)
    assert "\n" not in str(caught.value)


def nested(depth):
    """A list in a list in a list..."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


def doubling(depth):
    """A list of 2^depth entries that takes no memory."""
    value = 1
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            dict(img_resolution=2**30),
            "argument img_resolution is 1073741824, the most for this file is 16777216",
        ),
        (dict(img_resolution=2**24), "ZeroDivisionError"),  # channel_base leaves no channels up there
        (
            dict(img_resolution=2**24, synthesis_kwargs=dict(channel_base=2**24)),
            "it has more than 216 tensors",
        ),
        (dict(img_resolution=10**6), "pictures must be h0 x w0 doubled n times"),
        (dict(img_resolution=-4), "pictures must be h0 x w0 doubled n times"),
        (dict(z_dim=10 ** (10**4)), "argument z_dim is a number of 33220 bits"),
        (dict(z_dim=2**24), r"mapping.fc0.weight has shape \[12, 20\], expected \[12, 16777228\]"),
        (dict(mapping_kwargs=dict(num_layers=10**9)), "argument num_layers is 1000000000, the most"),
        (dict(mapping_kwargs=dict(num_layers=50)), "mapping.fc2.weight .* is missing"),
        (dict(synthesis_kwargs=dict(channel_base=10**15)), "argument channel_base is 1000000000000000"),
        (
            dict(synthesis_kwargs=dict(channel_base=2**24, channel_max=2**24)),
            "tensors do not fit|cannot be built",
        ),
        (
            dict(synthesis_kwargs=dict(kernel_size=2**24)),
            "cannot be built from its arguments: RuntimeError",
        ),
        (
            dict(synthesis_kwargs=dict(resample_filter=[1] * 65)),
            "resample_filter has 65 entries, the most is 64",
        ),
        (dict(synthesis_kwargs=dict(resample_filter=nested(20))), "nested 8 deep"),
        (dict(synthesis_kwargs=dict(resample_filter=doubling(30))), "more than 1000 arguments"),
        (
            dict(synthesis_kwargs=dict(num_fp16_res=-1e308)),
            "cannot be built from its arguments: OverflowError",
        ),
        (
            dict(mapping_kwargs=dict(lr_multiplier=torch.ones(1))),
            "lr_multiplier is a Tensor, not a plain value",
        ),
        (
            dict(synthesis_kwargs=dict(activation="nope")),
            "cannot be built from its arguments: KeyError: 'nope'",
        ),
        (dict(unheard_of=1), "unexpected keyword argument 'unheard_of'"),
        ({"a b": 1}, "'a b' is not the name of an argument"),
    ],
)
def test_absurd_arguments_end_soon(changes, message):
    resource = pytest.importorskip("resource", reason="memory is measured on Unix only")
    kwargs, tensors = generator()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        build_from_tensors(Generator, {**kwargs, **changes}, tensors)
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_watch_ends_with_the_building():
    """What a network built here may have says nothing about those built afterwards."""
    kwargs, tensors = generator()
    with pytest.raises(ValueError, match="it has more than 102 tensors"):
        big = dict(kwargs, img_resolution=2**20, mapping_kwargs=dict(num_layers=1))
        build_from_tensors(Generator, big, dict(a=torch.zeros(1)))
    G = Generator(**kwargs)
    assert G.mapping.fc0.weight.device.type == "cpu" and G.load_state_dict(tensors)
