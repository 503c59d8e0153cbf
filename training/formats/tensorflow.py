# SPDX-License-Identifier: Apache-2.0
"""Networks of TensorFlow StyleGAN2 and StyleGAN2-ADA pickles as ours.

Such a pickle holds three networks (G, D, Gs): objects with `version`, `static_kwargs`, `variables`, a list of
(name, array), and `components`, further such objects by name, whose variables count as '<component>/<variable>'.
"""

import re
from collections.abc import Collection, Mapping

import numpy as np

from torch_utils.ops import bias_act
from training.formats.building import fill, layout, shown, translated
from training.networks import ARCHITECTURES, Discriminator, Generator

OLDEST_VERSION = 4
MOST_PARTS = 100
MOST_VARIABLES = 10000
LONGEST_NAME = 500  # of a variable, with those of the parts that it is in

# Our argument -> (TensorFlow's, its default). A dot leads into the arguments of a part.
GENERATOR_KWARGS = {
    "z_dim": ("latent_size", 512),
    "c_dim": ("label_size", 0),
    "w_dim": ("dlatent_size", 512),
    "img_resolution": ("resolution", 1024),
    "img_channels": ("num_channels", 3),
    "mapping_kwargs.num_layers": ("mapping_layers", 8),
    "mapping_kwargs.embed_features": ("label_fmaps", None),
    "mapping_kwargs.layer_features": ("mapping_fmaps", None),
    "mapping_kwargs.activation": ("mapping_nonlinearity", "lrelu"),
    "mapping_kwargs.lr_multiplier": ("mapping_lrmul", 0.01),
    "mapping_kwargs.w_avg_beta": ("w_avg_beta", 0.995),
    "synthesis_kwargs.channel_base": ("fmap_base", 16384),
    "synthesis_kwargs.channel_max": ("fmap_max", 512),
    "synthesis_kwargs.num_fp16_res": ("num_fp16_res", 0),
    "synthesis_kwargs.conv_clamp": ("conv_clamp", None),
    "synthesis_kwargs.architecture": ("architecture", "skip"),
    "synthesis_kwargs.resample_filter": ("resample_kernel", (1, 3, 3, 1)),
    "synthesis_kwargs.use_noise": ("use_noise", True),
    "synthesis_kwargs.activation": ("nonlinearity", "lrelu"),
}
DISCRIMINATOR_KWARGS = {
    "c_dim": ("label_size", 0),
    "img_resolution": ("resolution", 1024),
    "img_channels": ("num_channels", 3),
    "architecture": ("architecture", "resnet"),
    "channel_base": ("fmap_base", 16384),
    "channel_max": ("fmap_max", 512),
    "num_fp16_res": ("num_fp16_res", 0),
    "conv_clamp": ("conv_clamp", None),
    "cmap_dim": ("mapping_fmaps", None),
    "block_kwargs.activation": ("nonlinearity", "lrelu"),
    "block_kwargs.resample_filter": ("resample_kernel", (1, 3, 3, 1)),
    "block_kwargs.freeze_layers": ("freeze_layers", 0),
    "mapping_kwargs.num_layers": ("mapping_layers", 0),
    "mapping_kwargs.embed_features": ("mapping_fmaps", None),
    "mapping_kwargs.layer_features": ("mapping_fmaps", None),
    "mapping_kwargs.activation": ("nonlinearity", "lrelu"),
    "mapping_kwargs.lr_multiplier": ("mapping_lrmul", 0.1),
    "epilogue_kwargs.mbstd_group_size": ("mbstd_group_size", None),
    "epilogue_kwargs.mbstd_num_channels": ("mbstd_num_features", 1),
    "epilogue_kwargs.activation": ("nonlinearity", "lrelu"),
}
# Say how a network is run or trained there, not what it is.
WITHOUT_MEANING = {
    "truncation_psi", "truncation_cutoff", "style_mixing_prob", "structure", "conditioning", "fused_modconv",
}  # fmt: skip
CHOICES = {
    "architecture": ARCHITECTURES,
    "nonlinearity": tuple(bias_act.activation_funcs),
    "mapping_nonlinearity": tuple(bias_act.activation_funcs),
}

# Changes of layout. TensorFlow's kernels are [height, width, in, out], its matrices [in, out].
LAYOUTS = {
    "same": lambda t: t,
    "plus one": lambda t: t + 1,  # biases of styles: ours include the 1 that they are around
    "matrix": lambda t: t.t(),
    "kernel": lambda t: t.permute(3, 2, 0, 1),
    "turned kernel": lambda t: t.flip([0, 1]).permute(
        3, 2, 0, 1
    ),  # up-sampling layers keep theirs turned around
    "first": lambda t: t[0],
    "noise": lambda t: t[0, 0],
}
# Our tensor -> (TensorFlow's, layout).
GENERATOR_TENSORS = {
    "mapping.w_avg": ("dlatent_avg", "same"),
    "synthesis.b4.const": ("synthesis/4x4/Const/const", "first"),
}
# Our layer (a pattern) -> (TensorFlow's, the layout of its weight).
GENERATOR_LAYERS = {
    r"mapping\.embed": ("mapping/LabelEmbed", "matrix"),
    r"mapping\.fc(\d+)": (r"mapping/Dense\1", "matrix"),
    r"synthesis\.b4\.conv1": ("synthesis/4x4/Conv", "kernel"),
    r"synthesis\.b(\d+)\.conv0": (r"synthesis/\1x\1/Conv0_up", "turned kernel"),
    r"synthesis\.b(\d+)\.conv1": (r"synthesis/\1x\1/Conv1", "kernel"),
    r"synthesis\.b(\d+)\.torgb": (r"synthesis/\1x\1/ToRGB", "kernel"),
    r"synthesis\.b(\d+)\.skip": (r"synthesis/\1x\1/Skip", "turned kernel"),
}
DISCRIMINATOR_LAYERS = {
    r"mapping\.embed": ("LabelEmbed", "matrix"),
    r"mapping\.fc(\d+)": (r"Mapping\1", "matrix"),
    r"b(\d+)\.fromrgb": (r"\1x\1/FromRGB", "kernel"),
    r"b(\d+)\.conv0": (r"\1x\1/Conv0", "kernel"),
    r"b(\d+)\.conv1": (r"\1x\1/Conv1_down", "kernel"),
    r"b(\d+)\.skip": (r"\1x\1/Skip", "kernel"),
    r"b4\.conv": ("4x4/Conv", "kernel"),
    r"b4\.fc": ("4x4/Dense0", "matrix"),
    r"b4\.out": ("Output", "matrix"),
}
# Tensors of a layer other than its weight: (TensorFlow's name, layout).
LEAVES = {
    "bias": ("bias", "same"),
    "noise_strength": ("noise_strength", "same"),
    "affine.weight": ("mod_weight", "matrix"),
    "affine.bias": ("mod_bias", "plus one"),
}


def recognises(obj: object) -> bool:
    """Whether an unpickled object has the form of a TensorFlow pickle: three networks in a tuple."""
    parts = ("version", "static_kwargs", "variables", "components")
    return (
        isinstance(obj, tuple) and len(obj) == 3 and all(hasattr(net, part) for net in obj for part in parts)
    )


def convert(G, D, Gs, only: Collection[str] | None = None) -> dict:
    """The networks of a TensorFlow pickle as dict(G=, D=, G_ema=), in eval mode and without gradients.

    only: the networks that are wanted, None for all of them.
    G, D, Gs: objects with `version`, `static_kwargs`, `variables` and `components` (see the head of this module).
    ValueError, in one line, for versions and arguments that are not known, and for a variable that is missing or of a
    shape that the arguments do not imply.
    """
    for net in [G, D, Gs]:
        version = getattr(net, "version", None)
        if not isinstance(version, int) or version < OLDEST_VERSION:
            raise ValueError("TensorFlow pickle version too low")
    readers = dict(
        G=lambda: _generator(G, "G"), D=lambda: _discriminator(D), G_ema=lambda: _generator(Gs, "Gs")
    )
    return {name: read() for name, read in readers.items() if only is None or name in only}


def _generator(net, name):
    variables = _variables(net, name)
    kwargs = _kwargs(net, GENERATOR_KWARGS)
    if kwargs["mapping_kwargs"]["w_avg_beta"] is None:  # there: no update; here: no w_avg at all
        kwargs["mapping_kwargs"]["w_avg_beta"] = 1
    top = kwargs["img_resolution"]
    if _alias(variables, r"synthesis/ToRGB_lod(\d{1,2})/(\w+)", "synthesis/{0}x{0}/ToRGB/{1}", top):
        kwargs["synthesis_kwargs"]["architecture"] = "orig"
    return _build(Generator, kwargs, variables, GENERATOR_LAYERS, name)


def _discriminator(net):
    variables = _variables(net, "D")
    kwargs = _kwargs(net, DISCRIMINATOR_KWARGS)
    if _alias(variables, r"FromRGB_lod(\d{1,2})/(\w+)", "{0}x{0}/FromRGB/{1}", kwargs["img_resolution"]):
        kwargs["architecture"] = "orig"
    return _build(Discriminator, kwargs, variables, DISCRIMINATOR_LAYERS, "D")


def _variables(net, owner):
    """Name -> array of all variables, those of components with the component's name in front."""
    found = {}
    waiting = [("", net)]
    for prefix, part in waiting:
        if not _well_formed(part):
            raise ValueError(f"TensorFlow network {owner}: {prefix[:80] or 'it'} is not of the known form")
        found.update({prefix + name: value for name, value in part.variables})
        if len(prefix) > LONGEST_NAME or len(found) > MOST_VARIABLES:
            raise ValueError(f"TensorFlow network {owner} has more variables, or longer names, than any")
        waiting += [(f"{prefix}{name}/", component) for name, component in part.components.items()]
        if len(waiting) > MOST_PARTS:  # parts may contain each other
            raise ValueError(f"TensorFlow network {owner} has more than {MOST_PARTS} parts")
    return found


def _well_formed(part):
    variables = getattr(part, "variables", None)
    return (
        isinstance(variables, list)
        and len(variables) <= MOST_VARIABLES
        and all(isinstance(v, (tuple, list)) and len(v) == 2 and _is_name(v[0]) for v in variables)
        and isinstance(getattr(part, "components", None), Mapping)
        and all(map(_is_name, part.components))
        and isinstance(getattr(part, "static_kwargs", None), Mapping)
    )


def _is_name(value):
    return isinstance(value, str) and len(value) <= LONGEST_NAME


def _kwargs(net, table):
    """Our constructor's arguments from TensorFlow's."""
    theirs = dict(net.static_kwargs)
    known = WITHOUT_MEANING | {name for name, _default in table.values()}
    for name in theirs:
        if name not in known:
            raise ValueError(f"Unknown TensorFlow kwarg: {shown(name)}")
    result = {}
    for path, (name, default) in table.items():
        value = theirs.get(name, default)
        if name == "resolution":
            value = _whole_number(name, value)
        if name == "fmap_base":  # divided by resolution / 2 there, by resolution here
            value = _whole_number(name, value) * 2
        accepted = CHOICES.get(name)
        if accepted is not None and not (isinstance(value, str) and value in accepted):
            raise ValueError(f"TensorFlow kwarg {name} is {shown(value)}, accepted: {', '.join(accepted)}")
        if isinstance(value, (np.ndarray, tuple)):
            value = list(value) if isinstance(value, tuple) or value.ndim != 1 else value.tolist()
        *parts, leaf = path.split(".")
        (result.setdefault(parts[0], {}) if parts else result)[leaf] = value
    return result


def _whole_number(name, value):
    whole = isinstance(value, (int, np.integer)) or isinstance(value, (float, np.floating)) and value % 1 == 0
    if not whole:  # infinity and NaN are not, either
        raise ValueError(f"TensorFlow kwarg {name} is {shown(value)}, not a whole number")
    return int(value)


def _alias(variables, pattern, target, resolution):
    """Adds variables named by level of detail under the names by resolution; whether there are any."""
    found = {name: match for name in variables if (match := re.fullmatch(pattern, name))}
    for name, match in found.items():
        variables.setdefault(target.format(resolution >> int(match[1]), match[2]), variables[name])
    return bool(found)


def _build(cls, kwargs, variables, layers, owner):
    """The network, each of its tensors from the variable that stands for it; further variables have no use here."""
    network = layout(cls, kwargs, len(variables))
    tensors = translated(
        network, variables, lambda name: _counterpart(name, layers), f"TensorFlow network {owner}: variable"
    )
    return fill(network, tensors).eval().requires_grad_(False)


def _counterpart(name, layers):
    """(TensorFlow's name, change of layout) of one of our tensors."""
    if name in GENERATOR_TENSORS:
        theirs, change = GENERATOR_TENSORS[name]
        return theirs, LAYOUTS[change]
    noise = re.fullmatch(r"synthesis\.b(\d+)\.conv([01])\.noise_const", name)
    if noise:  # numbered from the first layer, b4.conv1, on
        level = int(noise[1]).bit_length() - 1
        return f"synthesis/noise{2 * level - 5 + int(noise[2])}", LAYOUTS["noise"]
    for pattern, (layer, weight_layout) in layers.items():
        match = re.fullmatch(rf"{pattern}\.(?P<leaf>.+)", name)
        if match:
            leaf, change = {**LEAVES, "weight": ("weight", weight_layout)}[match["leaf"]]
            return f"{match.expand(layer)}/{leaf}", LAYOUTS[change]
    raise AssertionError(f"no TensorFlow variable stands for {name}")
