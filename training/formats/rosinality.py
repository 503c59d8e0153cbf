# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of rosinality's StyleGAN2 (.pt) as our networks.

Such a file holds state dicts 'g', 'd', 'g_ema' and, when it was converted from TensorFlow, 'latent_avg'. It says
nothing of how its networks are made: that is inferred from the tensors.
"""

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import BinaryIO

import torch

from torch_utils.ops import upfirdn2d
from training.formats import torch_file
from training.formats.building import fill, layout, named_tensors, translated
from training.formats.known_names import BrokenPickleError, UnsafePickleError
from training.networks import Discriminator, Generator

FILTER = [1, 3, 3, 1]
LARGEST_RESOLUTION = 4096
W_AVG_SAMPLES = 10000

log = logging.getLogger(__name__)

# Our tensors within a layer -> (theirs, change of layout).
LAYER = {
    "weight": ("conv.weight", lambda t: t[0]),
    "affine.weight": ("conv.modulation.weight", lambda t: t),
    "affine.bias": ("conv.modulation.bias", lambda t: t),
    "noise_strength": ("noise.weight", lambda t: t.reshape([])),
    "bias": ("activate.bias", lambda t: t),
}
TO_RGB = {**LAYER, "bias": ("bias", lambda t: t[0, :, 0, 0])}
# Our layers of a discriminator's block -> (theirs in front of '.weight', in front of '.bias').
BLOCK = {"conv0": ("conv1.0", "conv1.1"), "conv1": ("conv2.1", "conv2.2"), "skip": ("skip.1", None)}
EPILOGUE = {
    "conv": ("final_conv.0", "final_conv.1"),
    "fc": ("final_linear.0", "final_linear.0"),
    "out": ("final_linear.1", "final_linear.1"),
}


def read_checkpoint(file: str | BinaryIO) -> dict:
    """The contents of a .pt file (a path or an open binary file) of tensors and plain values, on the CPU; runs nothing
    that the file says. ValueError where it holds anything else, or is no such file; OSError where it cannot be read."""
    name = getattr(file, "name", file)
    with contextlib.ExitStack() as stack:
        if not hasattr(file, "read"):
            file = stack.enter_context(open(file, "rb"))
        try:
            checkpoint = torch_file.load(file)
        except (UnsafePickleError, BrokenPickleError) as err:
            reason = f"it holds {err}, which is not opened" if isinstance(err, UnsafePickleError) else err
            raise ValueError(f"{name} is not a checkpoint of tensors and plain values: {reason}") from err
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{name} holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint


def recognises(obj: object) -> bool:
    """Whether a loaded object has the form of such a checkpoint: state dicts of its generator by 'g_ema' or 'g'."""
    nets = [obj.get(key) for key in ["g_ema", "g"]] if isinstance(obj, Mapping) else []
    return any(isinstance(net, Mapping) and "input.input" in net for net in nets)


def _note(line):
    log.warning("Note: %s", line)


def convert(
    checkpoint: Mapping, say: Callable[[str], None] = _note, only: Collection[str] | None = None
) -> dict:
    """The networks of a checkpoint as dict(G=, D=, G_ema=), in eval mode and without gradients.

    only: the networks that are wanted, None for all of them. What the file lacks is replaced, and say(line) says so: G
    by g_ema (or the reverse), D by an untrained one of the generator's widths, the stored noise by fixed random noise,
    w_avg by a mean over 10,000 latents. ValueError, in one line, for a file of another architecture, and for a tensor
    that is missing, of another shape, or without a place.
    """
    states = {key: checkpoint[key] for key in ["g", "d", "g_ema"] if isinstance(checkpoint.get(key), Mapping)}
    if "g_ema" not in states and "g" not in states:
        raise ValueError("no generator: neither g_ema nor g is there")
    for key, state in states.items():
        _check_architecture(key, state, checkpoint.get("args"))
    said = set()

    def say_once(line):
        if line not in said:
            said.add(line)
            say(line)

    result = {}
    for name, key, other in [("G", "g", "g_ema"), ("D", "d", None), ("G_ema", "g_ema", "g")]:
        if only is not None and name not in only:
            continue
        if name != "D":
            if key not in states:
                say(f"{key} is not in the file: it starts as {other}")
                key = other
            result[name] = _generator(states[key], key, checkpoint.get("latent_avg"), say_once)
        elif key in states:
            result[name] = _discriminator(states[key])
        else:
            say("d is not in the file: the discriminator is new and untrained")
            key = "g_ema" if "g_ema" in states else "g"
            result[name] = _untrained_discriminator(_generator_kwargs(states[key], key))
    return {name: net.eval().requires_grad_(False) for name, net in result.items()}


def _check_architecture(key, state, args):
    """ValueError for what these networks are not: wavelets, other filters."""
    if not all(isinstance(name, str) for name in state):
        raise ValueError(f"{key} is not a dict of tensors by name")
    wavelets = any(re.search(r"(^|\.)(iwt|dwt|from_rgbs)\.", name) for name in state)
    if wavelets or getattr(args, "arch", "stylegan2") == "swagan":
        raise ValueError(
            f"{key} is a SWAGAN (--arch=swagan), which has no counterpart here: its pictures are wavelets"
        )
    expected = upfirdn2d.setup_filter(FILTER)
    for name, kernel in state.items():
        if name.endswith(".kernel"):
            fits = isinstance(kernel, torch.Tensor) and kernel.shape == expected.shape
            if not fits or not torch.allclose(kernel.float() / kernel.float().sum(), expected, atol=1e-5):
                raise ValueError(f"{key}: {name[:80]} is not the filter {FILTER}")


def _generator_kwargs(state, key):
    """The constructor's arguments of a generator, from the shapes in its state dict."""
    num_convs = _count(state, "convs.{}.conv.weight", 0)
    resolution = _resolution(key, num_convs, 2)
    channels = {4: _size(state, key, "input.input", 1)}
    for k in range(num_convs // 2):
        channels[8 << k] = _size(state, key, f"convs.{2 * k + 1}.conv.weight", 1)
    w_dim = _size(state, key, "style.1.weight", 1)
    return dict(
        z_dim=w_dim, c_dim=0, w_dim=w_dim, img_resolution=resolution,
        img_channels=_size(state, key, "to_rgb1.conv.weight", 1),
        mapping_kwargs=dict(num_layers=_count(state, "style.{}.weight", 1)),
        synthesis_kwargs=dict(_widths(key, channels), architecture="skip"),
    )  # fmt: skip


def _generator(state, key, latent_avg, say):
    """A generator from its state dict."""
    kwargs = _generator_kwargs(state, key)
    network = layout(Generator, kwargs, len(state))
    theirs = dict(state)
    if not any(name.startswith("noises.") for name in theirs):
        say(f"{key}: the file has no noise of its own; constant noise is random, from a fixed seed")
        theirs.update(_fixed_noise(network.synthesis.block_resolutions))
    theirs["latent_avg"] = torch.zeros(network.w_dim) if latent_avg is None else latent_avg
    _fill(network, theirs, _generator_counterpart, key)
    if latent_avg is None:
        say(f"{key}: the file has no latent_avg; w_avg is the mean of w over {W_AVG_SAMPLES} latents")
        network.mapping.w_avg.copy_(_mean_w(network))
    return network


def _generator_counterpart(name):
    """(their name, change of layout) of one of our tensors; blocks b8, b16... hold convs 0 and 1, 2 and 3..."""
    if name == "mapping.w_avg":
        return "latent_avg", lambda t: t.reshape(-1)
    if name == "synthesis.b4.const":
        return "input.input", lambda t: t[0]
    mapping = re.fullmatch(r"mapping\.fc(\d+)\.(\w+)", name)
    if mapping:  # their style.0 is the normalisation
        return f"style.{int(mapping[1]) + 1}.{mapping[2]}", lambda t: t
    resolution, layer, leaf = re.fullmatch(r"synthesis\.b(\d+)\.(\w+)\.(.+)", name).groups()
    k = int(resolution).bit_length() - 4  # -1 for b4
    if layer == "torgb":
        theirs, change = TO_RGB[leaf]
        return f"to_rgbs.{k}.{theirs}" if k >= 0 else f"to_rgb1.{theirs}", change
    number = 2 * k + int(layer == "conv1")  # -1 for b4.conv1
    if leaf == "noise_const":
        return f"noises.noise_{number + 1}", lambda t: t[0, 0]
    theirs, change = LAYER[leaf]
    return f"convs.{number}.{theirs}" if number >= 0 else f"conv1.{theirs}", change


def _discriminator(state):
    """A discriminator from its state dict."""
    num_blocks = _count(state, "convs.{}.conv1.0.weight", 1)
    resolution = _resolution("d", num_blocks, 1)
    channels = {resolution: _size(state, "d", "convs.0.0.weight", 0)}
    for i in range(1, num_blocks + 1):
        channels[resolution >> i] = _size(state, "d", f"convs.{i}.conv2.1.weight", 0)
    kwargs = _discriminator_kwargs(
        resolution, _size(state, "d", "convs.0.0.weight", 1), _widths("d", channels)
    )
    network = layout(Discriminator, kwargs, len(state))
    _fill(network, dict(state), functools.partial(_discriminator_counterpart, resolution=resolution), "d")
    return network


def _discriminator_kwargs(resolution, img_channels, widths):
    return dict(
        c_dim=0, img_resolution=resolution, img_channels=img_channels, architecture="resnet", **widths,
        epilogue_kwargs=dict(mbstd_group_size=4),
    )  # fmt: skip


def _discriminator_counterpart(name, resolution):
    """(their name, change of layout) of one of our tensors; convs 1, 2... are the blocks from the top down."""
    block, layer, leaf = re.fullmatch(r"b(\d+)\.(\w+)\.(\w+)", name).groups()
    if layer == "fromrgb":
        layers = ("convs.0.0", "convs.0.1")
    elif block == "4":
        layers = EPILOGUE[layer]
    else:
        i = resolution.bit_length() - int(block).bit_length() + 1
        layers = [f"convs.{i}.{part}" for part in BLOCK[layer]]
    return f"{layers[leaf == 'bias']}.{leaf}", lambda t: t


def _untrained_discriminator(G_kwargs):
    """A new discriminator of the widths of a generator; always the same one."""
    widths = {k: G_kwargs["synthesis_kwargs"][k] for k in ["channel_base", "channel_max"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Discriminator(
            **_discriminator_kwargs(G_kwargs["img_resolution"], G_kwargs["img_channels"], widths)
        )


def _fill(network, theirs, counterpart, key):
    """Gives the network all tensors of the file; ValueError where one is left over."""
    fill(network, translated(network, theirs, counterpart, f"{key}:"))
    used = {counterpart(name)[0] for name in named_tensors(network) if not name.endswith("resample_filter")}
    unused = [name for name in theirs if name not in used and not name.endswith(".kernel")]
    if unused:
        raise ValueError(
            f"{key}: a StyleGAN2 has no place for {len(unused)} tensors, first {unused[0]!r:.80}"
        )


def _mean_w(G):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn([1000, G.z_dim], generator=generator) for _ in range(W_AVG_SAMPLES // 1000)]
    with torch.no_grad():
        return torch.stack(
            [G.mapping(z, None, skip_w_avg_update=True)[:, 0].mean(dim=0) for z in batches]
        ).mean(dim=0)


def _fixed_noise(resolutions):
    generator = torch.Generator().manual_seed(0)
    sides = [side for side in resolutions for _layer in range(2)][1:]  # one layer at 4x4, then two at each
    return {
        f"noises.noise_{i}": torch.randn([1, 1, side, side], generator=generator)
        for i, side in enumerate(sides)
    }


def _count(state, pattern, first):
    """How many names there are in the sequence pattern.format(first), first + 1, ..."""
    number = first
    while pattern.format(number) in state:
        number += 1
    return number - first


def _size(state, key, name, dim):
    """One side of a tensor of the file."""
    tensor = state.get(name)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim <= dim:
        raise ValueError(f"{key}: {name} is missing or not a tensor of {dim + 1} or more dimensions")
    return tensor.shape[dim]


def _resolution(key, num_layers, layers_per_block):
    """Pixels a side of pictures that so many layers lead to (or from)."""
    blocks = num_layers // layers_per_block
    if num_layers == 0 or num_layers % layers_per_block or 4 << blocks > LARGEST_RESOLUTION:
        raise ValueError(
            f"{key}: {num_layers} convolutions are not those of pictures of 8 to {LARGEST_RESOLUTION} pixels a side"
        )
    return 4 << blocks


def _widths(key, channels):
    """channel_base and channel_max that give min(channel_base // resolution, channel_max) for all resolutions."""
    most = max(channels.values())
    low, high = 1, float("inf")
    for resolution, count in sorted(channels.items()):
        low = max(low, count * resolution)
        if count < most:
            high = min(high, count * resolution + resolution - 1)
        if low > high:
            raise ValueError(
                f"{key}: {count} channels at {resolution}x{resolution} do not fit: no channel_base and channel_max give"
                f" {', '.join(f'{c} at {r}' for r, c in sorted(channels.items()))}"
            )
    return dict(channel_base=low, channel_max=most)
