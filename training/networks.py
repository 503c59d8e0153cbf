# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2: the style-modulated generator and its discriminator.

Persistent classes: the source of this module travels inside every pickle, so it imports only names that
NVIDIA's checkouts have too, reads under Python 3.7 and holds plain Python state.

Weights are stored with unit variance (divided by the layer's learning-rate multiplier) and scaled at run time
by `weight_gain`, so that one learning rate suits all layers.

A picture of H x W pixels is h0 x w0 doubled n times. Blocks are named after the resolution r = 4, 8, ..., 4 * 2^n
that they have in the family's square networks (h0 = w0 = 4), and have its widths; their pictures are h0 * r/4 x
w0 * r/4. Shapes: N samples, C/I/O channels, H, W height and width of a layer's or block's picture.
"""

# The mutable defaults below are part of the public signatures and are never written to.
# ruff: noqa: B006

import math

import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

try:
    from torch_utils.ops import own_kernels, tap_energy
except ImportError:
    own_kernels = tap_energy = None

ARCHITECTURES = ("orig", "skip", "resnet")
HOMOGENEOUS = ("linear", "relu", "lrelu")  # act(g x) = g act(x) for g > 0
HALF_DEVICES = {"float16": ["cuda"], "bfloat16": ["cuda", "cpu"]}  # on others float32 stays
SMALLEST, LARGEST = 4, 32  # sides of h0 x w0
CPU_LAST = 2  # pixels a channel from which on channels-last pays on a CPU
HALF_POWER = math.sqrt(0.5)  # two branches of equal variance, so scaled, add up to that variance again

# ----------------------------------------------------------------------------
# Functions.


def normalize_2nd_moment(x, dim=1, eps=1e-8):
    """Scales x so that the mean of its squares along `dim` is one: x / sqrt(mean(x^2) + eps)."""
    return x * torch.rsqrt(torch.mean(x * x, dim=dim, keepdim=True) + eps)


def modulated_conv2d(
    x, weight, styles, noise=None, up=1, down=1, padding=0, resample_filter=None,
    demodulate=True, flip_weight=True, fused_modconv=True,
):  # fmt: skip
    """Convolves every sample with its own kernel w[n,o,i] = weight[o,i] * styles[n,i].

    With `demodulate` each kernel is divided by its norm sqrt(sum_i,kh,kw w^2 + 1e-8). x [N,I,H,W], weight
    [O,I,kh,kw], styles [N,I]; noise, broadcastable to the result, is added. Returns [N,O,H',W'] of x's dtype.

    `fused_modconv` chooses between two ways to the same numbers: one grouped convolution with N sets of
    kernels, or one shared convolution between a scaling of its input and a scaling of its output. Only the
    latter may run where gradients of weights are suppressed: its convolution's weights do not depend on the
    styles.
    """
    num, in_channels = styles.shape
    misc.assert_shape(weight, [None, in_channels, None, None])
    misc.assert_shape(x, [num, in_channels, None, None])
    if demodulate and x.dtype == torch.float16:
        weight, styles = _rescale_for_half(weight, styles)
    scale = _demodulation(weight, styles) if demodulate else None  # [N,O]
    noise = None if noise is None else noise.to(x.dtype)
    if weight[0, 0].numel() == up == down == 1 and padding == 0:
        return _multiply_pixels(x, weight, styles, scale, noise)
    resampling = dict(f=resample_filter, up=up, down=down, padding=padding, flip_weight=flip_weight)
    if fused_modconv:
        return _conv_own_kernels(x, weight, styles, scale, noise, resampling)
    return _conv_shared_kernel(x, weight, styles, scale, noise, resampling)


def _rescale_for_half(weight, styles):
    """Factors that demodulation cancels again, chosen so that float16 does not overflow in between."""
    fan_in = weight[0].numel()
    peak = weight.abs().flatten(1).max(dim=1)[0] * math.sqrt(fan_in)  # [O]
    return weight / peak.reshape(-1, 1, 1, 1), styles / styles.abs().max(dim=1, keepdim=True)[0]


def _demodulation(weight, styles):
    """1 / sqrt(sum_i styles[n,i]^2 * (sum_kh,kw weight[o,i]^2) + 1e-8) -> [N,O]; no kernel per sample."""
    if tap_energy is not None:
        energy = tap_energy.energy_through(weight, styles * styles)
    else:
        energy = torch.matmul(styles * styles, (weight * weight).sum(dim=[2, 3]).t())
    return torch.rsqrt(energy + 1e-8)


def _multiply_pixels(x, weight, styles, scale, noise):
    """A 1x1 kernel per sample is a matrix: x is read once, and no scaled copy of it is kept."""
    matrix = weight.flatten(1) * styles[:, None, :]  # [N,O,I]
    if scale is not None:
        matrix = matrix * scale[:, :, None]
    pixels = torch.bmm(matrix.to(x.dtype), x.flatten(2))  # [N,O,H*W]
    x = pixels.reshape(*pixels.shape[:2], *x.shape[2:])
    return x if noise is None else x + noise


def _conv_own_kernels(x, weight, styles, scale, noise, resampling):
    """One kernel per sample: samples become groups of channels (a single sample needs none)."""
    num, out_channels = x.shape[0], weight.shape[0]
    kernels = weight * styles[:, None, :, None, None]  # [N,O,I,kh,kw]
    if scale is not None:
        kernels = kernels * scale[:, :, None, None, None]
    kernels = kernels.flatten(0, 1).to(x.dtype).contiguous()  # [N*O,I,kh,kw]
    x = x.reshape(1, -1, *x.shape[2:])
    x = conv2d_resample.conv2d_resample(x=x, w=kernels, groups=num, **resampling)
    x = x.reshape(num, out_channels, *x.shape[2:])
    return x if noise is None else x + noise


def _conv_shared_kernel(x, weight, styles, scale, noise, resampling):
    """One kernel for all: styles scale the input's channels, demodulation scales the output's."""
    x = x * styles.to(x.dtype)[:, :, None, None]
    x = conv2d_resample.conv2d_resample(x=x, w=weight.to(x.dtype), **resampling)
    if scale is None:
        return x if noise is None else x + noise
    scale = scale.to(x.dtype)[:, :, None, None]
    return x * scale if noise is None else fma.fma(x, scale, noise)


def _compute_format(device, use_fp16, channels_last, half_dtype, shape, channels):
    """dtype and memory format in which a block of pictures of `shape` and so many channels computes.

    On a CPU filters, and convolutions of many pixels and few channels, are up to twice as fast in channels-last,
    the others up to twice as fast without."""
    half = use_fp16 and device.type in HALF_DEVICES[half_dtype]
    if device.type == "cpu":
        last = half or shape[0] * shape[1] >= CPU_LAST * channels
    else:
        last = half and channels_last
    dtype = getattr(torch, half_dtype) if half else torch.float32
    return dtype, torch.channels_last if last else torch.contiguous_format


def _random_kernel(out_channels, in_channels, kernel_size, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn([out_channels, in_channels, kernel_size, kernel_size]).to(memory_format=layout)


def _default_gain(activation):
    return float(bias_act.activation_funcs[activation].def_gain)  # plain: NumPy scalars must not be pickled


def split_shape(height, width):
    """(h0, w0, n): height = h0 * 2^n, width = w0 * 2^n, n as large as it can be with h0, w0 >= 4."""
    n = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 2 * SMALLEST:
        height, width, n = height // 2, width // 2, n + 1
    assert SMALLEST <= min(height, width) and max(height, width) <= LARGEST, (
        "pictures must be h0 x w0 doubled n times, with h0 and w0 from %d to %d" % (SMALLEST, LARGEST)
    )
    return height, width, n


def _picture_shape(img_resolution, img_shape):
    """[H,W]: img_shape, whose longer side img_resolution must be, or the square of that side."""
    shape = [img_resolution] * 2 if img_shape is None else [int(side) for side in img_shape]
    assert max(shape) == img_resolution, "img_resolution must be the longer side of img_shape"
    return shape


def _block_shapes(img_shape):
    """{r: dict(shape=[h0 * r/4, w0 * r/4])} of the blocks r = 4, 8, ...; {r: {}} where the shape is [r,r]."""
    h0, w0, n = split_shape(*img_shape)
    resolutions = [4 * 2**i for i in range(n + 1)]
    if h0 == w0 == 4:
        return {r: {} for r in resolutions}
    return {r: dict(shape=[h0 * r // 4, w0 * r // 4]) for r in resolutions}


def _channels(resolution, channel_base, channel_max):
    return min(channel_base // resolution, channel_max)


def _first_fp16_resolution(resolution_log2, num_fp16_res):
    return max(2 ** (resolution_log2 + 1 - num_fp16_res), 8)


# ----------------------------------------------------------------------------
# Layers.


@persistence.persistent_class
class FullyConnectedLayer(torch.nn.Module):
    """y = activation(x @ (weight * weight_gain)^T + bias * bias_gain), times the activation's gain.

    x [N,in_features] -> [N,out_features]. `lr_multiplier` scales weight and bias at run time, which
    multiplies their effective learning rate; `bias_init` is the stored bias.
    """

    def __init__(
        self, in_features, out_features, bias=True, activation="linear", lr_multiplier=1, bias_init=0
    ):
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) / lr_multiplier)
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain, self.bias_gain = lr_multiplier / math.sqrt(in_features), lr_multiplier

    def forward(self, x):
        """x [N,in_features] -> [N,out_features], in x's dtype."""
        matrix, gain = self.weight.to(x.dtype).t(), self.weight_gain
        if x.dtype == torch.float32:  # on x it costs less than on the matrix, or on the matrix's gradient
            x, gain = x * gain, 1
        if self.bias is None:
            x = torch.matmul(x, matrix) if gain == 1 else torch.matmul(x, matrix) * gain
        else:
            x = torch.addmm(self.bias.to(x.dtype), x, matrix, beta=self.bias_gain, alpha=gain)
        return x if self.activation == "linear" else bias_act.bias_act(x, act=self.activation)


@persistence.persistent_class
class Conv2dLayer(torch.nn.Module):
    """Convolution, optionally up- or down-sampling, with bias, activation and clamp.

    x [N,I,H,W] -> [N,O,H*up/down,W*up/down]. With `trainable=False` weight and bias are buffers of the same
    names. `conv_clamp` bounds the result's magnitude (None: unbounded); `channels_last` is the weight's
    format.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, bias=True, activation="linear", up=1, down=1,
        resample_filter=[1, 3, 3, 1], conv_clamp=None, channels_last=False, trainable=True,
    ):  # fmt: skip
        super().__init__()
        self.up, self.down, self.padding = up, down, kernel_size // 2
        self.activation, self.conv_clamp = activation, conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = _default_gain(activation)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self._add("weight", _random_kernel(out_channels, in_channels, kernel_size, channels_last), trainable)
        self._add("bias", torch.zeros([out_channels]) if bias else None, trainable)

    def _add(self, name, tensor, trainable):
        if tensor is not None and trainable:
            setattr(self, name, torch.nn.Parameter(tensor))
        elif tensor is not None:
            self.register_buffer(name, tensor)
        else:
            setattr(self, name, None)

    def forward(self, x, gain=1):
        """x [N,I,H,W] -> [N,O,H',W']; `gain` multiplies the result and its clamp."""
        act_gain = self.act_gain * gain
        affine = self.activation == "linear" and self.bias is None and self.conv_clamp is None
        late = not affine and self.activation in HOMOGENEOUS and x.dtype == torch.float32
        weight = self.weight
        if not late:
            weight = weight * (self.weight_gain * act_gain if affine else self.weight_gain)
        x = conv2d_resample.conv2d_resample(
            x=x, w=weight.to(x.dtype), f=self.resample_filter, up=self.up, down=self.down,
            padding=self.padding, flip_weight=self.up == 1,
        )  # fmt: skip
        if affine:  # nothing left to do to the result: the gain is in the weight
            return x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        if late:  # act(g x + b) = g act(x + b / g): no pass over the weights, nor over their gradient
            bias = None if bias is None else bias / self.weight_gain
            act_gain = act_gain * self.weight_gain
        return bias_act.bias_act(x, bias, act=self.activation, gain=act_gain, clamp=clamp)


# ----------------------------------------------------------------------------
# Generator.


@persistence.persistent_class
class MappingNetwork(torch.nn.Module):
    """Maps z [N,z_dim] and c [N,c_dim] to ws [N,num_ws,w_dim] ([N,w_dim] if num_ws is None).

    z and the embedded c are normalised and concatenated, then pass `num_layers` fully connected layers. In
    training mode `w_avg` tracks the mean of w; truncation pulls w towards it. z_dim = 0 or c_dim = 0 leaves
    that input out.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, num_ws, num_layers=8, embed_features=None, layer_features=None,
        activation="lrelu", lr_multiplier=0.01, w_avg_beta=0.995,
    ):  # fmt: skip
        super().__init__()
        self.num_layers, self.num_ws, self.w_avg_beta = num_layers, num_ws, w_avg_beta
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        embed_features = w_dim if embed_features is None else embed_features
        hidden = w_dim if layer_features is None else layer_features
        first = z_dim
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
            first += embed_features
        widths = [first] + [hidden] * (num_layers - 1) + [w_dim]
        for i in range(num_layers):
            layer = FullyConnectedLayer(widths[i], widths[i + 1], True, activation, lr_multiplier)
            setattr(self, "fc%d" % i, layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False):
        """z [N,z_dim] of any float type, c [N,c_dim] (ignored, may be None, if c_dim is 0) -> float32 ws.

        truncation_psi: 1 leaves w alone, 0 gives w_avg. truncation_cutoff: truncate only the first so many
        of the num_ws vectors.
        """
        inputs = []
        if self.z_dim > 0:
            misc.assert_shape(z, [None, self.z_dim])
            inputs.append(normalize_2nd_moment(z.to(torch.float32)))
        if self.c_dim > 0:
            misc.assert_shape(c, [None, self.c_dim])
            inputs.append(normalize_2nd_moment(self.embed(c.to(torch.float32))))
        w = torch.cat(inputs, dim=1)
        for i in range(self.num_layers):
            w = getattr(self, "fc%d" % i)(w)
        if self.training and self.w_avg_beta is not None and not skip_w_avg_update:
            self.w_avg.copy_(w.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        return self._broadcast(w, truncation_psi, truncation_cutoff)

    def _broadcast(self, w, psi, cutoff):
        """[N,w_dim] -> [N,num_ws,w_dim], a tensor of its own memory, its first `cutoff` vectors truncated."""
        near = w
        if psi != 1:
            assert self.w_avg_beta is not None, "truncation needs w_avg, and this network does not track it"
            near = self.w_avg.lerp(w, psi)
        if self.num_ws is None:
            return near
        truncated = len(range(self.num_ws)[:cutoff])
        copies = [near] * truncated + [w] * (self.num_ws - truncated)
        return torch.stack(copies, dim=1)


@persistence.persistent_class
class SynthesisLayer(torch.nn.Module):
    """Modulated 3x3 convolution with noise, bias and activation: x [N,I,H/up,W/up], w [N,w_dim] -> [N,O,H,W].

    [H,W] is `shape` (None: [resolution, resolution]). There is no weight_gain, since demodulation cancels
    any.
    """

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, kernel_size=3, up=1, use_noise=True,
        activation="lrelu", resample_filter=[1, 3, 3, 1], conv_clamp=None, channels_last=False, shape=None,
    ):  # fmt: skip
        super().__init__()
        self.resolution, self.up, self.padding = resolution, up, kernel_size // 2
        self.shape = [resolution] * 2 if shape is None else list(shape)
        self.use_noise, self.activation, self.conv_clamp = use_noise, activation, conv_clamp
        self.act_gain = _default_gain(activation)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(
            _random_kernel(out_channels, in_channels, kernel_size, channels_last)
        )
        if use_noise:
            self.register_buffer("noise_const", torch.randn(self.shape))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def _noise(self, x, mode):
        if mode == "none" or not self.use_noise:
            return None
        if mode == "const":
            return self.noise_const * self.noise_strength  # [H,W]
        return torch.randn([x.shape[0], 1] + self.shape, device=x.device) * self.noise_strength

    def forward(self, x, w, noise_mode="random", fused_modconv=True, gain=1):
        """x [N,I,H/up,W/up], w [N,w_dim] -> [N,O,H,W]. noise_mode: 'random', 'const' (stored), 'none'."""
        assert noise_mode in ("random", "const", "none"), noise_mode
        misc.assert_shape(x, [None, self.weight.shape[1]] + [side // self.up for side in self.shape])
        noise = self._noise(x, noise_mode)
        styles = self.affine(w)
        if own_kernels is not None and own_kernels.pays(x, self.weight, self.up, self.activation):
            return self._in_few_passes(x, styles, noise, gain)
        x = modulated_conv2d(
            x, self.weight, styles, noise=noise, up=self.up, padding=self.padding,
            resample_filter=self.resample_filter, flip_weight=self.up == 1, fused_modconv=fused_modconv,
        )  # fmt: skip
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        bias = self.bias.to(x.dtype)
        return bias_act.bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)

    def _in_few_passes(self, x, styles, noise, gain):
        """The whole layer by the fast op, to the same numbers but for rounding."""
        return own_kernels.layer(
            x, self.weight, styles, _demodulation(self.weight, styles), noise, self.bias, up=self.up,
            padding=self.padding, resample_filter=self.resample_filter, flip_weight=self.up == 1,
            act=self.activation, gain=self.act_gain * gain,
            clamp=None if self.conv_clamp is None else self.conv_clamp * gain,
        )  # fmt: skip


@persistence.persistent_class
class ToRGBLayer(torch.nn.Module):
    """Modulated 1x1 convolution to image channels, not demodulated: x [N,I,H,W], w [N,w_dim] -> [N,O,H,W]."""

    def __init__(self, in_channels, out_channels, w_dim, kernel_size=1, conv_clamp=None, channels_last=False):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = torch.nn.Parameter(
            _random_kernel(out_channels, in_channels, kernel_size, channels_last)
        )
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def forward(self, x, w, fused_modconv=True):
        """x [N,I,H,W], w [N,w_dim] -> [N,O,H,W], in x's dtype."""
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused_modconv=fused_modconv)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


@persistence.persistent_class
class SynthesisBlock(torch.nn.Module):
    """All layers of one resolution: conv0 (up-sampling), conv1, torgb, skip, those that the architecture has.

    in_channels = 0 makes the first block: a learned constant instead of conv0 and its input. `shape`: [H,W],
    None for [resolution, resolution]; `half_dtype`: what `use_fp16` computes in, 'float16' or 'bfloat16';
    `layer_kwargs` go to SynthesisLayer.
    """

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, img_channels, is_last, architecture="skip",
        resample_filter=[1, 3, 3, 1], conv_clamp=None, use_fp16=False, fp16_channels_last=False, shape=None,
        half_dtype="float16", **layer_kwargs
    ):  # fmt: skip
        assert architecture in ARCHITECTURES, architecture
        assert half_dtype in HALF_DEVICES, half_dtype
        super().__init__()
        self.architecture, self.is_last, self.use_fp16 = architecture, is_last, use_fp16
        self.shape, self.half_dtype = [resolution] * 2 if shape is None else list(shape), half_dtype
        self.in_channels, self.img_channels = in_channels, img_channels
        self.resolution, self.w_dim = resolution, w_dim
        self.channels_last = use_fp16 and fp16_channels_last
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = 1 if is_last or architecture == "skip" else 0
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        shared = dict(conv_clamp=conv_clamp, channels_last=self.channels_last)
        layer_kwargs = dict(layer_kwargs, w_dim=w_dim, resolution=resolution, **shared)
        if shape is not None:
            layer_kwargs["shape"] = shape
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels] + self.shape))
        else:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, up=2, resample_filter=resample_filter, **layer_kwargs
            )
        self.conv1 = SynthesisLayer(out_channels, out_channels, **layer_kwargs)
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, **shared)
        if architecture == "resnet" and in_channels != 0:
            self.skip = Conv2dLayer(
                in_channels, out_channels, kernel_size=1, bias=False, up=2,
                resample_filter=resample_filter, channels_last=self.channels_last,
            )  # fmt: skip

    def forward(self, x, img, ws, force_fp32=False, fused_modconv=None, **layer_kwargs):
        """Returns (x [N,O,H,W], img [N,img_channels,H,W] or None if nothing made one yet).

        x [N,I,H/2,W/2] (None in the first block), img [N,img_channels,H/2,W/2] or None,
        ws [N,num_conv+num_torgb,w_dim]; layer_kwargs: noise_mode.
        """
        misc.assert_shape(ws, [None, self.num_conv + self.num_torgb, self.w_dim])
        half = self.use_fp16 and not force_fp32
        dtype, layout = _compute_format(
            ws.device, half, self.channels_last, self.half_dtype, self.shape, self.conv1.weight.shape[0]
        )
        if fused_modconv is None:  # never in training, see modulated_conv2d; on CPU it only costs time
            pays = (dtype == torch.float32 or ws.shape[0] == 1) and ws.device.type != "cpu"
            fused_modconv = pays and not self.training
        layer_kwargs["fused_modconv"] = fused_modconv
        styles = ws.unbind(dim=1)
        x = self._features(x, styles, dtype, layout, layer_kwargs)
        if img is not None:
            misc.assert_shape(img, [None, self.img_channels] + [side // 2 for side in self.shape])
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.num_torgb:
            rgb = self.torgb(x, styles[-1], fused_modconv=fused_modconv)
            rgb = rgb.to(torch.float32).contiguous()
            img = rgb if img is None else img + rgb
        return x, img

    def _features(self, x, styles, dtype, layout, layer_kwargs):
        """The convolutions of the block -> [N,O,H,W] of the given dtype and memory format."""
        if self.in_channels == 0:
            x = self.const.to(dtype).repeat(styles[0].shape[0], 1, 1, 1).contiguous(memory_format=layout)
            return self.conv1(x, styles[0], **layer_kwargs)
        misc.assert_shape(x, [None, self.in_channels] + [side // 2 for side in self.shape])
        x = x.to(dtype=dtype, memory_format=layout)
        y = self.conv0(x, styles[0], **layer_kwargs)
        if self.architecture != "resnet":
            return self.conv1(y, styles[1], **layer_kwargs)
        return self.conv1(y, styles[1], gain=HALF_POWER, **layer_kwargs) + self.skip(x, gain=HALF_POWER)


@persistence.persistent_class
class SynthesisNetwork(torch.nn.Module):
    """Maps ws [N,num_ws,w_dim] to an image [N,img_channels,H,W]; blocks b4, b8, ..., b{4 * 2^n}.

    Block r has min(channel_base // r, channel_max) channels; the last `num_fp16_res` blocks, but for b4,
    compute in half precision (see HALF_DEVICES). `img_shape`: [H,W], whose longer side `img_resolution` is;
    None for a square. `block_kwargs` go to SynthesisBlock.
    """

    def __init__(
        self, w_dim, img_resolution, img_channels, channel_base=32768, channel_max=512, num_fp16_res=0,
        img_shape=None, **block_kwargs
    ):  # fmt: skip
        super().__init__()
        self.w_dim, self.img_channels = w_dim, img_channels
        self.img_resolution, self.img_shape = img_resolution, _picture_shape(img_resolution, img_shape)
        shapes = _block_shapes(self.img_shape)
        self.block_resolutions = list(shapes)
        self.img_resolution_log2 = len(shapes) + 1  # of the last block's resolution
        first_fp16 = _first_fp16_resolution(self.img_resolution_log2, num_fp16_res)
        self.num_ws = 0
        in_channels = 0
        for resolution in self.block_resolutions:
            out_channels = _channels(resolution, channel_base, channel_max)
            block = SynthesisBlock(
                in_channels, out_channels, w_dim, resolution, img_channels,
                is_last=resolution == self.block_resolutions[-1], use_fp16=resolution >= first_fp16,
                **shapes[resolution], **block_kwargs,
            )  # fmt: skip
            setattr(self, "b%d" % resolution, block)
            self.num_ws += block.num_conv
            in_channels = out_channels
        self.num_ws += 1  # the last torgb; any other shares its w with the next block's first layer

    def forward(self, ws, **block_kwargs):
        """ws [N,num_ws,w_dim] -> float32 [N,img_channels,H,W], nominally in [-1,1], not clamped.

        block_kwargs: noise_mode ('random', 'const', 'none'), force_fp32, fused_modconv.
        """
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        ws = ws.to(torch.float32)
        x = img = None
        start = 0
        for resolution in self.block_resolutions:
            block = getattr(self, "b%d" % resolution)
            x, img = block(x, img, ws.narrow(1, start, block.num_conv + block.num_torgb), **block_kwargs)
            start += block.num_conv
        return img


@persistence.persistent_class
class Generator(torch.nn.Module):
    """z [N,z_dim], c [N,c_dim] -> image [N,img_channels,H,W]: `mapping` followed by `synthesis`.

    `img_shape`: [H,W], whose longer side `img_resolution` is; None for a square.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, img_resolution, img_channels, mapping_kwargs={}, synthesis_kwargs={},
        img_shape=None,
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.img_shape = _picture_shape(img_resolution, img_shape)
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        if img_shape is not None:
            synthesis_kwargs = dict(synthesis_kwargs, img_shape=img_shape)
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, num_ws=self.num_ws, **mapping_kwargs)

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, **synthesis_kwargs):
        """z [N,z_dim], c [N,c_dim] (None if c_dim is 0) -> float32 image, nominally in [-1,1]."""
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)


# ----------------------------------------------------------------------------
# Discriminator.


@persistence.persistent_class
class DiscriminatorBlock(torch.nn.Module):
    """All layers of one resolution: fromrgb, conv0, conv1 (down-sampling), skip, those the architecture has.

    in_channels = 0 makes the first block, which sees the image only. Layers are numbered from
    `first_layer_idx` in the order above; those below `freeze_layers` are not trainable. `shape`: [H,W], None
    for [resolution, resolution]; `half_dtype`: what `use_fp16` computes in, 'float16' or 'bfloat16'.
    """

    def __init__(
        self, in_channels, tmp_channels, out_channels, resolution, img_channels, first_layer_idx,
        architecture="resnet", activation="lrelu", resample_filter=[1, 3, 3, 1], conv_clamp=None,
        use_fp16=False, fp16_channels_last=False, freeze_layers=0, shape=None, half_dtype="float16",
    ):  # fmt: skip
        assert in_channels in (0, tmp_channels), "in_channels must be 0 or equal to tmp_channels"
        assert architecture in ARCHITECTURES, architecture
        assert half_dtype in HALF_DEVICES, half_dtype
        super().__init__()
        self.shape, self.half_dtype = [resolution] * 2 if shape is None else list(shape), half_dtype
        self.architecture, self.use_fp16, self.first_layer_idx = architecture, use_fp16, first_layer_idx
        self.in_channels, self.img_channels, self.resolution = in_channels, img_channels, resolution
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        convolution = dict(activation=activation, conv_clamp=conv_clamp)
        halving = dict(down=2, resample_filter=resample_filter)
        layers = [
            ("conv0", tmp_channels, tmp_channels, 3, convolution),
            ("conv1", tmp_channels, out_channels, 3, dict(convolution, **halving)),
        ]
        if in_channels == 0 or architecture == "skip":
            layers.insert(0, ("fromrgb", img_channels, tmp_channels, 1, convolution))
        if architecture == "resnet":
            layers.append(("skip", tmp_channels, out_channels, 1, dict(halving, bias=False)))
        for index, (name, fan_in, fan_out, kernel_size, kwargs) in enumerate(layers, first_layer_idx):
            trainable = index >= freeze_layers
            kwargs = dict(kwargs, trainable=trainable, channels_last=self.channels_last)
            setattr(self, name, Conv2dLayer(fan_in, fan_out, kernel_size, **kwargs))
        self.num_layers = len(layers)

    def forward(self, x, img, force_fp32=False):
        """Returns (x [N,O,H/2,W/2], img [N,img_channels,H/2,W/2], or None unless 'skip').

        x [N,in_channels,H,W] (None in the first block), img [N,img_channels,H,W] (None where no fromrgb
        reads it).
        """
        device = (img if x is None else x).device
        half = self.use_fp16 and not force_fp32
        dtype, layout = _compute_format(
            device, half, self.channels_last, self.half_dtype, self.shape, self.conv1.weight.shape[1]
        )
        if x is not None:
            misc.assert_shape(x, [None, self.in_channels] + self.shape)
            x = x.to(dtype=dtype, memory_format=layout)
        if self.in_channels == 0 or self.architecture == "skip":
            misc.assert_shape(img, [None, self.img_channels] + self.shape)
            seen = self.fromrgb(img.to(dtype=dtype, memory_format=layout))
            x = seen if x is None else x + seen
            img = upfirdn2d.downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture != "resnet":
            return self.conv1(self.conv0(x)), img
        return self.conv1(self.conv0(x), gain=HALF_POWER) + self.skip(x, gain=HALF_POWER), img


@persistence.persistent_class
class MinibatchStdLayer(torch.nn.Module):
    """Appends `num_channels` feature maps that tell how much the samples of a group differ from each other.

    Sample n belongs to group n mod (N / G), G = min(group_size, N), or N if group_size is None; G must
    divide N.
    """

    def __init__(self, group_size, num_channels=1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x):
        """x [N,C,H,W] -> [N,C+num_channels,H,W]; num_channels must divide C."""
        num, channels, height, width = x.shape
        members = num if self.group_size is None else min(self.group_size, num)
        maps = self.num_channels
        groups = x.reshape(members, -1, maps, channels // maps, height, width)  # [G,N/G,F,C/F,H,W]
        distances = groups - groups.mean(dim=0)  # var() takes 50 times as long on a CPU
        deviation = torch.sqrt((distances * distances).mean(dim=0) + 1e-8)
        statistic = deviation.mean(dim=[2, 3, 4])  # [N/G,F]
        statistic = statistic.repeat(members, 1)[:, :, None, None].expand(-1, -1, height, width)
        return torch.cat([x, statistic], dim=1)


@persistence.persistent_class
class DiscriminatorEpilogue(torch.nn.Module):
    """Last block: minibatch statistics, a 3x3 convolution and two fully connected layers, always in float32.

    cmap_dim > 0: the result is the projection of the output on the mapped label `cmap`, divided by
    sqrt(cmap_dim). `shape`: [H,W], None for [resolution, resolution].
    """

    def __init__(
        self, in_channels, cmap_dim, resolution, img_channels, architecture="resnet", mbstd_group_size=4,
        mbstd_num_channels=1, activation="lrelu", conv_clamp=None, shape=None,
    ):  # fmt: skip
        assert architecture in ARCHITECTURES, architecture
        super().__init__()
        self.shape = [resolution] * 2 if shape is None else list(shape)
        self.architecture, self.cmap_dim, self.resolution = architecture, cmap_dim, resolution
        self.in_channels, self.img_channels = in_channels, img_channels
        if architecture == "skip":
            self.fromrgb = Conv2dLayer(img_channels, in_channels, kernel_size=1, activation=activation)
        self.mbstd = (
            MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        )
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels,
            in_channels,
            kernel_size=3,
            activation=activation,
            conv_clamp=conv_clamp,
        )
        self.fc = FullyConnectedLayer(
            in_channels * self.shape[0] * self.shape[1], in_channels, activation=activation
        )
        self.out = FullyConnectedLayer(in_channels, cmap_dim if cmap_dim > 0 else 1)

    def forward(self, x, img, cmap, force_fp32=False):
        """x [N,in_channels,H,W], img [N,img_channels,H,W] ('skip' only), cmap [N,cmap_dim] (if > 0) -> [N,1].

        `force_fp32` changes nothing here; it keeps the call that of the other blocks.
        """
        misc.assert_shape(x, [None, self.in_channels] + self.shape)
        x = x.to(dtype=torch.float32, memory_format=torch.contiguous_format)
        if self.architecture == "skip":
            misc.assert_shape(img, [None, self.img_channels] + self.shape)
            x = x + self.fromrgb(img.to(dtype=torch.float32, memory_format=torch.contiguous_format))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim > 0:
            misc.assert_shape(cmap, [None, self.cmap_dim])
            x = torch.sum(x * cmap, dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    """Image [N,img_channels,H,W] and label [N,c_dim] -> logits [N,1]; blocks b{4 * 2^n}, ..., b8, b4.

    b4 is the epilogue. A conditional discriminator maps its label to cmap_dim features (default: as many as
    the channels at 4x4). `img_shape`: [H,W], whose longer side `img_resolution` is; None for a square.
    """

    def __init__(
        self, c_dim, img_resolution, img_channels, architecture="resnet", channel_base=32768, channel_max=512,
        num_fp16_res=0, conv_clamp=None, cmap_dim=None, block_kwargs={}, mapping_kwargs={},
        epilogue_kwargs={}, img_shape=None,
    ):  # fmt: skip
        super().__init__()
        self.c_dim, self.img_channels = c_dim, img_channels
        self.img_resolution, self.img_shape = img_resolution, _picture_shape(img_resolution, img_shape)
        shapes = _block_shapes(self.img_shape)
        self.block_resolutions = list(shapes)[:0:-1]  # b4 aside
        self.img_resolution_log2 = len(shapes) + 1  # of the first block's resolution
        first_fp16 = _first_fp16_resolution(self.img_resolution_log2, num_fp16_res)
        shared = dict(img_channels=img_channels, architecture=architecture, conv_clamp=conv_clamp)
        in_channels = layer_idx = 0
        for resolution in self.block_resolutions:
            tmp_channels = _channels(resolution, channel_base, channel_max)
            out_channels = _channels(resolution // 2, channel_base, channel_max)
            block = DiscriminatorBlock(
                in_channels, tmp_channels, out_channels, resolution=resolution, first_layer_idx=layer_idx,
                use_fp16=resolution >= first_fp16, **shapes[resolution], **block_kwargs, **shared,
            )  # fmt: skip
            setattr(self, "b%d" % resolution, block)
            layer_idx += block.num_layers
            in_channels = out_channels
        last_channels = _channels(4, channel_base, channel_max)
        cmap_dim = 0 if c_dim == 0 else last_channels if cmap_dim is None else cmap_dim
        if c_dim > 0:
            self.mapping = MappingNetwork(
                z_dim=0, c_dim=c_dim, w_dim=cmap_dim, num_ws=None, w_avg_beta=None, **mapping_kwargs
            )
        self.b4 = DiscriminatorEpilogue(
            last_channels, cmap_dim=cmap_dim, resolution=4, **shapes[4], **epilogue_kwargs, **shared
        )

    def forward(self, img, c, **block_kwargs):
        """img [N,img_channels,H,W], nominally in [-1,1]; c [N,c_dim] (None if c_dim is 0) -> logits [N,1]."""
        x = None
        for resolution in self.block_resolutions:
            x, img = getattr(self, "b%d" % resolution)(x, img, **block_kwargs)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)
