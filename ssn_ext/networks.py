# SPDX-License-Identifier: Apache-2.0
"""The generator of Spatially Stochastic Networks (SSN): StyleGAN2 with a grid of independent latent blocks.

Persistent classes: the source of this module travels inside every pickle, so it is self-contained (it needs
dnnlib and torch_utils only, also those of NVIDIA's checkouts), reads under Python 3.7 and holds plain Python
state. Its layers resemble training/networks.py for that reason; a test holds that a 1x1 grid equals the plain
generator.

Flat at the boundary, spatial inside: for a grid of h x w blocks with C channels each, z_dim and w_dim are
C*h*w, and a latent [N, C*h*w] is [N, C, h, w] seen as one axis (channel-major). Several grids (`latent_grids`)
share one latent [N, C, B] with the blocks of all grids side by side; every resolution of the layers' inputs
reads one of them (`grid_splits`).

A picture of H x W pixels is h0 x w0 doubled n times. Blocks of layers are named after the resolution r = 4, 8, ...,
4 * 2^n that they have in a square network (h0 = w0 = 4), and have its widths; their pictures are h0 * r/4 x
w0 * r/4. Shapes: N samples, I/O/C channels, H, W height and width of a layer's or block's picture.
"""

# The mutable defaults below are part of the public signatures and are never written to.
# ruff: noqa: B006

import math

import torch

from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

try:
    from torch_utils.ops import own_kernels, spatial_modulation, tap_energy
except ImportError:
    own_kernels = spatial_modulation = tap_energy = None

HALF_DEVICES = {"float16": ["cuda"], "bfloat16": ["cuda", "cpu"]}  # on others float32 stays
SMALLEST, LARGEST = 4, 32  # sides of h0 x w0
CPU_LAST = 2  # pixels a channel from which on channels-last pays on a CPU
HALF_POWER = math.sqrt(0.5)  # two branches of equal variance, so scaled, add up to that variance again

# ----------------------------------------------------------------------------
# Functions.


def normalize_2nd_moment(x, dim=1, eps=1e-8):
    """Scales x so that the mean of its squares along `dim` is one."""
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


def resize(x, height, width):
    """Resizes maps [N,C,h,w] -> [N,C,height,width], axis by axis: bilinear with clamped borders where the
    result is finer, an average over the cells that it touches where it is coarser (their area average where the
    sides are multiples). The weights of every result sum to one, so that constant maps stay constant."""
    h, w = x.shape[2], x.shape[3]
    if (h, w) == (height, width):
        return x
    if not _is_small([x]):
        return _resize_map(x, height, width)
    return sum_of_maps([x], height, width)


def sum_of_maps(grids, height, width):
    """The sum [N,C,height,width] of the maps that `resize` makes of grids of [N,C,h,w]."""
    if len(grids) == 1 and grids[0].shape[2:] == (height, width):
        return grids[0]
    if not _is_small(grids):
        return sum(resize(grid, height, width) for grid in grids)
    matrix, _, values = _stacked(grids, height, width)
    x = torch.matmul(matrix, values)  # [N,height*width,C]: channels-last
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)  # a view


def mean_square(grids, height, width):
    """[N,C]: the mean over positions of the square of `sum_of_maps`.

    The map is A g, A [height*width,P] the matrix of resizing and g the P values of all grids, so that the mean is
    g^T (A^T A / (height * width)) g: of small grids no pass over the map is needed, here or for gradients.
    """
    if not _is_small(grids):
        styles = sum_of_maps(grids, height, width)
        return (styles * styles).mean(dim=[2, 3])
    _, gram, values = _stacked(grids, height, width)
    return (values * torch.matmul(gram, values)).sum(dim=1)


def _is_small(grids):
    return all(x.shape[2] * x.shape[3] <= MATRIX_LIMIT and x.dtype.is_floating_point for x in grids)


def _stacked(grids, height, width):
    """(A, A^T A / (height * width), values [N,P,C]) of `mean_square`."""
    shapes = tuple((x.shape[2], x.shape[3]) for x in grids)
    values = [x.flatten(2).transpose(1, 2) for x in grids]
    values = values[0] if len(values) == 1 else torch.cat(values, dim=1)
    return _resize_matrices(shapes, height, width, values.dtype, values.device) + (values,)


def _resize_map(x, height, width):
    """`resize` as it is defined."""
    h, w = x.shape[2], x.shape[3]
    if height < h or width < w:
        x = torch.nn.functional.adaptive_avg_pool2d(x, [min(h, height), min(w, width)])
    if height > h or width > w:
        x = torch.nn.functional.interpolate(x, size=[height, width], mode="bilinear", align_corners=False)
    return x


MATRIX_LIMIT = 64  # positions: so small a grid is resized by one matrix product
_matrices = {}


def _resize_matrices(shapes, height, width, dtype, device):
    """A [height*width, P], what `_resize_map` does to the unit maps of all shapes ((h, w), ...), and its A^T A /
    (height * width)."""
    key = (shapes, height, width, dtype, device)
    if key not in _matrices:
        with torch.no_grad():
            units = [torch.eye(h * w, dtype=torch.float64).reshape(h * w, 1, h, w) for h, w in shapes]
            units = [x if x.shape[2:] == (height, width) else _resize_map(x, height, width) for x in units]
            matrix = torch.cat([x.flatten(1) for x in units]).t().contiguous()
            gram = matrix.t().matmul(matrix) / (height * width)
            made = (matrix.to(dtype=dtype, device=device), gram.to(dtype=dtype, device=device))
        stand_in = type(matrix) is not torch.Tensor or torch.jit.is_tracing()
        if stand_in or (hasattr(matrix, "is_inference") and matrix.is_inference()):
            return made  # they belong to torch.export or torch.jit.trace, or could not be used by later gradients
        _matrices[key] = made
    return _matrices[key]


def spatially_modulated_conv2d(
    x, weight, styles, noise=None, up=1, padding=0, resample_filter=None, demodulation="circular", flip_weight=True,
    cells=None,
):  # fmt: skip
    """out = (weight * (styles . x)) / sigma(weight, styles): eq. (1) of the SSN paper, '*' a convolution.

    x [N,I,H,W], weight [O,I,k,k], styles [N,I,H,W] or a list of grids that `sum_of_maps` makes it of; noise,
    broadcastable to the result, is added; returns [N,O,H*up,W*up] of x's dtype. demodulation: None (sigma = 1), the
    borders of eq. (14), see `expected_variance`, or 'local': `local_scale`, computed at `cells` = [h,w] (None:
    everywhere) and resized.
    """
    shape = list(x.shape[2:])
    if isinstance(styles, torch.Tensor):
        assert styles.shape == x.shape, (styles.shape, x.shape)
        styles = [styles]
    if demodulation is not None and x.dtype == torch.float16:
        weight, styles = _rescale_for_half(weight, styles)
    small, fused = _is_small(styles), _fuses(x, styles)
    grids = styles if fused else [sum_of_maps(styles, *shape)]  # the map, once for all that follows
    scale = None
    if demodulation == "local":
        scale = local_scale(weight, sum_of_maps(styles, *(cells or shape)))
    elif demodulation == "circular" and (small or fused):
        of_maps = mean_square if small else spatial_modulation.mean_square
        scale = _inverse_root(_energy_through(weight, of_maps(styles, *shape)))
    elif demodulation is not None:
        variance = expected_variance(weight, sum_of_maps(grids, *shape), demodulation, flip_weight)
        scale = _inverse_root(variance)
    x = conv2d_resample.conv2d_resample(
        x=_modulate(x, grids),
        w=weight.to(x.dtype),
        f=resample_filter,
        up=up,
        padding=padding,
        flip_weight=flip_weight,
    )
    noise = None if noise is None else noise.to(x.dtype)
    if scale is None:
        return x if noise is None else x.add_(noise)
    if scale.ndim == 4 and _fuses(x, [scale]):
        x = _modulate(x, [scale])
        return x if noise is None else x.add_(noise)
    scale = resize(scale, *x.shape[2:]) if scale.ndim == 4 else scale[:, :, None, None]
    scale = scale.to(x.dtype)
    return x * scale if noise is None else fma.fma(x, scale, noise)


def _fuses(x, grids):
    """Whether one kernel multiplies x by the sum of the grids' maps, which are then never made."""
    return spatial_modulation is not None and spatial_modulation.fuses(x, grids)


def _modulate(x, grids):
    """x [N,C,H,W] times the sum of the maps of grids [N,C,h,w], of x's dtype."""
    if _fuses(x, grids):
        return spatial_modulation.modulate(x, *grids)
    return x * sum_of_maps(grids, *x.shape[2:]).to(x.dtype)


def _inverse_root(variance):
    return (variance + 1e-8).rsqrt()


def expected_variance(weight, styles, borders="circular", flip_weight=True):
    """sigma^2 [N,O] of eq. (14): the mean over positions of weight^2 * styles^2, weight [O,I,k,k], styles
    [N,I,H,W].

    It is the expected variance of weight * (styles . h) for independent h of zero mean and unit variance;
    always that of the stride-1 convolution on the layer's input. With circular borders every tap sees every
    position, so that sigma^2 = sum_i (sum of the taps' squares) * mean styles^2, StyleGAN2's value for
    constant styles. With 'zero_padded' ones a tap that is off the centre misses the rows and columns that its
    shift moves out.
    """
    dtype = torch.promote_types(styles.dtype, torch.float32)  # never in half precision
    styles, weight = styles.to(dtype), weight.to(dtype)
    if borders == "circular":
        return _energy_through(weight, (styles * styles).mean(dim=[2, 3]))
    assert borders == "zero_padded", borders
    energy, squares = styles * styles, weight * weight
    if not flip_weight:
        squares = squares.flip([2, 3])
    half = weight.shape[2] // 2
    height, width = energy.shape[2], energy.shape[3]
    shifts = range(-half, half + 1)
    columns = torch.stack(
        [energy[:, :, :, max(s, 0) : width + min(s, 0)].sum(dim=3) for s in shifts], dim=3
    )  # [N,I,H,k]
    seen = torch.stack(
        [columns[:, :, max(s, 0) : height + min(s, 0)].sum(dim=2) for s in shifts], dim=2
    )  # [N,I,k,k]
    return seen.flatten(1).matmul(squares.flatten(1).t()) / (height * width)


def local_scale(weight, styles):
    """1/sigma by position instead of one for the whole picture, [N,O,h,w]: sigma^2 = sum_i (sum of the taps' squares)
    * styles^2 there, weight [O,I,k,k], styles [N,I,h,w]. No block then scales what lies far from it. Constant styles
    give StyleGAN2's value."""
    dtype = torch.promote_types(styles.dtype, torch.float32)
    styles, weight = styles.to(dtype), weight.to(dtype)
    energy = _tap_energy(weight)[:, :, None, None]
    return _inverse_root(torch.nn.functional.conv2d(styles * styles, energy))


def repeat_cells(x, times):
    """Every cell of maps [N,C,h,w] as times x times cells of its value: [N,C,h*times,w*times], channels-last."""
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None]
    x = x.expand(-1, -1, times, -1, times, -1).reshape(
        x.shape[0], x.shape[1] * times, x.shape[3] * times, x.shape[5]
    )
    return x.permute(0, 3, 1, 2)


def _tap_energy(weight):
    """weight [O,I,k,k] -> [O,I]: the sum of the taps' squares."""
    return (weight * weight).sum(dim=[2, 3]) if tap_energy is None else tap_energy.tap_energy(weight)


def _energy_through(weight, energy):
    """energy [N,I] -> [N,O]: times the sum of the taps' squares of weight [O,I,k,k], summed over I."""
    if tap_energy is None:
        return energy.matmul(_tap_energy(weight).t())
    return tap_energy.energy_through(weight, energy)


def _rescale_for_half(weight, grids):
    """Factors that demodulation cancels again: one per output channel and one per sample, against
    overflow."""
    peak = weight.abs().flatten(1).max(dim=1)[0] * math.sqrt(weight[0].numel())  # [O]
    largest = sum(grid.abs().flatten(1).max(dim=1)[0] for grid in grids)  # at least that of the sum's map
    return weight / peak.reshape(-1, 1, 1, 1), [grid / largest.reshape(-1, 1, 1, 1) for grid in grids]


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


# ----------------------------------------------------------------------------
# Generator.


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
    """Features of the neighbourhood of every position: w map [N,C,h,w] -> [N,O,H,W], e_rho =
    convs(upsample_rho(R w)).

    One branch per resolution; [H,W] is that of the block, or of the block `max_resolution` where that is
    smaller. `shape`: [H,W] of the block, None for [resolution, resolution]. `out_features` (None: as many as
    `channels`) adds a last 1x1 projection without activation, for the paper's layout, where the encoded map
    takes the place of w.
    """

    def __init__(
        self,
        w_dim,
        resolution,
        channels=128,
        max_resolution=32,
        num_layers=2,
        out_features=None,
        activation="lrelu",
        shape=None,
    ):
        super().__init__()
        self.resolution = min(resolution, max_resolution)
        self.shape = [side * self.resolution // resolution for side in shape or [resolution] * 2]
        self.num_layers = num_layers
        self.reduce = PointwiseLayer(w_dim, channels)
        for i in range(num_layers):
            setattr(self, "conv%d" % i, ConvLayer(channels, channels, kernel_size=3, activation=activation))
        self.project = None if out_features is None else PointwiseLayer(channels, out_features)

    def forward(self, w):
        """w [N,C,h,w] -> [N,O,H,W]."""
        x = resize(self.reduce(w), self.shape[0], self.shape[1])
        for i in range(self.num_layers):
            x = getattr(self, "conv%d" % i)(x)
        return x if self.project is None else self.project(x)


def style_grids(affine, correction, w, e):
    """Grids, one or two of [N,I,h,w], whose resized sum is a layer's style map: s = upsample(W w + b) + upsample(Q e).

    affine: the layer's W, b; correction: its Q, or None. w [N,C,h,w] at the grid; e: encoder features, or
    None. Where there are features but no Q, they stand in for w (the paper's layout): s = upsample(W e + b).
    The resizing commutes with the 1x1 projections, which therefore work on the small maps. Two grids of one size
    are given as their sum.
    """
    if correction is None:
        return [affine(w if e is None else e)]
    direct, corrected = affine(w), correction(e)
    return [direct + corrected] if direct.shape == corrected.shape else [direct, corrected]


def _correction(encoder_init, channels, in_channels):
    if encoder_init != "exact":
        return None
    return PointwiseLayer(channels, in_channels, bias=False, weight_init=0)


@persistence.persistent_class
class SpatialSynthesisLayer(torch.nn.Module):
    """Spatially modulated 3x3 convolution with noise, bias and activation: x [N,I,H/up,W/up] -> [N,O,H,W].

    Its tensors are those of StyleGAN2's layer, and `encoder_style`, the projection Q of the encoder's
    features. `shape`: [H,W], None for [resolution, resolution].
    """

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, kernel_size=3, up=1, use_noise=True, activation="lrelu",
        resample_filter=[1, 3, 3, 1], conv_clamp=None, demodulation="circular", encoder_init="exact",
        encoder_channels=128, shape=None,
    ):  # fmt: skip
        super().__init__()
        self.resolution, self.up, self.padding = resolution, up, kernel_size // 2
        self.shape = [resolution] * 2 if shape is None else list(shape)
        self.use_noise, self.activation, self.conv_clamp = use_noise, activation, conv_clamp
        self.demodulation = demodulation
        self.act_gain = float(bias_act.activation_funcs[activation].def_gain)
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.affine = PointwiseLayer(w_dim, in_channels, bias_init=1)
        self.encoder_style = _correction(encoder_init, encoder_channels, in_channels)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(self.shape))
            self.noise_strength = torch.nn.Parameter(torch.zeros([]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))

    def _noise(self, x, mode, copies=1):
        if mode == "none" or not self.use_noise:
            return None
        if mode == "const":
            return self.noise_const * self.noise_strength  # [H,W]
        noise = torch.randn([x.shape[0] // copies, 1] + self.shape, device=x.device) * self.noise_strength
        return noise if copies == 1 else noise.repeat(copies, 1, 1, 1)

    def forward(self, x, w, e, noise_mode="random", gain=1, noise_copies=1):
        """x [N,I,H/up,W/up], w [N,C,h,w], e [N,E,H',W'] or None -> [N,O,H,W]. noise_mode: 'random', 'const',
        'none'. noise_copies: so many parts of the batch have the same random noise."""
        assert noise_mode in ("random", "const", "none"), noise_mode
        shape = [side // self.up for side in self.shape]
        misc.assert_shape(x, [None, self.weight.shape[1]] + shape)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        grids = style_grids(self.affine, self.encoder_style, w, e)
        noise = self._noise(x, noise_mode, noise_copies)
        fast = own_kernels is not None and own_kernels.pays(x, self.weight, self.up, self.activation)
        cells = [min(2 * w.shape[2], shape[0]), min(2 * w.shape[3], shape[1])]
        if fast and self.demodulation != "zero_padded":
            demodulate = self.demodulation is not None
            if self.demodulation == "local":
                demodulate = local_scale(self.weight, sum_of_maps(grids, *cells))
            return own_kernels.spatial_layer(
                x, self.weight, grids, demodulate, noise, self.bias, up=self.up, padding=self.padding,
                resample_filter=self.resample_filter, flip_weight=self.up == 1, act=self.activation,
                gain=self.act_gain * gain, clamp=clamp,
            )  # fmt: skip
        x = spatially_modulated_conv2d(
            x, self.weight, grids, noise=noise, up=self.up, padding=self.padding, resample_filter=self.resample_filter,
            demodulation=self.demodulation, flip_weight=self.up == 1, cells=cells,
        )  # fmt: skip
        return bias_act.bias_act(
            x, self.bias.to(x.dtype), act=self.activation, gain=self.act_gain * gain, clamp=clamp
        )


@persistence.persistent_class
class SpatialToRGBLayer(torch.nn.Module):
    """Spatially modulated 1x1 convolution to the picture's channels, without demodulation: [N,I,H,W] ->
    [N,O,H,W]."""

    def __init__(
        self,
        in_channels,
        out_channels,
        w_dim,
        kernel_size=1,
        conv_clamp=None,
        encoder_init="exact",
        encoder_channels=128,
    ):
        super().__init__()
        self.conv_clamp, self.padding = conv_clamp, kernel_size // 2
        self.affine = PointwiseLayer(w_dim, in_channels, bias_init=1)
        self.encoder_style = _correction(encoder_init, encoder_channels, in_channels)
        self.weight = torch.nn.Parameter(torch.randn([out_channels, in_channels, kernel_size, kernel_size]))
        self.bias = torch.nn.Parameter(torch.zeros([out_channels]))
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x, w, e):
        """x [N,I,H,W], w [N,C,h,w], e [N,E,H',W'] or None -> [N,O,H,W]."""
        weight = self.weight * self.weight_gain  # the gain on the few weights instead of on the large map
        grids = style_grids(self.affine, self.encoder_style, w, e)
        fast = own_kernels is not None and own_kernels.pays(x, weight, 1, "linear") and self.padding == 0
        if fast:
            x = own_kernels.spatial_to_rgb(x, weight.flatten(1), grids, self.bias)
            return x if self.conv_clamp is None else x.clamp_(-self.conv_clamp, self.conv_clamp)
        x = spatially_modulated_conv2d(x, weight, grids, padding=self.padding, demodulation=None)
        return bias_act.bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)


@persistence.persistent_class
class SpatialSynthesisBlock(torch.nn.Module):
    """One resolution of the synthesis network: (x, img, e of the block before, ws) -> (x, img, e).

    As StyleGAN2's block ('skip', 'resnet' or 'orig'), with one encoder branch that reads the w of its conv1.
    `shape`: [H,W], None for [resolution, resolution]; `half_dtype`: what `use_fp16` computes in, 'float16' or
    'bfloat16'.
    """

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, img_channels, is_last, architecture="skip",
        resample_filter=[1, 3, 3, 1], conv_clamp=None, use_fp16=False, fp16_channels_last=False, encoder_init="exact",
        encoder_kwargs={}, shape=None, half_dtype="float16", **layer_kwargs
    ):  # fmt: skip
        assert architecture in ("orig", "skip", "resnet"), architecture
        assert half_dtype in HALF_DEVICES, half_dtype
        assert encoder_init in ("exact", "random", "none"), encoder_init
        super().__init__()
        self.in_channels, self.w_dim, self.resolution, self.img_channels = (
            in_channels,
            w_dim,
            resolution,
            img_channels,
        )
        self.is_last, self.architecture, self.use_fp16 = is_last, architecture, use_fp16
        self.shape, self.half_dtype = [resolution] * 2 if shape is None else list(shape), half_dtype
        sized = {} if shape is None else dict(shape=shape)
        self.channels_last = use_fp16 and fp16_channels_last
        self.register_buffer("resample_filter", upfirdn2d.setup_filter(resample_filter))
        self.num_conv = self.num_torgb = 0
        self.encoder = None
        if encoder_init != "none":
            mapped = w_dim if encoder_init == "random" else None
            self.encoder = SpatialEncoder(w_dim, resolution, out_features=mapped, **sized, **encoder_kwargs)
        layer_kwargs.update(sized)
        shared = dict(conv_clamp=conv_clamp, encoder_init=encoder_init)
        shared.update(encoder_channels=encoder_kwargs.get("channels", 128))
        if in_channels == 0:
            self.const = torch.nn.Parameter(torch.randn([out_channels] + self.shape))
        else:
            self.conv0 = SpatialSynthesisLayer(
                in_channels,
                out_channels,
                w_dim,
                resolution,
                up=2,
                resample_filter=resample_filter,
                **shared,
                **layer_kwargs,
            )
            self.num_conv += 1
        self.conv1 = SpatialSynthesisLayer(
            out_channels, out_channels, w_dim, resolution, **shared, **layer_kwargs
        )
        self.num_conv += 1
        if is_last or architecture == "skip":
            self.torgb = SpatialToRGBLayer(out_channels, img_channels, w_dim, **shared)
            self.num_torgb += 1
        if in_channels != 0 and architecture == "resnet":
            self.skip = ConvLayer(
                in_channels, out_channels, 1, bias=False, up=2, resample_filter=resample_filter
            )

    def forward(self, x, img, e, ws, force_fp32=False, **layer_kwargs):
        """x [N,I,H/2,W/2] (None in the first block), img [N,C,H/2,W/2] or None, ws: one map per layer
        [N,C,h,w]."""
        w_iter = iter(ws)
        device = ws[0].device.type
        half = self.use_fp16 and not force_fp32 and device in HALF_DEVICES[self.half_dtype]
        dtype = getattr(torch, self.half_dtype) if half else torch.float32
        last = half and (self.channels_last or device == "cpu")
        if device == "cpu":  # where filters, and convolutions of many pixels and few channels, prefer it
            last = last or self.shape[0] * self.shape[1] >= CPU_LAST * self.conv1.weight.shape[0]
        layout = torch.channels_last if last else torch.contiguous_format
        below = e
        if self.encoder is not None:
            e = self.encoder(ws[self.num_conv - 1])
        if self.in_channels == 0:
            x = self.const.to(dtype).unsqueeze(0).repeat(ws[0].shape[0], 1, 1, 1)
            x = x.contiguous(memory_format=layout)
            x = self.conv1(x, next(w_iter), e, **layer_kwargs)
        elif self.architecture == "resnet":
            x = x.to(dtype=dtype, memory_format=layout)
            y = self.skip(x, gain=HALF_POWER)
            x = self.conv0(x, next(w_iter), below, **layer_kwargs)
            x = y.add_(self.conv1(x, next(w_iter), e, gain=HALF_POWER, **layer_kwargs))
        else:
            x = self.conv0(x.to(dtype=dtype, memory_format=layout), next(w_iter), below, **layer_kwargs)
            x = self.conv1(x, next(w_iter), e, **layer_kwargs)
        if img is not None:
            img = upfirdn2d.upsample2d(img, self.resample_filter)
        if self.num_torgb:
            y = self.torgb(x, next(w_iter), e).to(dtype=torch.float32, memory_format=torch.contiguous_format)
            img = y if img is None else img.add_(y)
        return x, img, e


def check_grids(grids, splits, resolutions):
    """AssertionError where not each of `grids` has layers: one split for each grid after the first, rising,
    each of them a resolution of a block after b4."""
    assert len(grids) > 0 and len(splits) == len(grids) - 1, (
        "grid_splits must be one resolution for each of latent_grids after the first"
    )
    assert list(splits) == sorted(set(splits)) and all(split in resolutions[1:] for split in splits), (
        "grid_splits must rise and be of %s, not %s" % (resolutions[1:], list(splits))
    )


@persistence.persistent_class
class SpatialSynthesisNetwork(torch.nn.Module):
    """ws [N,num_ws,w_dim] -> pictures [N,img_channels,H,W], nominally in [-1,1]; blocks b4, b8, ..., b{4 * 2^n}.

    encoder_init: 'exact' starts as the StyleGAN2 that the other tensors are from, 'random' is the paper's
    start, 'none' leaves the encoder out. encoder_kwargs: options of SpatialEncoder. demodulation: see
    `spatially_modulated_conv2d`. style_sharpness: styles go over from block to block so many times as steeply as
    bilinear interpolation of the blocks would, and are flat between. num_fp16_res: how many of the last blocks, b4
    excepted, compute in half precision. img_shape: [H,W], whose longer side img_resolution is; None for a square.
    latent_grids, grid_splits: see SpatialGenerator.
    """

    def __init__(
        self, w_dim, img_resolution, img_channels, latent_grid=[4, 4], channel_base=32768, channel_max=512,
        num_fp16_res=0, img_shape=None, latent_grids=None, grid_splits=[], style_sharpness=1, **block_kwargs
    ):  # fmt: skip
        super().__init__()
        self.style_sharpness = style_sharpness
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.img_shape = [img_resolution] * 2 if img_shape is None else [int(side) for side in img_shape]
        assert max(self.img_shape) == img_resolution, "img_resolution must be the longer side of img_shape"
        h0, w0, doublings = split_shape(*self.img_shape)
        self.latent_grid = [int(side) for side in latent_grid]
        self.latent_grids = [[int(side) for side in grid] for grid in latent_grids or [latent_grid]]
        self.grid_splits = [int(split) for split in grid_splits]
        self.img_resolution_log2 = doublings + 2  # of the last block's resolution
        self.block_resolutions = [2**i for i in range(2, self.img_resolution_log2 + 1)]
        check_grids(self.latent_grids, self.grid_splits, self.block_resolutions)
        first_fp16 = max(2 ** (self.img_resolution_log2 + 1 - num_fp16_res), 8)
        block_w_dim = w_dim // (self.latent_grid[0] * self.latent_grid[1])
        in_channels = 0
        self.num_ws = 1
        for res in self.block_resolutions:
            out_channels = min(channel_base // res, channel_max)
            sized = {} if h0 == w0 == 4 else dict(shape=[h0 * res // 4, w0 * res // 4])
            block = SpatialSynthesisBlock(
                in_channels, out_channels, block_w_dim, resolution=res, img_channels=img_channels,
                is_last=res == self.block_resolutions[-1], use_fp16=res >= first_fp16, **sized, **block_kwargs,
            )  # fmt: skip
            setattr(self, "b%d" % res, block)
            self.num_ws += block.num_conv
            in_channels = out_channels

    def _maps(self, ws):
        """ws [N,num_ws,w_dim] -> one map [N,C,h,w] each, of the grid that the layers reading it belong to.

        The input of these layers has the same resolution, 4 * 2^(i // 2) for the i-th of ws.
        """
        blocks = self.latent_grid[0] * self.latent_grid[1]
        maps = []
        ws = ws.reshape([ws.shape[0], self.num_ws, -1, blocks])
        ws = ws.permute(1, 0, 3, 2).contiguous().transpose(2, 3)  # one copy: now all maps are channels-last
        for i, each in enumerate(ws.unbind(dim=0)):
            number = sum(4 * 2 ** (i // 2) >= split for split in self.grid_splits)
            grid = self.latent_grids[number]
            first = sum(h * w for h, w in self.latent_grids[:number])
            own = each[:, :, first : first + grid[0] * grid[1]]
            own = own.reshape([own.shape[0], -1] + grid)
            maps.append(own if self.style_sharpness == 1 else repeat_cells(own, self.style_sharpness))
        return maps

    shares_noise = True  # forward knows noise_copies

    def forward(self, ws, noise_mode="random", force_fp32=False, fused_modconv=None, noise_copies=1):
        """ws [N,num_ws,w_dim] -> float32 [N,img_channels,H,W]. `fused_modconv` is accepted and has no meaning
        here: a style that varies in space cannot be folded into the weights. noise_copies: the N samples are so
        many parts of equal size, all of which get the random noise that the first would get alone."""
        misc.assert_shape(ws, [None, self.num_ws, self.w_dim])
        ws = self._maps(ws.to(torch.float32))
        x = img = e = None
        first = 0
        for res in self.block_resolutions:
            block = getattr(self, "b%d" % res)
            own = ws[first : first + block.num_conv + block.num_torgb]
            x, img, e = block(
                x, img, e, own, noise_mode=noise_mode, force_fp32=force_fp32, noise_copies=noise_copies
            )
            first += block.num_conv
        return img


@persistence.persistent_class
class SpatialGenerator(torch.nn.Module):
    """Spatially Stochastic Network: flat z [N,z_dim] -> pictures; independent latent blocks on `latent_grid`
    = [h, w].

    z_dim and w_dim are totals over the blocks (512 channels on 4x4: 8192). img_shape: [H,W], whose longer side
    img_resolution is; None for a square. Sampling, style mixing,
    truncation, path length and projection of the StyleGAN2 family work on it unchanged; code that wants the
    grid asks for `latent_grid`.

    latent_grids: several grids [[h, w], ...] over the same picture instead of one, each with layers of its own:
    those whose input is smaller than block b{grid_splits[0]} read the first, those from there on the second,
    and so on. A latent is then [N, C, B], the blocks of all grids side by side, the first grid's first;
    `latent_grid` says how that is one grid, [1, B], and `latent_grids` where the blocks are in the picture.
    """

    def __init__(
        self,
        z_dim,
        c_dim,
        w_dim,
        img_resolution,
        img_channels,
        latent_grid=[4, 4],
        mapping_kwargs={},
        synthesis_kwargs={},
        img_shape=None,
        latent_grids=None,
        grid_splits=[],
        **flat_synthesis_kwargs,
    ):  # flat ones are how stylegan3's tools ask for half precision
        super().__init__()
        several = {}
        if latent_grids is not None:
            latent_grid = [1, sum(h * w for h, w in latent_grids)]
            several = dict(latent_grids=latent_grids, grid_splits=grid_splits)
        blocks = latent_grid[0] * latent_grid[1]
        assert z_dim % blocks == 0 and w_dim % blocks == 0, (
            "z_dim and w_dim must be multiples of the number of blocks"
        )
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.latent_grid = [int(side) for side in latent_grid]
        self.block_z_dim, self.block_w_dim = z_dim // blocks, w_dim // blocks
        self.synthesis = SpatialSynthesisNetwork(
            w_dim=w_dim,
            img_resolution=img_resolution,
            img_channels=img_channels,
            latent_grid=latent_grid,
            **({} if img_shape is None else dict(img_shape=img_shape)),
            **several,
            **dict(synthesis_kwargs, **flat_synthesis_kwargs),
        )
        self.img_shape = list(self.synthesis.img_shape)
        self.latent_grids, self.grid_splits = self.synthesis.latent_grids, self.synthesis.grid_splits
        self.num_ws = self.synthesis.num_ws
        self.mapping = SpatialMappingNetwork(
            z_dim=z_dim,
            c_dim=c_dim,
            w_dim=w_dim,
            num_ws=self.num_ws,
            latent_grid=latent_grid,
            **mapping_kwargs,
        )

    def forward(self, z, c, truncation_psi=1, truncation_cutoff=None, **synthesis_kwargs):
        """z [N,z_dim] or [N,C,h,w], c [N,c_dim] -> float32 [N,img_channels,H,W], nominally in [-1,1]."""
        ws = self.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)
        return self.synthesis(ws, **synthesis_kwargs)
