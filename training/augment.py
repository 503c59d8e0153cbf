# SPDX-License-Identifier: Apache-2.0
"""Adaptive augmentation: random transforms of what the discriminator sees, each applied with probability p.

From "Training Generative Adversarial Networks with Limited Data" (Karras et al. 2020), appendix B. Transforms
come in three kinds. Geometric ones are joined into one matrix and carried out by a single high-quality
resampling; colour ones are joined into one matrix; the rest act on the pixels one by one. All of it is
differentiable, twice.

This module travels inside pickles: it reads under Python 3.7 and imports only what every checkout has.
"""

import functools
import math

import numpy as np
import torch

from torch_utils import misc, persistence
from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix, upfirdn2d

# Low-pass decomposition filters of Daubechies' wavelets, extremal phase (db) and least asymmetric (sym); each
# sums to sqrt(2). From the spectral factorisation of the half-band polynomial, computed with 60 digits.
# fmt: off
wavelets = {
    "db1": [0.7071067811865476, 0.7071067811865476],
    "db2": [-0.12940952255126037, 0.2241438680420134, 0.8365163037378079, 0.48296291314453416],
    "db3": [0.03522629188570953, -0.08544127388202666, -0.13501102001025458, 0.45987750211849154,
            0.8068915093110925, 0.33267055295008263],
    "db4": [-0.010597401785069032, 0.0328830116668852, 0.030841381835560764, -0.18703481171909309,
            -0.027983769416859854, 0.6308807679298589, 0.7148465705529157, 0.2303778133088965],
    "db5": [0.0033357252854737712, -0.012580751999081999, -0.006241490212798274, 0.07757149384004572,
            -0.032244869584638375, -0.24229488706638203, 0.13842814590132074, 0.7243085284377729,
            0.6038292697971896, 0.16010239797419293],
    "db6": [-0.0010773010853084796, 0.004777257510945511, 0.0005538422011614961, -0.03158203931748603,
            0.027522865530305727, 0.09750160558732304, -0.12976686756726194, -0.22626469396543983,
            0.31525035170919763, 0.7511339080210954, 0.49462389039845306, 0.11154074335010947],
    "db7": [0.00035371379997452024, -0.0018016407040474908, 0.0004295779729213665, 0.01255099855609984,
            -0.01657454163066688, -0.03802993693501441, 0.08061260915108308, 0.07130921926683026,
            -0.22403618499387498, -0.14390600392856498, 0.4697822874051931, 0.7291320908462351,
            0.3965393194819173, 0.07785205408500918],
    "db8": [-0.00011747678412476953, 0.0006754494064505693, -0.00039174037337694705, -0.004870352993451574,
            0.008746094047405777, 0.013981027917398282, -0.044088253930794755, -0.017369301001807547,
            0.12874742662047847, 0.0004724845739132828, -0.2840155429615469, -0.015829105256349306,
            0.5853546836542067, 0.6756307362972898, 0.31287159091429995, 0.05441584224310401],
    "sym4": [-0.07576571478950221, -0.029635527646002493, 0.497618667632775, 0.8037387518051321,
             0.29785779560530606, -0.09921954357663353, -0.012603967262031304, 0.032223100604051466],
    "sym5": [0.027333068344998768, 0.02951949092570626, -0.039134249302313844, 0.19939753397685558,
             0.7234076904040407, 0.633978963456792, 0.01660210576451085, -0.17532808990805623,
             -0.021101834024689042, 0.019538882735249827],
    "sym6": [0.015404109327044824, 0.0034907120842221626, -0.11799011114852002, -0.04831174258569806,
             0.49105594192797375, 0.787641141028651, 0.3379294217281658, -0.07263752278637658,
             -0.02106029251237085, 0.04472490177078139, 0.0017677118642540077, -0.00780070832503238],
    "sym7": [0.002681814568260147, -0.001047384888679738, -0.012636303403240567, 0.030515513165877885,
             0.06789269350122057, -0.04955283493704283, 0.017441255086835708, 0.5361019170905692,
             0.7677643170048829, 0.2886296317506479, -0.14004724044293365, -0.10780823770328972,
             0.0040102448715223955, 0.010268176708464817],
    "sym8": [-0.0033824159510050028, -0.0005421323318000107, 0.03169508781152599, 0.007607487324976609,
             -0.14329423835127267, -0.061273359067811076, 0.4813596512590534, 0.777185751699628,
             0.36444189483617895, -0.0519458381078818, -0.027219029917103486, 0.04913717967373029,
             0.0038087520138944896, -0.014952258337062199, -0.0003029205147241331, 0.001889950332767689],
}
# fmt: on
wavelets.update(haar=wavelets["db1"], sym2=wavelets["db2"], sym3=wavelets["db3"])

MATRIX_LIMIT = 128  # longest side for which resampling by matrices pays
NUM_BANDS = 4
BAND_POWER = [10 / 13, 1 / 13, 1 / 13, 1 / 13]  # expected share of each band in a natural image's power
GREY_AXIS = [1 / math.sqrt(3)] * 3 + [0]  # the direction of luma among homogeneous colours


# Matrices that act on homogeneous columns: of numbers, or of tensors [N], which give [N, rows, columns].


def matrix(*rows, device=None):
    """Rows of numbers and tensors [...] -> [..., rows, columns]; of numbers alone, a shared constant."""
    entries = [entry for row in rows for entry in row]
    tensors = [entry for entry in entries if torch.is_tensor(entry)]
    if not tensors:
        return misc.constant(rows, device=device)
    shape, device = tensors[0].shape, tensors[0].device
    entries = [e if torch.is_tensor(e) else misc.constant(e, shape=shape, device=device) for e in entries]
    return torch.stack(entries, dim=-1).reshape(list(shape) + [len(rows), len(rows[0])])


def translate2d(tx, ty, **kwargs):
    """Moves by (tx, ty)."""
    return matrix([1, 0, tx], [0, 1, ty], [0, 0, 1], **kwargs)


def translate3d(tx, ty, tz, **kwargs):
    """Moves by (tx, ty, tz)."""
    return matrix([1, 0, 0, tx], [0, 1, 0, ty], [0, 0, 1, tz], [0, 0, 0, 1], **kwargs)


def scale2d(sx, sy, **kwargs):
    """Stretches by sx and sy."""
    return matrix([sx, 0, 0], [0, sy, 0], [0, 0, 1], **kwargs)


def scale3d(sx, sy, sz, **kwargs):
    """Stretches by sx, sy and sz."""
    return matrix([sx, 0, 0, 0], [0, sy, 0, 0], [0, 0, sz, 0], [0, 0, 0, 1], **kwargs)


def rotate2d(theta, **kwargs):
    """Turns by the angle theta (a tensor), from the first axis towards the second."""
    cos, sin = torch.cos(theta), torch.sin(theta)
    return matrix([cos, -sin, 0], [sin, cos, 0], [0, 0, 1], **kwargs)


def rotate3d(v, theta, **kwargs):
    """Turns by the angle theta (a tensor) about the unit vector v, of which the first three entries count."""
    x, y, z = v[0], v[1], v[2]
    cos, sin = torch.cos(theta), torch.sin(theta)
    rest = 1 - cos  # Rodrigues: cos I + sin [v]x + (1 - cos) v v^T
    return matrix(
        [cos + x * x * rest, x * y * rest - z * sin, x * z * rest + y * sin, 0],
        [y * x * rest + z * sin, cos + y * y * rest, y * z * rest - x * sin, 0],
        [z * x * rest - y * sin, z * y * rest + x * sin, cos + z * z * rest, 0],
        [0, 0, 0, 1],
        **kwargs,
    )


def translate2d_inv(tx, ty, **kwargs):
    """Undoes translate2d."""
    return matrix([1, 0, -tx], [0, 1, -ty], [0, 0, 1], **kwargs)


def scale2d_inv(sx, sy, **kwargs):
    """Undoes scale2d."""
    return matrix([1 / sx, 0, 0], [0, 1 / sy, 0], [0, 0, 1], **kwargs)


def rotate2d_inv(theta, **kwargs):
    """Undoes rotate2d."""
    return rotate2d(theta, **kwargs).transpose(-1, -2)


def band_filters(lowpass):
    """Splits the spectrum into octaves: rows of zero-phase filters that add up to the unit impulse.

    lowpass: an orthogonal wavelet's filter l, with h its high-pass mirror. The pair L = l * rev(l) / 2 and
    H = h * rev(h) / 2 adds up to an impulse. Each further octave comes from spreading all rows by two,
    filtering them with L and giving H to the next row. Returns float64 [NUM_BANDS, taps], low bands first.
    """
    lowpass = np.asarray(lowpass, dtype=np.float64)
    highpass = lowpass * (-1.0) ** np.arange(lowpass.size)
    low, high = [np.convolve(f, f[::-1]) / 2 for f in (lowpass, highpass)]
    rows = np.eye(NUM_BANDS, 1)
    for band in range(1, NUM_BANDS):
        spread = np.zeros([NUM_BANDS, 2 * rows.shape[1] - 1])
        spread[:, ::2] = rows
        rows = np.stack([np.convolve(row, low) for row in spread])
        start = (rows.shape[1] - high.size) // 2
        rows[band, start : start + high.size] += high
    return rows


def _by_axis(images, operator, margin_x, margin_y):
    """operator(images, margin_x, margin_y), a separable linear one.

    Small images on a CPU are multiplied by the operator's two matrices, which are what it makes of the unit
    matrix: several times faster than convolutions of three channels, and the same up to rounding.
    """
    height, width = images.shape[2:]
    if images.device.type != "cpu" or max(height, width) > MATRIX_LIMIT:
        return operator(images, margin_x, margin_y)
    along_x = operator(torch.eye(width, dtype=images.dtype)[None, None], margin_x, None)[0, 0]  # [W,W']
    along_y = operator(torch.eye(height, dtype=images.dtype)[None, None], None, margin_y)[0, 0]  # [H',H]
    return along_y.matmul(images.matmul(along_x))


class _Dice:
    """Random values, one or `size` a sample: [N] or [N, size]. Each throw draws the value, then its gate.

    Where a fresh U(0,1) is not below `strength`, the sample gets the value that changes nothing. With a
    percentile (for tests, pictures) numbers are drawn all the same, but all samples get that one.
    """

    def __init__(self, images, percentile):
        self.num, self.device = images.shape[0], images.device
        self.fixed = percentile is not None
        self.q = float(percentile) if self.fixed else 0.5
        self.normal_q = self.erfinv(2 * self.q - 1)

    @staticmethod
    def erfinv(x):
        return float(torch.erfinv(torch.as_tensor(float(x))))

    def _shape(self, size):
        return [self.num] if size is None else [self.num, size]

    def _gated(self, value, strength, neutral, at_percentile):
        fires = torch.rand([self.num] + [1] * (value.ndim - 1), device=self.device) < strength
        if self.fixed:
            return torch.full_like(value, at_percentile)
        return torch.where(fires, value, torch.full_like(value, neutral))

    def choice(self, sides, strength):
        """0, 1, ... sides-1."""
        value = torch.floor(torch.rand([self.num], device=self.device) * sides)
        return self._gated(value, strength, 0, math.floor(self.q * sides))

    def uniform(self, limit, strength, size=None):
        """Between -limit and limit."""
        value = (torch.rand(self._shape(size), device=self.device) * 2 - 1) * limit
        return self._gated(value, strength, 0, (self.q * 2 - 1) * limit)

    def normal(self, std, strength, size=None):
        """Gaussian."""
        value = torch.randn(self._shape(size), device=self.device) * std
        return self._gated(value, strength, 0, self.normal_q * std)

    def factor(self, std, strength):
        """Two to the power of a Gaussian."""
        value = torch.exp2(torch.randn([self.num], device=self.device) * std)
        return self._gated(value, strength, 1, 2 ** (self.normal_q * std))

    def magnitude(self, std, strength):
        """Absolute value of a Gaussian."""
        value = torch.randn([self.num], device=self.device).abs() * std
        return self._gated(value, strength, 0, self.erfinv(self.q) * std)

    def present(self, size, strength):
        """The given size, or 0 (no value is drawn, only the gate)."""
        return self._gated(torch.full([self.num], float(size), device=self.device), strength, 0, size)

    def place(self):
        """A point in the unit square, [N, 2]; no gate."""
        value = torch.rand([self.num, 2], device=self.device)
        return torch.full_like(value, self.q) if self.fixed else value


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    """Random transforms. A strength of 0 turns a transform off, 1 applies it with probability `p`.

    The settings with a suffix say how far a transform may go: xint_max, xfrac_std, cutout_size as shares of
    the image; scale_std, aniso_std, contrast_std, saturation_std, imgfilter_std in octaves; rotate_max and
    hue_max as shares of 180 degrees; brightness_std, noise_std in pixel values. imgfilter_bands: a strength
    for each band. `p` is a buffer, which the adaptive controller sets. rotate90 turns pictures that are not
    square by half turns only, which keep them in their frame.
    """

    def __init__(
        self,
        xflip=0, rotate90=0, xint=0, xint_max=0.125,
        scale=0, rotate=0, aniso=0, xfrac=0, scale_std=0.2, rotate_max=1, aniso_std=0.2, xfrac_std=0.125,
        brightness=0, contrast=0, lumaflip=0, hue=0, saturation=0,
        brightness_std=0.2, contrast_std=0.5, hue_max=1, saturation_std=1,
        imgfilter=0, imgfilter_bands=(1, 1, 1, 1), imgfilter_std=1,
        noise=0, cutout=0, noise_std=0.1, cutout_size=0.5,
    ):  # fmt: skip
        super().__init__()
        settings = dict(
            xflip=xflip, rotate90=rotate90, xint=xint, xint_max=xint_max,
            scale=scale, rotate=rotate, aniso=aniso, xfrac=xfrac,
            scale_std=scale_std, rotate_max=rotate_max, aniso_std=aniso_std, xfrac_std=xfrac_std,
            brightness=brightness, contrast=contrast, lumaflip=lumaflip, hue=hue, saturation=saturation,
            brightness_std=brightness_std, contrast_std=contrast_std,
            hue_max=hue_max, saturation_std=saturation_std, imgfilter=imgfilter, imgfilter_std=imgfilter_std,
            noise=noise, cutout=cutout, noise_std=noise_std, cutout_size=cutout_size,
        )  # fmt: skip
        for name, value in settings.items():
            setattr(self, name, float(value))
        self.imgfilter_bands = list(imgfilter_bands)
        if len(self.imgfilter_bands) != NUM_BANDS:
            raise ValueError("imgfilter_bands needs %d strengths, got %s" % (NUM_BANDS, self.imgfilter_bands))

        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(wavelets["sym6"]))
        filters = torch.as_tensor(band_filters(wavelets["sym2"]), dtype=torch.float32)
        self.register_buffer("Hz_fbank", filters)

    def forward(self, images, debug_percentile=None):
        """images [N,C,H,W] in [-1,1] -> the same shape, values not clamped.

        C is 3 or 1 where a colour transform is on (ValueError otherwise). debug_percentile: 0..1 puts every
        random value at that percentile of its distribution, for all samples.
        """
        assert isinstance(images, torch.Tensor) and images.ndim == 4, "images must be a tensor [N,C,H,W]"
        dice = _Dice(images, debug_percentile)
        num_channels, height, width = images.shape[1:]

        steps = self._geometric_steps(dice, width, height)
        if steps:
            # Each maps a place in its output to one in its input, so the first transform stands leftmost.
            images = self._resample(images, functools.reduce(torch.matmul, steps))
        steps = self._color_steps(dice, num_channels)
        if steps:
            images = self._recolor(images, functools.reduce(lambda earlier, m: m.matmul(earlier), steps))
        if self.imgfilter > 0:
            images = self._filter(images, self._band_gains(dice))
        if self.noise > 0:
            sigma = dice.magnitude(self.noise_std, self.noise * self.p).reshape(-1, 1, 1, 1)
            images = images + torch.randn(images.shape, device=images.device) * sigma
        if self.cutout > 0:
            images = self._cut_out(images, dice)
        return images

    def _geometric_steps(self, dice, width, height):
        """Matrices [N,3,3] from output to input places, in pixels from the centre; first transform first."""
        steps = []
        if self.xflip > 0:
            steps.append(scale2d_inv(1 - 2 * dice.choice(2, self.xflip * self.p), 1))
        if self.rotate90 > 0:
            quarters = 4 if width == height else 2  # in another frame a quarter turn would lose content
            turns = dice.choice(quarters, self.rotate90 * self.p) * (4 // quarters)
            steps.append(rotate2d_inv(turns * (-math.pi / 2)))
        if self.xint > 0:
            t = dice.uniform(self.xint_max, self.xint * self.p, size=2)
            steps.append(translate2d_inv(torch.round(t[:, 0] * width), torch.round(t[:, 1] * height)))
        if self.scale > 0:
            s = dice.factor(self.scale_std, self.scale * self.p)
            steps.append(scale2d_inv(s, s))
        if self.rotate > 0:
            steps.append(rotate2d_inv(-self._turn(dice)))
        if self.aniso > 0:
            s = dice.factor(self.aniso_std, self.aniso * self.p)
            steps.append(scale2d_inv(s, 1 / s))
        if self.rotate > 0:
            theta = self._turn(dice)
            steps.append(rotate2d_inv(theta * 0 if dice.fixed else -theta))  # a percentile turns only once
        if self.xfrac > 0:
            t = dice.normal(self.xfrac_std, self.xfrac * self.p, size=2)
            steps.append(translate2d_inv(t[:, 0] * width, t[:, 1] * height))
        return steps

    def _turn(self, dice):
        """Angles of one of the two rotations, of which at least one happens with probability rotate * p."""
        none = torch.clamp(1 - self.rotate * self.p, 0, 1)
        return dice.uniform(math.pi * self.rotate_max, 1 - torch.sqrt(none))

    def _resample(self, images, to_input):
        """Carries out a geometric transform: reflect the borders, double the resolution, look up, halve it.

        to_input [N,3,3] maps a place in the output to one in the input, in pixels from the centre.
        """
        if torch.equal(to_input, torch.eye(3, device=images.device).expand_as(to_input)):
            return images
        height, width = images.shape[2:]
        pad = self.Hz_geom.shape[0] // 4
        left, top, right, bottom = self._margins(to_input, width, height, 2 * pad)
        in_width, in_height = width + left + right, height + top + bottom
        images = _by_axis(images, self._doubled, [left, right], [top, bottom])

        # Place x of the coarse grid is 2x - 1/2 on the doubled one, both counted in pixels from the centre,
        # because doubling puts new samples behind old ones. affine_grid counts in half widths.
        half_w, half_h = in_width / 2, in_height / 2
        shift_x, shift_y = (left - right) / 2 - 0.25, (top - bottom) / 2 - 0.25
        normalize = to_input.new_tensor(
            [[1 / half_w, 0, shift_x / half_w], [0, 1 / half_h, shift_y / half_h], [0, 0, 1]]
        )
        out_width, out_height = width + 2 * pad, height + 2 * pad
        denormalize = matrix(
            [out_width / 2, 0, 0.25], [0, out_height / 2, 0.25], [0, 0, 1], device=images.device
        )
        theta = normalize.matmul(to_input).matmul(denormalize)[:, :2].to(images.dtype)
        shape = [images.shape[0], images.shape[1], 2 * out_height, 2 * out_width]
        grid = torch.nn.functional.affine_grid(theta, shape, align_corners=False)
        images = grid_sample_gradfix.grid_sample(images, grid)
        return _by_axis(images, self._halved, [-2 * pad] * 2, [-2 * pad] * 2)

    def _doubled(self, x, margin_x, margin_y):
        """Reflects the borders and doubles the resolution, along the axes whose margin is given."""
        x = torch.nn.functional.pad(x, (margin_x or [0, 0]) + (margin_y or [0, 0]), mode="reflect")
        f, up = self._filter_along(margin_x, margin_y)
        return upfirdn2d.upsample2d(x=x, f=f, up=up)

    def _halved(self, x, margin_x, margin_y):
        """Halves the resolution and adds the margin (negative: cuts), along the axes where it is given."""
        f, down = self._filter_along(margin_x, margin_y)
        padding = (margin_x or [0, 0]) + (margin_y or [0, 0])
        return upfirdn2d.downsample2d(x=x, f=f, down=down, padding=padding, flip_filter=True)

    def _filter_along(self, x, y):
        """The resampling filter and the factors [x, y] for both axes, or for the one that is not None."""
        if x and y:
            return self.Hz_geom, [2, 2]
        return (self.Hz_geom[None, :], [2, 1]) if x else (self.Hz_geom[:, None], [1, 2])

    @staticmethod
    def _margins(to_input, width, height, reach):
        """Pixels [left, top, right, bottom] by which corners, and filters around them, leave the image."""
        cx, cy = (width - 1) / 2, (height - 1) / 2
        slack = misc.constant([reach - cx, reach - cy] * 2, device=to_input.device)
        limit = misc.constant([width - 1, height - 1] * 2, device=to_input.device)  # all that reflection has
        corners = matrix([-cx, cx, cx, -cx], [-cy, -cy, cy, cy], [1, 1, 1, 1], device=to_input.device)
        places = to_input.matmul(corners)[:, :2]  # [N, xy, corner]
        farthest = torch.cat([-places, places], dim=1).amax(dim=(0, 2))
        margins = torch.min((farthest + slack).clamp(min=0), limit).ceil()
        return [int(margin) for margin in margins.tolist()]

    def _color_steps(self, dice, num_channels):
        """Matrices [N,4,4] on homogeneous colours, the first transform first."""
        steps = []
        identity = misc.constant(np.eye(4), device=dice.device)
        luma = misc.constant(np.outer(GREY_AXIS, GREY_AXIS), device=dice.device)  # projects onto grey
        if self.brightness > 0:
            b = dice.normal(self.brightness_std, self.brightness * self.p)
            steps.append(translate3d(b, b, b))
        if self.contrast > 0:
            c = dice.factor(self.contrast_std, self.contrast * self.p)
            steps.append(scale3d(c, c, c))
        if self.lumaflip > 0:
            flip = dice.choice(2, self.lumaflip * self.p).reshape(-1, 1, 1)
            steps.append(identity - 2 * luma * flip)
        if self.hue > 0 and num_channels > 1:
            steps.append(rotate3d(GREY_AXIS, dice.uniform(math.pi * self.hue_max, self.hue * self.p)))
        if self.saturation > 0 and num_channels > 1:
            s = dice.factor(self.saturation_std, self.saturation * self.p).reshape(-1, 1, 1)
            steps.append(luma + (identity - luma) * s)
        return steps

    @staticmethod
    def _recolor(images, colors):
        """Applies [N,4,4] to the colours; a single channel counts as three equal ones, then averaged."""
        num, num_channels, height, width = images.shape
        colors = colors.to(images.dtype)
        if num_channels == 3:
            linear, offset = colors[:, :3, :3], colors[:, :3, 3:]
        elif num_channels == 1:
            row = colors[:, :3].mean(dim=1, keepdim=True)  # [N,1,4]
            linear, offset = row[:, :, :3].sum(dim=2, keepdim=True), row[:, :, 3:]
        else:
            raise ValueError("Image must be RGB (3 channels) or L (1 channel)")
        pixels = images.reshape(num, num_channels, height * width)
        return torch.baddbmm(offset, linear, pixels).reshape(images.shape)

    def _band_gains(self, dice):
        """Random amplification of each band of the spectrum, keeping the expected power: [N, NUM_BANDS]."""
        power = misc.constant(BAND_POWER, device=dice.device)
        factors = []
        for strength in self.imgfilter_bands:
            t = dice.factor(self.imgfilter_std, self.imgfilter * self.p * strength)
            factors.append(torch.ones_like(t) if dice.fixed and strength <= 0 else t)
        factors = torch.stack(factors, dim=1)
        # Amplifying band k by t alone changes the power to 1 + power_k (t^2 - 1).
        change = 1 + power * (factors.square() - 1)
        return factors / change.prod(dim=1, keepdim=True).sqrt()

    def _filter(self, images, gains):
        """Filters each image along both axes with its own mixture [N, NUM_BANDS] of the filter bank."""
        num, num_channels, height, width = images.shape
        reach = self.Hz_fbank.shape[1] // 2
        if min(height, width) <= reach:
            size = "%dx%d" % (width, height)
            raise ValueError("imgfilter needs images of more than %d pixels a side, got %s" % (reach, size))
        taps = gains.matmul(self.Hz_fbank).to(images.dtype)
        taps = taps.repeat_interleave(num_channels, dim=0)  # [N*C, taps]
        x = torch.nn.functional.pad(images, [reach] * 4, mode="reflect")
        x = x.reshape([1, num * num_channels] + list(x.shape[2:]))
        x = conv2d_gradfix.conv2d(input=x, weight=taps[:, None, None, :], groups=num * num_channels)
        x = conv2d_gradfix.conv2d(input=x, weight=taps[:, None, :, None], groups=num * num_channels)
        return x.reshape(images.shape)

    def _cut_out(self, images, dice):
        """Blackens (sets to 0) a rectangle of cutout_size times the image at a random place."""
        size = dice.present(self.cutout_size, self.cutout * self.p).reshape(-1, 1)
        center = dice.place()
        keep = []
        for axis, length in enumerate([images.shape[3], images.shape[2]]):
            place = (torch.arange(length, device=images.device) + 0.5) / length
            keep.append((place - center[:, axis : axis + 1]).abs() >= size / 2)  # [N, length]
        mask = keep[0][:, None, None, :] | keep[1][:, None, :, None]
        return images * mask.to(images.dtype)
