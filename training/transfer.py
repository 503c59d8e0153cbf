# SPDX-License-Identifier: Apache-2.0
"""From the networks of a file to those of a run: every tensor by name, and nothing lost or left untold.

Where the two differ, a tensor may have no counterpart of its shape. Each such tensor belongs to one of four
differences, which a user allows one by one (--allow-partial):

    resolution  blocks that one side lacks, the layers from and to pictures at its end, sizes of pictures within blocks:
                the constant is resized, bilinearly, and constant noise starts anew
    widths      any other shape: the tensor starts anew, nothing is cut to fit
    mapping     layers of the mapping network that one side lacks
    labels      embedding of labels, what reads it, and the output of a conditional discriminator
"""

import math
import re
from collections import namedtuple

import torch

CATEGORIES = ("resolution", "widths", "mapping", "labels")
NEW = "new in this kind of network"  # the category of tensors that need no permission

# What happens to one tensor. what: copied, rescaled, resized, re-initialised or unused. category: one of CATEGORIES,
# NEW, None where nothing can allow it, '' where all is well. problem: what an error says.
Row = namedtuple("Row", "name shape what category problem")


class CoverageError(ValueError):
    """Networks whose tensors do not match one to one, beyond what was allowed."""


def transfer(source, G, D, G_ema, allow=()):
    """Default start from a snapshot: every tensor of G, D and G_ema by name. Returns rows by network.

    source: dict with G, D, G_ema. allow: differences that may be, of CATEGORIES; the rest is a CoverageError.
    """
    pairs = {name: (source[name], module) for name, module in [("G", G), ("D", D), ("G_ema", G_ema)]}
    return copy_networks(pairs, allow)


def copy_networks(pairs, allow=(), fresh=lambda name: False):
    """Copies networks, pairs = {name: (source, target)}, and returns what happened, {name: list of Row}.

    fresh(name) tells which tensors of a target need no counterpart. What has none of its shape, on either side, must
    be of a category in `allow`: those of the target keep their own values then. CoverageError otherwise, and nothing
    is changed.
    """
    unknown = [category for category in allow if category not in CATEGORIES]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no difference of networks; there are {', '.join(CATEGORIES)}"
        )
    rows = {name: match(source, target, fresh) for name, (source, target) in pairs.items()}
    _check(rows, allow)
    for name, (source, target) in pairs.items():
        ours, theirs = _tensors(target), _tensors(source)
        with torch.no_grad():
            for row in rows[name]:
                if row.what == "copied":
                    ours[row.name].copy_(theirs[row.name])
                elif row.what == "resized":
                    theirs_there = theirs[row.name].to(ours[row.name])
                    ours[row.name].copy_(_resized(theirs_there, ours[row.name].shape[1:]))
                elif row.what == "rescaled":
                    _keep_latents(theirs[row.name], ours[row.name], _latent_width(target))
    return rows


def match(source, target, fresh=lambda name: False):
    """What is to happen to each tensor of `target`, then to those of `source` that have no counterpart: list of Row."""
    ours, theirs = _shapes(target), _shapes(source)
    rows = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        mine, other = ours.get(name), theirs.get(name)
        if mine == other:
            rows.append(Row(name, mine, "copied", "", ""))
        elif other is None and fresh(name):
            rows.append(Row(name, mine, "re-initialised", NEW, ""))
        elif mine is None:
            category = _one_sided(name, source, target, ours, theirs)
            rows.append(Row(name, other, "unused", category, f"{name} {other} would be left behind"))
        elif other is None:
            category = _one_sided(name, source, target, ours, theirs)
            rows.append(Row(name, mine, "re-initialised", category, f"{name} {mine} has nothing to take"))
        else:
            what, category = _other_shape(name, source, target, ours, theirs)
            rows.append(Row(name, mine, what, category, f"{name} {mine} has {other} to take"))
    return rows


def _one_sided(name, source, target, ours, theirs):
    """The category of a tensor that one of the networks lacks."""
    if _is_about_labels(name, source, target):
        return "labels"
    blocks, tops = (
        [_blocks(ours), _blocks(theirs)],
        [max(_blocks(shapes), default=0) for shapes in (ours, theirs)],
    )
    block = re.match(r"(?:synthesis\.)?b(\d+)\.(\w+)", name)
    if block:
        number, layer = int(block[1]), block[2]
        at_the_end = layer in ("fromrgb", "torgb") and tops[0] != tops[1] and number in tops
        return "resolution" if at_the_end or not all(number in each for each in blocks) else None
    return "mapping" if re.fullmatch(r"mapping\.(fc\d+\.\w+|w_avg)", name) else None


def _other_shape(name, source, target, ours, theirs):
    """(what happens, category) of a tensor that both networks have, in different shapes."""
    mine, other = ours[name], theirs[name]
    if name == "mapping.fc0.weight" and source.c_dim != target.c_dim:
        width = _latent_width(target)
        if width is not None and width == _latent_width(source) and mine[0] == other[0]:
            return "rescaled", "labels"
    if _is_about_labels(name, source, target):
        return "re-initialised", "labels"
    if name.endswith(".const") and mine[:-2] == other[:-2]:
        return "resized", "resolution"
    sized = name.endswith((".const", ".noise_const")) and mine[-2:] != other[-2:]
    sized |= name == "b4.fc.weight" and ours["b4.conv.weight"] == theirs.get("b4.conv.weight")
    return "re-initialised", "resolution" if sized else "widths"


def _is_about_labels(name, source, target):
    """Whether a tensor differs because the networks know other numbers of classes."""
    if source.c_dim == target.c_dim:
        return False
    discriminator = _latent_width(target) is None
    return name.startswith(("mapping.", "b4.out.") if discriminator else "mapping.embed.")


def _latent_width(network):
    """Inputs of the mapping network that are latents: z_dim, or that of one block. None for a discriminator."""
    return getattr(network, "block_z_dim", getattr(network, "z_dim", None))


def _keep_latents(theirs, ours, width):
    """Fills the first layer's weight [O,I] for another number of label inputs: the `width` columns that read latents
    compute what they did, with no label (the runtime gain is 1 / sqrt(I)); the others start at zero."""
    ours.zero_()
    ours[:, :width] = theirs[:, :width] * math.sqrt(ours.shape[1] / theirs.shape[1])


def _resized(const, shape):
    """A constant [C,h,w] for pictures of other sides, its borders in place."""
    size = tuple(shape)
    return torch.nn.functional.interpolate(const[None], size, mode="bilinear", align_corners=True)[0]


def _tensors(network):
    return dict([*network.named_parameters(), *network.named_buffers()])


def _shapes(network):
    return {name: list(t.shape) for name, t in _tensors(network).items()}


def _blocks(shapes):
    """Resolutions that blocks of a network are named after."""
    found = [re.match(r"(?:synthesis\.)?b(\d+)\.", name) for name in shapes]
    return {int(block[1]) for block in found if block}


def _check(rows_by_net, allow):
    """CoverageError where something happens that `allow` does not cover."""
    wrong = [
        (f"{net}.{row.problem}", row.category)
        for net, rows in rows_by_net.items()
        for row in rows
        if row.category not in ("", NEW, *allow)
    ]
    if not wrong:
        return
    text = (
        f"{len(wrong)} tensors do not match, first: {'; '.join(problem for problem, _category in wrong[:3])}"
    )
    found = {category for _problem, category in wrong}
    if None in found:
        hopeless = [problem for problem, category in wrong if category is None]
        text += f"; no option allows {len(hopeless)} of them, such as {hopeless[0]}: another architecture or noise"
    else:
        needed = [category for category in CATEGORIES if category in found or category in allow]
        text += f"; to go on without them: --allow-partial={','.join(needed)}"
    raise CoverageError(text)


def coverage_table(rows_by_net):
    """Text of how many tensors and values of each network were copied, start anew, or are left behind, and which."""
    columns = {
        "copied": ["copied", "rescaled", "resized"],
        "re-initialised": ["re-initialised"],
        "unused": ["unused"],
    }
    lines = ["network   " + "".join(f"{title:>15}{'values':>12}" for title in columns)]
    groups = {}  # (names of tensors, what, category) -> networks
    for net, rows in rows_by_net.items():
        line = f"{net:<10}"
        for kinds in columns.values():
            shapes = [row.shape for row in rows if row.what in kinds]
            line += f"{len(shapes):>15,}{sum(map(math.prod, shapes)):>12,}"
        lines.append(line)
        for what, category in dict.fromkeys((row.what, row.category) for row in rows if row.what != "copied"):
            found = tuple(row.name for row in rows if (row.what, row.category) == (what, category))
            groups.setdefault((found, what, category), []).append(net)
    for (found, what, category), nets in groups.items():
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        lines.append(f"{', '.join(nets)} {what} ({category}): {', '.join(found[:3])}{more}")
    return "\n".join(lines)
