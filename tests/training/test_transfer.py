# SPDX-License-Identifier: Apache-2.0
"""Starting from networks of other settings: what is copied, what starts anew, what is refused."""

import copy
import itertools

import pytest
import torch

from ssn_ext import transfer as spatial
from ssn_ext.networks import SpatialGenerator
from training import transfer
from training.networks import Discriminator, Generator

NETS = ["G", "D", "G_ema"]


def tensors(network):
    return dict([*network.named_parameters(), *network.named_buffers()])


def networks(
    grid=None, res=16, base=64, most=8, layers=2, classes=0, z=8, w=8, seed=0, G_arch="skip", D_arch="resnet",
    shape=None,
):  # fmt: skip
    """dict of small networks without two equal values; G_ema differs from G. grid: makes the generators spatial."""
    torch.manual_seed(seed)
    data = dict(c_dim=classes, img_resolution=res, img_channels=3)
    if shape:
        data.update(img_resolution=max(shape), img_shape=shape)
    widths = dict(channel_base=base, channel_max=most)
    kwargs = dict(z_dim=z, w_dim=w, mapping_kwargs=dict(num_layers=layers))
    kwargs["synthesis_kwargs"] = dict(widths, architecture=G_arch)
    make = Generator
    if grid:
        kwargs, make = spatial.spatial_kwargs(kwargs, grid), SpatialGenerator
        kwargs["synthesis_kwargs"]["encoder_kwargs"] = dict(channels=4)
    nets = dict(
        G=make(**kwargs, **data),
        D=Discriminator(**widths, **data, architecture=D_arch, mapping_kwargs=dict(num_layers=layers)),
        G_ema=make(**kwargs, **data),
    )
    for net in nets.values():
        for name, t in tensors(net.requires_grad_(False)).items():
            if not name.endswith("resample_filter"):
                t.add_(torch.randn(t.shape))
        if hasattr(net, "synthesis"):  # as training keeps it: the same vector in every block
            blocks = grid[0] * grid[1] if grid else 1
            net.mapping.w_avg.copy_(torch.randn(w).repeat_interleave(blocks))
    return nets


def start(source, target, allow=(), grid=None):
    fill = spatial.transfer if grid else transfer.transfer
    return fill(source, target["G"], target["D"], target["G_ema"], allow)


def equal(a, b):
    """Whether all tensors of two dicts of networks are the same."""
    return all(torch.equal(t, tensors(b[net])[name]) for net in a for name, t in tensors(a[net]).items())


# --- one difference at a time -------------------------------------------------------------------------------

SETTINGS = {
    "resolution": (dict(res=16), dict(res=32)),
    "resolution, as many blocks": (dict(res=16), dict(shape=[16, 24])),
    "resolution, fewer blocks": (dict(res=32), dict(shape=[24, 32])),
    "widths": (dict(most=8), dict(most=16, base=128)),
    "mapping": (dict(layers=2), dict(layers=5)),
    "mapping, conditional": (dict(layers=2, classes=3), dict(layers=5, classes=3)),
    "labels": (dict(classes=0), dict(classes=3)),
    "labels of other numbers": (dict(classes=5), dict(classes=3)),
    "resolution, orig": (
        dict(res=32, G_arch="orig", D_arch="orig"),
        dict(res=8, G_arch="orig", D_arch="orig"),
    ),
    "resolution, skip": (
        dict(res=8, G_arch="resnet", D_arch="skip"),
        dict(res=16, G_arch="resnet", D_arch="skip"),
    ),
}
WAYS = [(name, back) for name in SETTINGS for back in [False, True]]


@pytest.mark.parametrize("grid", [None, [2, 2]])
@pytest.mark.parametrize("setting,back", WAYS)
def test_one_difference(setting, back, grid):
    """Refused with the name of its option; with it, all that agrees is copied and the rest keeps its own values."""
    category = setting.split(" ")[0].strip(",")
    ours, theirs = SETTINGS[setting][::-1] if back else SETTINGS[setting]
    source, target = networks(grid, **theirs), networks(grid, **ours, seed=1)
    before = copy.deepcopy(target)
    others = [each for each in transfer.CATEGORIES if each != category]
    for allow, flags in [([], category), (others, ",".join(transfer.CATEGORIES))]:
        with pytest.raises(transfer.CoverageError) as caught:
            start(source, target, allow, grid)
        text = str(caught.value)
        assert text.endswith(f"; to go on without them: --allow-partial={flags}") and "\n" not in text
        assert equal(before, target)
    rows = start(source, target, [category], grid)
    assert any(row.category == category for row in rows["G"])
    for net in NETS:
        mine, had, given = tensors(target[net]), tensors(before[net]), tensors(source[net])
        by_name = {row.name: row for row in rows[net]}
        assert by_name.keys() == mine.keys() | given.keys() and len(by_name) == len(rows[net])
        for name, t in mine.items():
            if name in given and given[name].shape == t.shape:
                assert torch.equal(t, given[name]) and by_name[name].what == "copied", name
            elif by_name[name].what == "resized":
                assert name.endswith("b4.const") and by_name[name].category == category
            elif by_name[name].what != "rescaled":
                assert torch.equal(t, had[name]) and by_name[name].what == "re-initialised", name
                assert by_name[name].category == category
        for name in given.keys() - mine.keys():
            assert by_name[name][2:4] == ("unused", category)


def names(rows, net, what):
    return {row.name for row in rows[net] if row.what == what}


def test_blocks_of_other_resolutions():
    rows = start(networks(res=32), networks(res=16), ["resolution"])
    assert all(name.startswith("synthesis.b32.") for name in names(rows, "G", "unused"))
    assert {name.split(".")[0] for name in names(rows, "D", "unused")} == {"b32"}
    new = {"b16.fromrgb.weight", "b16.fromrgb.bias", "b16.fromrgb.resample_filter"}
    assert names(rows, "D", "re-initialised") == new and not names(rows, "G", "re-initialised")


def test_square_from_another_shape():
    """All but what has one value per pixel is copied."""
    rows = start(networks(shape=[16, 24]), networks(), ["resolution"])
    own = names(rows, "G", "re-initialised")
    assert {name.rsplit(".", 1)[1] for name in own} == {"noise_const"} and len(own) == 5
    assert names(rows, "G", "resized") == {"synthesis.b4.const"}
    assert names(rows, "D", "re-initialised") == {"b4.fc.weight"}


def test_two_mapping_layers_from_eight():
    """The config of the family that dropped six layers of its published networks without a word."""
    source, target = networks(layers=8), networks(layers=2)
    with pytest.raises(transfer.CoverageError) as caught:
        start(source, target)
    assert str(caught.value) == (
        "24 tensors do not match, first: G.mapping.fc2.weight [8, 8] would be left behind;"
        " G.mapping.fc2.bias [8] would be left behind; G.mapping.fc3.weight [8, 8] would be left behind;"
        " to go on without them: --allow-partial=mapping"
    )


@pytest.mark.parametrize("grid", [None, [2, 3]])
def test_first_labels_change_nothing(grid):
    """An unconditional generator's pictures, whatever the label, and gradients for the new columns."""
    source, target = networks(grid, classes=0), networks(grid, classes=3)
    start(source, target, ["labels"], grid)
    z = torch.randn(4, source["G"].z_dim)
    for net in ["G", "G_ema"]:
        expected = source[net](z, None, noise_mode="const")
        got = target[net](z, torch.eye(3)[[0, 1, 2, 0]], noise_mode="const")
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    G = target["G"].requires_grad_(True)
    G.mapping(z, torch.eye(3)[[0, 1, 2, 0]]).sum().backward()
    assert G.mapping.fc0.weight.grad[:, 8:].abs().min() > 0


@pytest.mark.parametrize("grid", [None, [2, 3]])
def test_without_labels_it_is_as_with_an_empty_embedding(grid):
    source, target = networks(grid, classes=3), networks(grid, classes=0)
    start(source, target, ["labels"], grid)
    blind = source["G"]
    blind.mapping.embed.weight.zero_()
    blind.mapping.embed.bias.zero_()
    z = torch.randn(4, blind.z_dim)
    expected = blind.mapping(z, torch.eye(3)[[0, 1, 2, 0]])
    torch.testing.assert_close(target["G"].mapping(z, None), expected, atol=1e-4, rtol=1e-4)


def test_label_layers_and_no_others():
    rows = start(networks(classes=0), networks(classes=3), ["labels"])
    assert names(rows, "G", "re-initialised") == {"mapping.embed.weight", "mapping.embed.bias"}
    assert names(rows, "G", "rescaled") == {"mapping.fc0.weight"}
    D = names(rows, "D", "re-initialised")
    assert (
        {name.split(".")[0] for name in D} == {"mapping", "b4"}
        and "b4.out.weight" in D
        and "b4.fc.weight" not in D
    )
    rows = start(networks(classes=5), networks(classes=3), ["labels"])
    assert (
        names(rows, "G", "re-initialised") == names(rows, "D", "re-initialised") == {"mapping.embed.weight"}
    )


def test_widths_start_anew_and_are_not_cut():
    source, target = networks(most=16, base=128), networks(most=8)
    before = copy.deepcopy(target)
    start(source, target, ["widths"])
    assert torch.equal(target["G"].synthesis.b4.const, before["G"].synthesis.b4.const)
    assert torch.equal(target["G"].mapping.fc0.weight, source["G"].mapping.fc0.weight)


# --- several differences ------------------------------------------------------------------------------------


def test_all_differences_at_once():
    source = networks(res=32, most=16, base=128, layers=4, classes=3, z=12)
    target = networks()
    for allow in itertools.combinations(transfer.CATEGORIES, 3):
        before = copy.deepcopy(target)
        with pytest.raises(transfer.CoverageError, match="--allow-partial=resolution,widths,mapping,labels$"):
            start(source, target, allow)
        assert equal(before, target)
    rows = start(source, target, transfer.CATEGORIES)
    assert {row.category for row in rows["G"]} == {"", *transfer.CATEGORIES}
    by_name = {row.name: row for row in rows["G"]}
    assert by_name["mapping.fc0.weight"][2:4] == ("re-initialised", "widths")  # other latents, too


def test_nothing_changes_where_only_the_last_network_is_wrong():
    source, target = networks(), networks(seed=1)
    source["G_ema"] = networks(layers=3)["G_ema"]
    before = copy.deepcopy(target)
    with pytest.raises(
        transfer.CoverageError, match="^2 tensors do not match, first: G_ema.mapping.fc2.weight"
    ):
        start(source, target)
    assert equal(before, target)


@pytest.mark.parametrize("theirs", [dict(G_arch="resnet"), dict(D_arch="skip")])
def test_another_architecture_is_never_allowed(theirs):
    source, target = networks(**theirs), networks()
    before = copy.deepcopy(target)
    with pytest.raises(
        transfer.CoverageError, match="no option allows .* of them, such as .*: another architecture"
    ):
        start(source, target, transfer.CATEGORIES)
    assert equal(before, target)


def test_unknown_differences():
    with pytest.raises(
        ValueError, match="depth: no difference of networks; there are resolution, widths, mapping, labels"
    ):
        start(networks(), networks(), ["depth"])


def test_spatial_from_plain_with_differences():
    """The encoder needs no permission, the rest does."""
    source, target = networks(layers=4, res=32), networks([2, 2], res=16)
    with pytest.raises(transfer.CoverageError, match="--allow-partial=resolution,mapping$"):
        start(source, target, grid=[2, 2])
    rows = start(source, target, ["resolution", "mapping"], grid=[2, 2])
    new = names(rows, "G", "re-initialised")
    assert new and all(spatial.is_encoder(name) for name in new)
    assert torch.equal(target["G"].synthesis.b16.conv0.weight, source["G"].synthesis.b16.conv0.weight)
    w_avg = target["G"].mapping.w_avg.reshape(8, 4)
    assert torch.equal(w_avg, source["G"].mapping.w_avg[:, None].expand(8, 4))


def test_spatial_with_another_grid_and_resolution():
    source, target = networks([2, 2], res=16), networks([3, 2], res=32)
    start(source, target, ["resolution"], grid=[3, 2])
    w = source["G"].mapping.w_avg.reshape(8, 4)[:, 0]
    torch.testing.assert_close(target["G"].mapping.w_avg.reshape(8, 6), w[:, None].expand(8, 6))


# --- sizes of pictures within blocks ------------------------------------------------------------------------


class Shapes(torch.nn.Module):
    """A network that has nothing but tensors of given names and shapes."""

    def __init__(self, shapes, **attributes):
        super().__init__()
        self.c_dim = 0
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))
        self.__dict__.update(attributes)


@pytest.mark.parametrize("name,mine,other,what,category", [
    ("synthesis.b4.const", [8, 4, 4], [8, 4, 6], "resized", "resolution"),
    ("synthesis.b4.const", [8, 4, 4], [9, 4, 4], "re-initialised", "widths"),
    ("synthesis.b4.const", [8, 4, 4], [9, 4, 6], "re-initialised", "resolution"),
    ("synthesis.b8.conv0.noise_const", [8, 8], [8, 12], "re-initialised", "resolution"),
    ("synthesis.b8.conv0.weight", [8, 8, 3, 3], [8, 8, 1, 1], "re-initialised", "widths"),
    ("mapping.w_avg", [8], [9], "re-initialised", "widths"),
])  # fmt: skip
def test_categories_of_shapes(name, mine, other, what, category):
    target, source = (Shapes({name: shape}, z_dim=8) for shape in (mine, other))
    assert [row[2:4] for row in transfer.match(source, target)] == [(what, category)]


def test_the_constant_is_resized():
    """A plane stays that plane, its borders in place; and only with permission."""
    source, target = Shapes({"b4.const": [2, 4, 4]}), Shapes({"b4.const": [2, 4, 7]})
    plane = torch.arange(4)[:, None] * 2 + torch.arange(4.0) * 10
    with torch.no_grad():
        source.b4.const.copy_(torch.stack([plane, -plane]))
    with pytest.raises(transfer.CoverageError, match="--allow-partial=resolution$"):
        transfer.copy_networks({"G": (source, target)})
    rows = transfer.copy_networks({"G": (source, target)}, ["resolution"])
    expected = torch.arange(4)[:, None] * 2 + torch.arange(7) * 5.0
    torch.testing.assert_close(target.b4.const.detach(), torch.stack([expected, -expected]))
    assert transfer.coverage_table(rows).splitlines()[2] == "G resized (resolution): b4.const"


@pytest.mark.parametrize("theirs,category", [(8, "resolution"), (9, "widths")])
def test_category_of_the_layer_behind_the_last_picture(theirs, category):
    """A discriminator's b4.fc reads all pixels: other sizes where the channels are the same, else other widths."""
    target = Shapes({"b4.conv.weight": [8, 9, 3, 3], "b4.fc.weight": [8, 8 * 16]})
    source = Shapes({"b4.conv.weight": [theirs, theirs + 1, 3, 3], "b4.fc.weight": [theirs, theirs * 24]})
    rows = {row.name: row.category for row in transfer.match(source, target)}
    assert rows["b4.fc.weight"] == category


# --- what is said -------------------------------------------------------------------------------------------


def test_table():
    """Counts and values add up to those of the networks, and the names are there."""
    source, target = networks(layers=4, classes=3), networks(layers=2)
    rows = start(source, target, ["mapping", "labels"])
    lines = transfer.coverage_table(rows).splitlines()
    assert lines[0].split() == ["network", "copied", "values", "re-initialised", "values", "unused", "values"]
    G = lines[1].replace(",", "").split()
    mine, given = tensors(target["G"]), tensors(source["G"])
    total = sum(t.numel() for t in mine.values())
    assert G == ["G", str(len(mine)), str(total), "0", "0", "6", str(2 * (64 + 8) + 3 * 8 + 8)]
    assert len(given) == len(mine) + 6
    assert lines[4:7] == [
        "G, G_ema rescaled (labels): mapping.fc0.weight",
        "G, G_ema unused (labels): mapping.embed.weight, mapping.embed.bias",
        "G, G_ema unused (mapping): mapping.fc2.weight, mapping.fc2.bias, mapping.fc3.weight and 1 more",
    ]
    assert lines[7].startswith("D re-initialised (labels): ") and len(lines) == 9


def test_table_of_an_exact_start():
    rows = start(networks(), networks([2, 2]), grid=[2, 2])
    lines = transfer.coverage_table(rows).splitlines()
    assert len(lines) == 5
    assert lines[4].startswith("G, G_ema re-initialised (new in this kind of network): synthesis.b4.")
