# SPDX-License-Identifier: Apache-2.0
"""Augmentation against golden numbers, closed forms, invariances and finite differences."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from training import augment
from training.augment import AugmentPipe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "augment.npz")
SPECS = json.loads(str(GOLDEN["specs"]))
GEOMETRIC = ["xflip", "rotate90", "xint", "scale", "rotate", "aniso", "xfrac"]
COLOR = ["brightness", "contrast", "lumaflip", "hue", "saturation"]
LATE = ["imgfilter", "noise", "cutout"]
REPEATABLE = [name for name in GEOMETRIC + COLOR + LATE if name != "noise"]


def pipe_of(*names, p=1.0, **settings):
    pipe = AugmentPipe(**dict.fromkeys(names, 1), **settings)
    pipe.p.fill_(p)
    return pipe


def pictures(*shape, seed=0, dtype=torch.float32):
    """Smooth random images, so that resampling errors stay small."""
    noise = torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, shape)).to(dtype)
    return torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)


def erfinv(x):
    return float(torch.erfinv(torch.tensor(x, dtype=torch.float64)))


@pytest.fixture(params=["matrices", "convolutions"])
def route(request, monkeypatch):
    if request.param == "convolutions":
        monkeypatch.setattr(augment, "MATRIX_LIMIT", 0)


# Numbers of the reference implementation.


@pytest.mark.parametrize("case", [name for name in GOLDEN.files if name not in ("specs", "images")])
def test_golden_percentiles(case, route):
    spec, percentile = case.split(".", 1)
    out = AugmentPipe(**SPECS[spec])(torch.from_numpy(GOLDEN["images"]), debug_percentile=float(percentile))
    expected = torch.from_numpy(GOLDEN[case])
    assert (out - expected).norm() <= 1e-5 * expected.norm()


# transform: (sum, mean |x|, first value, last value) at percentile 0.7, for the ramp below
PUBLISHED = {
    "xflip": (-0.1773, 0.50008, -0.98991, 0.98991),
    "rotate90": (-5.85097, 0.50008, -0.66717, 0.66717),
    "xint": (-119.64445, 0.50008, -0.97851, 0.97851),
    "scale": (-0.13473, 0.50008, -0.99231, 0.99242),
    "rotate": (0.56612, 0.50008, -0.94988, 0.94956),
    "aniso": (0.13942, 0.50008, -0.99192, 0.99203),
    "xfrac": (-90.35305, 0.50008, -0.9835, 0.9835),
    "brightness": (455.64779, 0.50283, -0.92584, 1.07416),
    "contrast": (0, 0.56866, -1.13714, 1.13714),
    "lumaflip": (0, 0.50008, 0.33322, -0.33322),
    "hue": (0, 0.50062, -0.58657, 0.9527),
    "saturation": (0, 0.50963, -1.09771, 1.09771),
    "imgfilter": (0, 0.47385, -0.94755, 0.94755),
    "cutout": (-99.01611, 0.37506, -1, 1),
}
PUBLISHED_TOGETHER = {
    0.1: (-657.69244, 0.24243, 0, 0.0392),
    0.5: (4.10123, 0.37506, 0.01048, -0.01048),
    0.7: (-650.93545, 0.43374, 0.46294, -0.05435),
    0.9: (-787.95224, 0.47078, 1.10924, 0),
}


def ramp():
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def assert_published(out, expected):
    got = [out.sum(), out.abs().mean(), out[0, 0, 0, 0], out[-1, -1, -1, -1]]
    np.testing.assert_allclose(float(got[0]), expected[0], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose([float(value) for value in got[1:]], expected[1:], rtol=0, atol=1.1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_percentile_of_each_transform(name):
    assert_published(pipe_of(name)(ramp(), debug_percentile=0.7), PUBLISHED[name])


@pytest.mark.parametrize("percentile", PUBLISHED_TOGETHER)
def test_published_percentiles_of_all_together(percentile):
    out = pipe_of(*REPEATABLE)(ramp(), debug_percentile=percentile)
    assert_published(out, PUBLISHED_TOGETHER[percentile])


def test_published_random_run_holds_the_order_of_draws():
    torch.manual_seed(3)
    assert_published(pipe_of(*REPEATABLE)(ramp()), (-2206.282, 0.45357, 0.00071, -0.22058))


# Filters.


@pytest.mark.parametrize("name", augment.wavelets)
def test_wavelets_are_orthonormal_with_all_their_vanishing_moments(name):
    h = np.array(augment.wavelets[name])
    moments = 1 if name == "haar" else int(name.lstrip("dbsym"))
    assert h.size == 2 * moments and abs(h.sum() - math.sqrt(2)) < 1e-14
    for shift in range(moments):
        assert abs(h[2 * shift :] @ h[: h.size - 2 * shift] - (shift == 0)) < 1e-14
    signs = (-1.0) ** np.arange(h.size)
    place = np.linspace(-1, 1, h.size)
    assert max(abs((h * signs * place**k).sum()) for k in range(moments)) < 1e-14


def test_wavelet_families_differ_in_phase():
    for order in range(4, 9):
        db, sym = (np.array(augment.wavelets[f"{kind}{order}"]) for kind in ("db", "sym"))
        np.testing.assert_allclose(abs(np.fft.fft(db)), abs(np.fft.fft(sym)), atol=1e-12)
        assert np.abs(np.convolve(sym, sym)).max() > np.abs(np.convolve(db, db)).max()  # nearer to symmetric
        zeros = np.roots(db)
        assert (abs(zeros[abs(zeros + 1) > 0.2]) > 1).all()  # extremal: all on one side of the circle
    assert augment.wavelets["sym2"] == augment.wavelets["db2"]
    assert augment.wavelets["haar"] == augment.wavelets["db1"] == [math.sqrt(0.5)] * 2


def test_filter_bank_splits_the_spectrum():
    bank = augment.band_filters(augment.wavelets["sym2"])
    assert bank.shape == (4, 43)
    np.testing.assert_allclose(bank.sum(axis=0), np.eye(43)[21], rtol=0, atol=1e-13)
    np.testing.assert_allclose(bank, bank[:, ::-1], rtol=0, atol=1e-13)  # zero phase
    response = np.fft.rfft(np.roll(np.pad(bank, [(0, 0), (0, 85)]), -21, axis=1)).real
    assert response.min() > -1e-12 and response.max() < 1 + 1e-12
    np.testing.assert_allclose(response[:, 0], [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(response[:, -1], [0, 0, 0, 1], atol=1e-12)
    pipe = AugmentPipe()
    np.testing.assert_allclose(pipe.Hz_fbank, bank, atol=1e-7)
    assert pipe.Hz_geom.shape == (12,) and abs(float(pipe.Hz_geom.sum()) - 1) < 1e-6


# Nothing, where nothing should happen.


@pytest.mark.parametrize("name", GEOMETRIC + COLOR + LATE)
def test_identity_at_p_zero(name):
    x = pictures(4, 3, 32, 32)
    torch.manual_seed(1)
    torch.testing.assert_close(pipe_of(name, p=0)(x), x, rtol=0, atol=1e-6)


def test_without_transforms_the_images_come_back():
    x = pictures(2, 5, 8, 8)
    assert AugmentPipe()(x) is x


def test_draws_do_not_depend_on_p_or_on_the_percentile():
    states = []
    for p, percentile in [(0, None), (0.5, None), (1, None), (1, 0.3)]:
        torch.manual_seed(2)
        pipe_of(*GEOMETRIC, *COLOR, *LATE, p=p)(pictures(3, 3, 24, 24), debug_percentile=percentile)
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_resampling_leaves_untouched_images_as_they_are(route):
    """Only image 0 turns (by an eighth): the others pass through all filters and come back."""
    x = pictures(3, 3, 16, 16)
    turn = augment.rotate2d(torch.tensor([math.pi / 4, 0, 0]))
    out = AugmentPipe()._resample(x, turn)
    torch.testing.assert_close(out[1:], x[1:], rtol=0, atol=1e-6)
    assert (out[0] - x[0]).abs().mean() > 0.05


# Closed forms, at percentiles that make the values simple.


def assert_near(out, expected):
    """Equal but for what the slight asymmetry of the sym6 filter leaves, met backwards by mirrored images."""
    assert (out - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 12, 20)])
def test_xflip_mirrors(shape, route):
    x = pictures(*shape)
    assert_near(pipe_of("xflip")(x, debug_percentile=0.7), x.flip(3))


@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_rotate90_turns_by_quarters(quarter, route):
    x = pictures(2, 3, 16, 16)
    out = pipe_of("rotate90")(x, debug_percentile=quarter / 4 + 0.1)
    assert_near(out, torch.rot90(x, quarter, dims=[2, 3]))


def test_rotate90_turns_other_frames_by_halves(route):
    x = pictures(2, 3, 12, 20)
    pipe = pipe_of("rotate90")
    assert torch.equal(pipe(x, debug_percentile=0.4), x)
    assert_near(pipe(x, debug_percentile=0.6), x.flip([2, 3]))
    torch.manual_seed(0)
    made = pipe(torch.cat([x] * 8))  # no quarter turns among random ones
    kinds = torch.stack(
        [(made - torch.cat([each] * 8)).flatten(1).norm(dim=1) for each in (x, x.flip([2, 3]))]
    )
    assert (kinds.amin(dim=0) < 0.1 * x[0].norm()).all() and kinds.argmin(dim=0).unique().numel() == 2


def test_xint_shifts_by_whole_pixels_and_reflects(route):
    x = pictures(2, 3, 16, 24)
    out = pipe_of("xint")(x, debug_percentile=0.9)  # 0.8 * 0.125 = a tenth: 2.4 -> 2 right, 1.6 -> 2 down
    expected = torch.nn.functional.pad(x, [2, 0, 2, 0], mode="reflect")[:, :, :16, :24]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("percentile", [0.3, 0.7])
def test_geometry_keeps_plain_images(name, percentile, route):
    x = torch.full([1, 3, 16, 16], 0.5)
    torch.testing.assert_close(pipe_of(name)(x, debug_percentile=percentile), x, rtol=0, atol=1e-5)


def test_scaling_up_and_down_again_blurs_little():
    x = pictures(2, 3, 32, 32)
    large = pipe_of("scale", scale_std=1)(x, debug_percentile=0.7)
    back = pipe_of("scale", scale_std=1)(large, debug_percentile=0.3)[:, :, 8:24, 8:24]
    assert (back - x[:, :, 8:24, 8:24]).abs().mean() < 0.1 * x.std()


def test_color_transforms():
    x = pictures(2, 3, 8, 8)
    luma = x.mean(dim=1, keepdim=True)
    g = erfinv(0.4)  # of percentile 0.7

    def at(name):
        return pipe_of(name)(x, debug_percentile=0.7)

    torch.testing.assert_close(at("brightness"), x + 0.2 * g)
    torch.testing.assert_close(at("contrast"), x * 2 ** (0.5 * g))
    torch.testing.assert_close(at("lumaflip"), x - 2 * luma)
    torch.testing.assert_close(at("saturation"), luma + (x - luma) * 2**g)
    turned = at("hue")  # keeps luma and chroma, and turns the colour by 0.4 of a half circle
    torch.testing.assert_close(turned.mean(dim=1, keepdim=True), luma)
    before, after = x - luma, turned - luma
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    cosine = (before * after).sum(dim=1) / before.square().sum(dim=1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(0.4 * math.pi)), rtol=0, atol=1e-4)


def test_hue_turns_red_to_green_to_blue():
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
    out = pipe_of("hue")(red, debug_percentile=5 / 6)  # a third of a circle
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 1, 0]), rtol=0, atol=1e-6)


def test_grey_images_are_transformed_like_rgb_with_equal_channels():
    x = pictures(4, 1, 8, 8)
    names = ["brightness", "contrast", "lumaflip"]
    for percentile in (0.2, 0.7):
        grey = pipe_of(*COLOR)(x, debug_percentile=percentile)
        rgb = pipe_of(*names)(x.repeat(1, 3, 1, 1), debug_percentile=percentile)
        torch.testing.assert_close(grey, rgb.mean(dim=1, keepdim=True))


def test_other_channel_counts_are_refused_by_color_only():
    x = pictures(2, 2, 8, 8)
    with pytest.raises(ValueError, match=r"^Image must be RGB \(3 channels\) or L \(1 channel\)$"):
        pipe_of("contrast")(x)
    assert pipe_of("xflip", "cutout")(x).shape == x.shape


def test_imgfilter_scales_each_band():
    x = torch.full([1, 1, 22, 30], 0.5)
    t = 2 ** erfinv(0.4)
    gain = t / math.sqrt(1 + 10 / 13 * (t**2 - 1))
    out = pipe_of("imgfilter", imgfilter_bands=[1, 0, 0, 0])(x, debug_percentile=0.7)
    torch.testing.assert_close(out, x * gain**2)  # along x and along y
    checks = torch.ones([1, 1, 24, 24])
    checks[:, :, ::2, 1::2] = checks[:, :, 1::2, ::2] = -1
    gain = t / math.sqrt(1 + 1 / 13 * (t**2 - 1))
    out = pipe_of("imgfilter", imgfilter_bands=[0, 0, 0, 1])(checks, debug_percentile=0.7)
    torch.testing.assert_close(out, checks * gain**2)
    median = pipe_of("imgfilter")(pictures(2, 3, 24, 24), debug_percentile=0.5)
    torch.testing.assert_close(median, pictures(2, 3, 24, 24), rtol=0, atol=1e-6)


def test_imgfilter_mistakes_say_why():
    with pytest.raises(ValueError, match="more than 21 pixels a side, got 32x21"):
        pipe_of("imgfilter")(torch.zeros([1, 3, 21, 32]))
    with pytest.raises(ValueError, match=r"needs 4 strengths, got \[1, 1\]"):
        AugmentPipe(imgfilter_bands=[1, 1])


def test_noise_has_the_strength_asked_for():
    torch.manual_seed(4)
    out = pipe_of("noise")(torch.zeros([2, 3, 64, 64]), debug_percentile=0.5)
    sigma = erfinv(0.5) * 0.1
    assert abs(float(out.std()) / sigma - 1) < 0.03 and abs(float(out.mean())) < 0.03 * sigma


def test_cutout_blackens_a_rectangle():
    out = pipe_of("cutout", cutout_size=0.25)(torch.ones([2, 3, 8, 16]), debug_percentile=0.5)
    expected = torch.ones([8, 16])
    expected[3:5, 6:10] = 0
    torch.testing.assert_close(out, expected.expand(2, 3, 8, 16))


def test_samples_do_not_see_each_other():
    x = pictures(3, 3, 24, 24)
    pipe = pipe_of(*REPEATABLE)
    together = pipe(x, debug_percentile=0.6)
    alone = torch.cat([pipe(image, debug_percentile=0.6) for image in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


# Probabilities.


@pytest.mark.parametrize("name, share", [("brightness", 1), ("rotate", 1), ("lumaflip", 0.5), ("cutout", 1)])
def test_each_transform_fires_with_probability_p(name, share):
    torch.manual_seed(5)
    num, p = 3000, 0.3
    x = pictures(1, 3, 6, 6).expand(num, -1, -1, -1)
    changed = ((pipe_of(name, p=p)(x) - x).abs() > 1e-4).flatten(1).any(dim=1)
    expected = p * share
    assert abs(float(changed.float().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / num)


def test_strength_multiplies_p():
    torch.manual_seed(6)
    x = torch.zeros([3000, 1, 1, 1])
    pipe = AugmentPipe(brightness=0.5)
    pipe.p.fill_(0.4)
    assert abs(float((pipe(x) != 0).float().mean()) - 0.2) < 0.03


# Gradients.


def fixed(pipe, seed=7):
    """The pipe as a function of the images alone."""

    def run(x):
        torch.manual_seed(seed)
        return pipe(x)

    return run


ALL = [*GEOMETRIC, *COLOR, *LATE]


@pytest.mark.parametrize("names", [GEOMETRIC, COLOR, ["imgfilter"], ["noise"], ["cutout"], ALL])
def test_gradient_is_the_transpose(names, route):
    """For given random values the pipe f is affine, so that <w, f(x+v) - f(x)> = <grad <w, f(x)>, v>."""
    run = fixed(pipe_of(*names, p=0.8))
    x, v, w = (pictures(3, 3, 24, 24, seed=s, dtype=torch.float64) for s in range(3))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad((w * run(x)).sum(), x)
    torch.testing.assert_close((gradient * v).sum(), (w * (run(x + v) - run(x))).sum())


def test_second_order_gradient_through_the_pipe(route):
    """R1: the squared norm of an image gradient taken through the pipe, differentiated once more."""
    run = fixed(pipe_of(*ALL, p=0.8))
    x, v = (pictures(2, 3, 24, 24, seed=s, dtype=torch.float64) for s in range(2))

    def penalty(x, weight, create_graph=False):
        x = x.detach().requires_grad_(True) if not x.requires_grad else x
        score = (weight * run(x)).tanh().sum()
        (gradient,) = torch.autograd.grad(score, x, create_graph=create_graph)
        return gradient.square().sum()

    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs = [x.clone().requires_grad_(True), weight]
    d_x, d_weight = torch.autograd.grad(penalty(*inputs, create_graph=True), inputs)
    eps = 1e-5
    along_v = (penalty(x + eps * v, weight) - penalty(x - eps * v, weight)) / (2 * eps)
    torch.testing.assert_close((d_x * v).sum(), along_v.detach(), rtol=1e-6, atol=1e-8)
    along_weight = (penalty(x, weight + eps) - penalty(x, weight - eps)) / (2 * eps)
    torch.testing.assert_close(d_weight, along_weight.detach(), rtol=1e-6, atol=1e-8)


def test_both_resampling_routes_agree(monkeypatch):
    x = pictures(2, 3, 16, 20)
    pipe = pipe_of(*GEOMETRIC)
    results = []
    for limit in (augment.MATRIX_LIMIT, 0):
        monkeypatch.setattr(augment, "MATRIX_LIMIT", limit)
        leaf = x.clone().requires_grad_(True)
        out = fixed(pipe)(leaf)
        (gradient,) = torch.autograd.grad(out.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), leaf)
        results.append((out, gradient, second))
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).norm() <= 1e-5 * plain.norm()


# Matrices.


def test_matrices_compose_and_invert():
    angle, s, t = torch.tensor([0.3, -1.2]), torch.tensor([0.5, 3.0]), torch.tensor([2.0, -0.25])
    eye = torch.eye(3).expand(2, 3, 3)
    torch.testing.assert_close(augment.rotate2d(angle) @ augment.rotate2d_inv(angle), eye)
    torch.testing.assert_close(augment.scale2d(s, t) @ augment.scale2d_inv(s, t), eye)
    torch.testing.assert_close(augment.translate2d(s, t) @ augment.translate2d_inv(s, t), eye)
    torch.testing.assert_close(augment.rotate2d(angle) @ augment.rotate2d(angle), augment.rotate2d(2 * angle))
    torch.testing.assert_close(augment.scale2d(2, 0.5), torch.diag(torch.tensor([2, 0.5, 1])))
    axis = [2 / 3, -1 / 3, 2 / 3]
    generator = torch.tensor([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turned = augment.rotate3d(axis, angle)
    for i in range(2):  # a rotation is the exponential of its generator
        torch.testing.assert_close(turned[i, :3, :3], torch.linalg.matrix_exp(generator * angle[i]))
    point = torch.tensor([1.0, 2, 3, 1])
    torch.testing.assert_close(augment.translate3d(1, 0, -1) @ point, torch.tensor([2.0, 2, 2, 1]))
    torch.testing.assert_close(augment.scale3d(2, 1, -1) @ point, torch.tensor([2.0, 2, -3, 1]))
    assert augment.matrix([s, 0], [1, t]).shape == (2, 2, 2)


# What goes into snapshots.


def test_pickled_pipe_is_the_same_pipe():
    pipe = pipe_of(*ALL, p=0.37, noise_std=0.05)
    x = pictures(2, 3, 24, 24)
    for clone in (pickle.loads(pickle.dumps(pipe, protocol=4)), copy.deepcopy(pipe)):
        assert float(clone.p) == float(pipe.p)
        assert torch.equal(fixed(clone)(x), fixed(pipe)(x))
        assert clone.init_kwargs == pipe.init_kwargs


def test_settings_are_plain_numbers():
    pipe = AugmentPipe(xflip=np.float64(1), scale_std=1)
    for name, value in vars(pipe).items():
        if name in PUBLISHED or name.endswith(("_std", "_max", "_size")):
            assert type(value) is float, name
    assert pipe.imgfilter_bands == [1, 1, 1, 1]
    assert set(pipe.state_dict()) == {"p", "Hz_geom", "Hz_fbank"} and not list(pipe.parameters())
    assert (pipe.xint_max, pipe.scale_std, pipe.cutout_size) == (0.125, 1.0, 0.5)
    with pytest.raises(TypeError, match="xflop"):
        AugmentPipe(xflop=1)
