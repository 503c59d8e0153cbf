# SPDX-License-Identifier: Apache-2.0
"""SPADE in the place of spatially modulated convolutions: the generator that figure 4 of the SSN paper compares with.

The wiring is that of ssn_ext/networks.py (a grid of latent blocks, one mapping for all of them, style maps at every
resolution, 'skip' pictures); only the conditioning of a layer differs, eq. (3) of the paper:

    SPADE(h, s) = scale(s) * (h - mu) / sigma + shift(s)

with mu, sigma per channel, the mean and standard deviation of h over examples and positions, eq. (4) and (5): those of
the batch in training mode, running ones in eval mode. So in training the pictures of a batch depend on each other.
Each process, and each part of a batch that is computed at once, has statistics of its own.

Persistent classes: the source of this module travels inside every pickle, so it is self-contained (dnnlib and
torch_utils only) and reads under Python 3.7; its layers resemble ssn_ext/networks.py for that reason. It computes in
float32 only. Shapes: N samples, I/O/C channels, H, W height and width of a layer's or block's picture, h, w those of
the grid.
"""

# The mutable defaults below are part of the public signatures and are never written to.
# ruff: noqa: B006

import math

import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d

SMALLEST, LARGEST = 4, 32  # sides of h0 x w0

# ----------------------------------------------------------------------------
# Functions.


def normalize_2nd_moment(x, dim=1, eps=1e-8):
    """Scales x so that the mean of its squares along `dim` is one."""
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


def resize(x, height, width):
    """Resizes maps [N,C,h,w] -> [N,C,height,width], axis by axis: bilinear with clamped borders where the result is
    finer, an average where it is coarser. Constant maps stay constant."""
    h, w = x.shape[2], x.shape[3]
    if height < h or width < w:
        x = torch.nn.functional.adaptive_avg_pool2d(x, [min(h, height), min(w, width)])
    if height > h or width > w:
        x = torch.nn.functional.interpolate(x, size=[height, width], mode="bilinear", align_corners=False)
    return x


def split_shape(height, width):
    """(h0, w0, n): height = h0 * 2^n, width = w0 * 2^n, n as large as it can be with h0, w0 >= 4."""
    sides, n = [height, width], 0
    while min(sides) >= 2 * SMALLEST and not any(side % 2 for side in sides):
        sides, n = [side // 2 for side in sides], n + 1
    assert SMALLEST <= min(sides) and max(sides) <= LARGEST, (
        "pictures must be h0 x w0 doubled n times, with h0 and w0 from %d to %d" % (SMALLEST, LARGEST)
    )
    return sides[0], sides[1], n


# ----------------------------------------------------------------------------
# Layers.


@persistence.persistent_class
class PointwiseLayer(torch.nn.Module):
    """A fully connected layer applied at every position, as a 1x1 convolution: [N,I,h,w] -> [N,O,h,w].

    activation((weight * weight_gain) x + bias * bias_gain); its tensors are those of StyleGAN2's fully
    connected layer.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        activation="linear",
        lr_multiplier=1,
        weight_init=1,
        bias_init=0,
    ):
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(
            torch.randn([out_features, in_features]) * (weight_init / lr_multiplier)
        )
        self.bias = torch.nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x):
        """x [N,I,h,w] -> [N,O,h,w]."""
        height, width = x.shape[2], x.shape[3]
        num, channels = x.shape[0], x.shape[1]
        x = x.permute(0, 2, 3, 1).reshape(-1, channels)  # one matrix product for all samples and positions
        x = x * self.weight_gain  # on x it costs less than on the matrix, or on the matrix's gradient
        if self.bias is None:
            x = torch.matmul(x, self.weight.t())
        else:
            x = torch.addmm(self.bias, x, self.weight.t(), beta=self.bias_gain)
        x = x.reshape(num, height, width, x.shape[1]).permute(0, 3, 1, 2)  # a view, channels-last
        return x if self.activation == "linear" else bias_act.bias_act(x, act=self.activation)


@persistence.persistent_class
class ConvLayer(torch.nn.Module):
    """Plain convolution, optionally up-sampling, with optional bias and activation: [N,I,H,W] ->
    [N,O,H*up,W*up]."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        bias=True,
        activation="linear",
        up=1,
        resample_filter=[1, 3, 3, 1],
    ):
        super().__init__()
        self.activation, self.up, self.padding = activation, up, kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = float(bias_act.activation_funcs[activation].def_gain)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels])) if bias else None

    def forward(self, x, gain=1):
        """x [N,I,H,W] -> [N,O,H*up,W*up]; `gain` multiplies the result."""
        weight = (self.weight * self.weight_gain).to(x.dtype)
        x = conv2d_resample.conv2d_resample(
            x=x, w=weight, f=self.resample_filter, up=self.up, padding=self.padding, flip_weight=self.up == 1
        )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bias_act.bias_act(x, bias, act=self.activation, gain=self.act_gain * gain)


@persistence.persistent_class
class SpatialMappingNetwork(torch.nn.Module):
    """StyleGAN2's mapping, the same one for every block: flat z [N,z_dim] (or [N,C,h,w]) -> ws
    [N,num_ws,w_dim].

    Every block's z and the embedded label are normalised and concatenated, then pass `num_layers` 1x1
    convolutions. In training mode `w_avg` [w_dim] tracks the mean over samples and blocks, the same vector in
    every block.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, num_ws, latent_grid=[4, 4], num_layers=8, embed_features=None, layer_features=None,
        activation="lrelu", lr_multiplier=0.01, w_avg_beta=0.995,
    ):  # fmt: skip
        super().__init__()
        blocks = latent_grid[0] * latent_grid[1]
        self.latent_grid = [int(side) for side in latent_grid]
        self.block_z_dim, self.block_w_dim = z_dim // blocks, w_dim // blocks
        self.num_layers, self.num_ws, self.w_avg_beta = num_layers, num_ws, w_avg_beta
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        embed_features = self.block_w_dim if embed_features is None else embed_features
        hidden = self.block_w_dim if layer_features is None else layer_features
        first = self.block_z_dim
        if c_dim > 0:
            self.embed = PointwiseLayer(c_dim, embed_features)
            first += embed_features
        widths = [first] + [hidden] * (num_layers - 1) + [self.block_w_dim]
        for i in range(num_layers):
            layer = PointwiseLayer(
                widths[i], widths[i + 1], activation=activation, lr_multiplier=lr_multiplier
            )
            setattr(self, "fc%d" % i, layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros([w_dim]))

    def _spatial(self, z):
        """z as float32 [N,C,h,w]; ValueError for any other shape."""
        shape = [self.block_z_dim] + self.latent_grid
        if z.ndim == 2 and z.shape[1] == self.z_dim:
            z = z.reshape([-1] + shape)
        if list(z.shape[1:]) != shape:
            raise ValueError(
                "z has shape %s, expected [N, %d] or %s" % (list(z.shape), self.z_dim, ["N"] + shape)
            )
        return z.to(torch.float32)

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, skip_w_avg_update=False):
        """z of any float type, c [N,c_dim] (may be None if c_dim is 0) -> float32 ws [N,num_ws,w_dim].

        truncation_psi: 1 leaves w alone, 0 gives w_avg; truncation_cutoff: only the first so many of the
        num_ws.
        """
        x = normalize_2nd_moment(self._spatial(z))
        if self.c_dim > 0:
            misc.assert_shape(c, [None, self.c_dim])
            label = normalize_2nd_moment(self.embed(c.to(torch.float32)[:, :, None, None]))
            x = torch.cat([x, label.expand(-1, -1, x.shape[2], x.shape[3])], dim=1)
        for i in range(self.num_layers):
            x = getattr(self, "fc%d" % i)(x)
        if self.training and self.w_avg_beta is not None and not skip_w_avg_update:
            mean = x.detach().mean(dim=[0, 2, 3]).repeat_interleave(x.shape[2] * x.shape[3])  # [w_dim]
            self.w_avg.copy_(mean.lerp(self.w_avg, self.w_avg_beta))
        w = x.flatten(1)  # [N,w_dim]
        if self.num_ws is None:
            return w
        near = w
        if truncation_psi != 1:
            assert self.w_avg_beta is not None, "truncation needs w_avg, and this network does not track it"
            near = self.w_avg.lerp(w, truncation_psi)
        truncated = len(range(self.num_ws)[:truncation_cutoff])
        return torch.stack([near] * truncated + [w] * (self.num_ws - truncated), dim=1)


@persistence.persistent_class
class SpatialEncoder(torch.nn.Module):
    """Features of the neighbourhood of every position: w map [N,C,h,w] -> [N,channels,H,W], one branch a resolution.

    [H,W] is that of the block, `shape` (None: [resolution, resolution]), or of the block `max_resolution` where that is
    smaller.
    """

    def __init__(self, w_dim, resolution, channels=128, max_resolution=32, num_layers=2, shape=None):
        super().__init__()
        self.resolution = min(resolution, max_resolution)
        self.shape = [side * self.resolution // resolution for side in shape or [resolution] * 2]
        self.num_layers = num_layers
        self.reduce = PointwiseLayer(w_dim, channels)
        for i in range(num_layers):
            setattr(self, "conv%d" % i, ConvLayer(channels, channels, kernel_size=3, activation="lrelu"))

    def forward(self, w):
        """w [N,C,h,w] -> [N,channels,H,W]."""
        x = resize(self.reduce(w), self.shape[0], self.shape[1])
        for i in range(self.num_layers):
            x = getattr(self, "conv%d" % i)(x)
        return x


# ----------------------------------------------------------------------------
# SPADE.


@persistence.persistent_class
class BatchStatistics(torch.nn.Module):
    """(h - mu) / sigma per channel, mu and sigma over examples and positions: [N,C,H,W] -> [N,C,H,W].

    Training mode: those of the batch, through which gradients flow, and the running ones take them in: a plain mean
    at first, later an exponential one of weight `momentum`. Eval mode: the running ones.
    """

    def __init__(self, channels, momentum=0.01, eps=1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros([channels]))
        self.register_buffer("running_var", torch.ones([channels]))
        self.register_buffer("count", torch.zeros([]))

    def forward(self, x):
        """x [N,C,H,W] -> [N,C,H,W]."""
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean = x.mean(dim=[0, 2, 3])  # eq. (4)
            variance = x.var(dim=[0, 2, 3], unbiased=False)  # eq. (5), squared
            self._remember(mean.detach(), variance.detach())
        scale = (variance + self.eps).rsqrt()
        return (x - mean[:, None, None]) * scale[:, None, None]

    def _remember(self, mean, variance):
        with torch.no_grad():
            self.count.add_(1)
            weight = (1 / self.count).clamp(min=self.momentum)
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(variance, weight)


@persistence.persistent_class
class SpadeLayer(torch.nn.Module):
    """SPADE, a convolution, noise, bias and activation: x [N,I,H/up,W/up] -> [N,O,H,W].

    Scale and shift are style maps as in SSN: s = upsample(W w + b) + upsample(Q e) of the latents w and the encoder's
    features e. weight, bias, affine (the scale), noise_* are StyleGAN2's tensors; the rest is new. kernel_size = 1,
    use_noise = False, activation = 'linear' make it the layer to the picture. `shape`: [H,W].
    """

    def __init__(
        self, in_channels, out_channels, w_dim, shape, kernel_size=3, up=1, use_noise=True, activation="lrelu",
        resample_filter=[1, 3, 3, 1], encoder_channels=None,
    ):  # fmt: skip
        super().__init__()
        self.shape, self.up, self.padding = list(shape), up, kernel_size // 2
        self.use_noise, self.activation = use_noise, activation
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        if kernel_size > 1:
            self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.norm = BatchStatistics(in_channels)
        self.affine = PointwiseLayer(w_dim, in_channels, bias_init=1)
        self.shift = PointwiseLayer(w_dim, in_channels)
        self.encoder_style = self.encoder_shift = None
        if encoder_channels is not None:
            self.encoder_style = PointwiseLayer(encoder_channels, in_channels, bias=False, weight_init=0)
            self.encoder_shift = PointwiseLayer(encoder_channels, in_channels, bias=False, weight_init=0)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(self.shape))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def _map(self, affine, correction, w, e, shape):
        """A style map [N,I,H,W]; 1x1 projections commute with the resizing and work on the small maps."""
        s = resize(affine(w), *shape)
        return s if correction is None else s + resize(correction(e), *shape)

    def forward(self, x, w, e, noise_mode="random"):
        """x [N,I,H/up,W/up], w [N,C,h,w], e [N,E,H',W'] or None -> [N,O,H,W]; noise_mode: 'random', 'const', 'none'."""
        assert noise_mode in ("random", "const", "none"), noise_mode
        shape = [side // self.up for side in self.shape]
        misc.assert_shape(x, [None, self.weight.shape[1]] + shape)
        scale = self._map(self.affine, self.encoder_style, w, e, shape)
        shift = self._map(self.shift, self.encoder_shift, w, e, shape)
        x = conv2d_resample.conv2d_resample(
            x=self.norm(x) * scale + shift, w=self.weight * self.weight_gain,
            f=self.resample_filter if self.up > 1 else None, up=self.up,
            padding=self.padding, flip_weight=self.up == 1,
        )  # fmt: skip
        if self.use_noise and noise_mode != "none":
            noise = self.noise_const
            if noise_mode == "random":
                noise = torch.randn([x.shape[0], 1] + self.shape, device=x.device)
            x = x + noise * self.noise_strength
        return bias_act.bias_act(x, self.bias, act=self.activation)


@persistence.persistent_class
class SpadeSynthesisBlock(torch.nn.Module):
    """One resolution: (x, img, e of the block before, ws) -> (x, img, e); in_channels = 0 makes the first one."""

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, img_channels, shape, use_noise=True, activation="lrelu",
        resample_filter=[1, 3, 3, 1], encoder_kwargs={},
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.resolution, self.shape = in_channels, resolution, list(shape)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.encoder = SpatialEncoder(w_dim, resolution, shape=shape, **encoder_kwargs)
        shared = dict(w_dim=w_dim, shape=shape, encoder_channels=self.encoder.reduce.weight.shape[0])
        conv = dict(shared, use_noise=use_noise, activation=activation)
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels] + self.shape))
        else:
            self.conv0 = SpadeLayer(in_channels, out_channels, up=2, resample_filter=resample_filter, **conv)
        self.conv1 = SpadeLayer(out_channels, out_channels, **conv)
        rgb = dict(kernel_size=1, use_noise=False, activation="linear")
        self.torgb = SpadeLayer(out_channels, img_channels, **rgb, **shared)
        self.num_conv = 1 if in_channels == 0 else 2

    def forward(self, x, img, e, ws, noise_mode="random"):
        """x [N,I,H/2,W/2] (None in the first block), img [N,C,H/2,W/2] or None, ws: one map per layer [N,C,h,w]."""
        below, e = e, self.encoder(ws[self.num_conv - 1])
        if self.in_channels == 0:
            x = self.const.unsqueeze(0).repeat(ws[0].shape[0], 1, 1, 1)
        else:
            x = self.conv0(x, ws[0], below, noise_mode)
        if x.device.type == "cpu":  # on which convolutions and filters prefer it
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x, ws[self.num_conv - 1], e, noise_mode)
        rgb = self.torgb(x, ws[self.num_conv], e).contiguous()
        return x, rgb if img is None else upfirdn2d.upsample2d(img, self.resample_filter) + rgb, e


@persistence.persistent_class
class SpadeSynthesisNetwork(torch.nn.Module):
    """ws [N,num_ws,w_dim] -> pictures [N,img_channels,H,W], nominally in [-1,1]; blocks b4, b8, ..., b{4 * 2^n}.

    Arguments as those of StyleGAN2's network; architecture must be 'skip'. What concerns half precision
    (num_fp16_res, conv_clamp, half_dtype, fp16_channels_last) is accepted and has no effect: float32, without a clamp.
    """

    def __init__(
        self, w_dim, img_resolution, img_channels, latent_grid=[4, 4], channel_base=32768, channel_max=512,
        img_shape=None, architecture="skip", num_fp16_res=0, conv_clamp=None, half_dtype="float16",
        fp16_channels_last=False, **block_kwargs
    ):  # fmt: skip
        super().__init__()
        assert architecture == "skip", architecture
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.img_shape = [img_resolution] * 2 if img_shape is None else [int(side) for side in img_shape]
        assert max(self.img_shape) == img_resolution, "img_resolution must be the longer side of img_shape"
        h0, w0, doublings = split_shape(*self.img_shape)
        self.latent_grid = [int(side) for side in latent_grid]
        self.block_resolutions = [4 * 2**i for i in range(doublings + 1)]
        block_w_dim = w_dim // (self.latent_grid[0] * self.latent_grid[1])
        in_channels, self.num_ws = 0, 1
        for res in self.block_resolutions:
            out_channels = min(channel_base // res, channel_max)
            block = SpadeSynthesisBlock(
                in_channels, out_channels, block_w_dim, res, img_channels,
                shape=[h0 * res // 4, w0 * res // 4], **block_kwargs,
            )  # fmt: skip
            setattr(self, "b%d" % res, block)
            self.num_ws += block.num_conv
            in_channels = out_channels

    def forward(self, ws, noise_mode="random", force_fp32=False, fused_modconv=None):
        """ws [N,num_ws,w_dim] -> float32 [N,img_channels,H,W]. force_fp32 and fused_modconv change nothing here."""
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        ws = ws.to(torch.float32).reshape([ws.shape[0], self.num_ws, -1] + self.latent_grid).unbind(dim=1)
        x = img = e = None
        first = 0
        for res in self.block_resolutions:
            block = getattr(self, "b%d" % res)
            x, img, e = block(x, img, e, ws[first : first + block.num_conv + 1], noise_mode)
            first += block.num_conv
        return img


@persistence.persistent_class
class SpadeGenerator(torch.nn.Module):
    """SPADE with a grid of latent blocks: flat z [N,z_dim] -> pictures. Arguments and attributes are those of
    ssn_ext.networks.SpatialGenerator: z_dim and w_dim are totals over the blocks of `latent_grid` = [h, w]."""

    def __init__(
        self, z_dim, c_dim, w_dim, img_resolution, img_channels, latent_grid=[4, 4], mapping_kwargs={},
        synthesis_kwargs={}, img_shape=None, **flat_synthesis_kwargs
    ):  # fmt: skip
        super().__init__()
        blocks = latent_grid[0] * latent_grid[1]
        assert z_dim % blocks == 0 and w_dim % blocks == 0, (
            "z_dim and w_dim must be multiples of the number of blocks"
        )
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.latent_grid = [int(side) for side in latent_grid]
        self.block_z_dim, self.block_w_dim = z_dim // blocks, w_dim // blocks
        self.synthesis = SpadeSynthesisNetwork(
            w_dim,
            img_resolution,
            img_channels,
            latent_grid,
            img_shape=img_shape,
            **dict(synthesis_kwargs, **flat_synthesis_kwargs),
        )
        self.img_shape, self.num_ws = list(self.synthesis.img_shape), self.synthesis.num_ws
        self.mapping = SpatialMappingNetwork(z_dim, c_dim, w_dim, self.num_ws, latent_grid, **mapping_kwargs)

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, **synthesis_kwargs):
        """z [N,z_dim] or [N,C,h,w], c [N,c_dim] -> float32 [N,img_channels,H,W], nominally in [-1,1]."""
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)
