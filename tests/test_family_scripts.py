# SPDX-License-Identifier: Apache-2.0
"""Scripts that know the StyleGAN2 family and nothing of SSNs, run unchanged on a snapshot of either.

Every test gets the path of a snapshot and uses only what the family promises: pickle, dnnlib, torch_utils, and the
calls and attributes of G and D. What is expected follows from other promises (the same picture by another way), so
that nothing here depends on the kind of network.
"""

import copy
import io
import multiprocessing
import operator
import pickle
import re

import numpy as np
import PIL.Image
import pytest
import torch

import dnnlib
from ssn_ext.networks import SpatialGenerator
from torch_utils import misc
from training.augment import AugmentPipe
from training.networks import Discriminator, Generator
from training.snapshot import save_network_pkl

SIZE = dict(img_resolution=16, img_channels=3)
WIDTHS = dict(channel_base=128, channel_max=16)
ENCODER = dict(encoder_kwargs=dict(channels=4, max_resolution=8))
MAKERS = {
    "plain": lambda **kwargs: Generator(
        **dict(dict(z_dim=16, w_dim=16, synthesis_kwargs=dict(WIDTHS)), **kwargs),
    ),
    "SSN": lambda **kwargs: SpatialGenerator(
        **dict(
            dict(z_dim=32, w_dim=64, latent_grid=[2, 2], synthesis_kwargs=dict(WIDTHS, **ENCODER)), **kwargs
        ),
    ),
    "SSN of two grids": lambda **kwargs: SpatialGenerator(
        **dict(
            dict(z_dim=20 * 4, w_dim=20 * 8, latent_grids=[[2, 2], [4, 4]], grid_splits=[8]),
            synthesis_kwargs=dict(WIDTHS, **ENCODER),
            **kwargs,
        ),
    ),
}
pytestmark = pytest.mark.parametrize("kind", MAKERS)


def made(kind, seed=0, c_dim=0, **kwargs):
    """A generator whose noise, average and encoder are not zero."""
    torch.manual_seed(seed)
    G = MAKERS[kind](c_dim=c_dim, **SIZE, mapping_kwargs=dict(num_layers=2), **kwargs)
    with torch.no_grad():
        for name, tensor in misc.named_params_and_buffers(G):
            if name.endswith(("noise_strength", "w_avg")) or "encoder_style" in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.2)
    return G


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """(kind, c_dim) -> network-snapshot-000000.pkl as training writes it."""
    paths = {}
    for kind in MAKERS:
        for c_dim in [0, 3]:
            path = tmp_path_factory.mktemp(kind) / "network-snapshot-000000.pkl"
            torch.manual_seed(1)
            D = Discriminator(c_dim=c_dim, **SIZE, **WIDTHS)
            data = dict(
                class_name="training.dataset.ImageFolderDataset", path="faces.zip", use_labels=c_dim > 0
            )
            networks = dict(
                G=made(kind, 1, c_dim), D=D, G_ema=made(kind, 0, c_dim), augment_pipe=AugmentPipe(xflip=1)
            )
            save_network_pkl(path, **networks, training_set_kwargs=data)
            paths[kind, c_dim] = path
    return paths


@pytest.fixture
def network_pkl(kind, snapshots):
    """A snapshot of unconditional networks."""
    return snapshots[kind, 0]


@pytest.fixture
def G(network_pkl):
    """Its G_ema, by the two lines that everybody writes."""
    with open(network_pkl, "rb") as f:
        return pickle.load(f)["G_ema"]


def latents(G, *seeds):
    """z as the family draws it: float64 [len(seeds),z_dim]."""
    return torch.from_numpy(np.concatenate([np.random.RandomState(s).randn(1, G.z_dim) for s in seeds]))


def assert_close(got, want):
    assert got.shape == want.shape and (got - want).abs().max() <= 1e-4 * want.std()


# --- sampling ---------------------------------------------------------------------------------


def test_sampling(kind, network_pkl, G):
    """The picture of the network that was saved; latents of any float type, c None or of width 0."""
    assert not G.training and not any(p.requires_grad for p in G.parameters())
    z = latents(G, 0, 1)
    img = G(z, None, noise_mode="const")
    assert img.dtype == torch.float32 and list(img.shape) == [
        2,
        G.img_channels,
        G.img_resolution,
        G.img_resolution,
    ]
    assert torch.equal(img, made(kind).eval().requires_grad_(False)(z, None, noise_mode="const"))
    assert torch.equal(img, G(z=z.float(), c=torch.zeros([2, G.c_dim]), noise_mode="const"))
    assert_close(torch.cat([G(one[None], None, noise_mode="const") for one in z]), img)
    assert (img[0] - img[1]).abs().max() > 0.1 * img.std()


def test_sampling_of_a_class(kind, snapshots):
    with open(snapshots[kind, 3], "rb") as f:
        data = pickle.load(f)
    G, D = data["G_ema"], data["D"]
    label = torch.zeros([1, G.c_dim])
    label[:, 2] = 1
    pictures = [G(latents(G, 5), c, truncation_psi=0.7, noise_mode="const") for c in [label, label.flip(1)]]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2 * pictures[0].std()
    assert list(D(pictures[0], label).shape) == [1, 1]


def test_pictures_are_saved(kind, G, tmp_path):
    img = G(latents(G, 3), torch.zeros([1, G.c_dim]), truncation_psi=0.5, noise_mode="const")
    pixels = (img.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    PIL.Image.fromarray(pixels[0].numpy(), "RGB").save(tmp_path / "seed0003.png")
    read = np.asarray(PIL.Image.open(tmp_path / "seed0003.png"))
    assert read.std() > 1 and np.array_equal(read, pixels[0].numpy())


def test_noise_modes(kind, G):
    z = latents(G, 0)

    def picture(mode, seed):
        torch.manual_seed(seed)
        return G(z, None, noise_mode=mode)

    for mode in ["const", "none"]:
        assert torch.equal(picture(mode, 0), picture(mode, 1))
    assert torch.equal(picture("random", 0), picture("random", 0))
    assert not torch.equal(picture("random", 0), picture("random", 1))
    assert not torch.equal(picture("const", 0), picture("none", 0))


def test_nothing_asks_for_the_transforms_of_stylegan3(kind, G):
    """Scripts of that generation set `synthesis.input.transform` wherever there is an `input`."""
    assert not hasattr(G.synthesis, "input")


# --- w ----------------------------------------------------------------------------------------


def test_truncation_by_hand(kind, G):
    z, w_avg = latents(G, 0, 1, 2), G.mapping.w_avg
    ws = G.mapping(z, None)
    assert ws.dtype == torch.float32 and list(ws.shape) == [3, G.num_ws, G.w_dim] == [
        3,
        G.mapping.num_ws,
        G.w_dim,
    ]
    assert list(w_avg.shape) == [G.w_dim]
    assert_close(w_avg + (ws - w_avg) * 0.4, G.mapping(z, None, truncation_psi=0.4))
    by_hand = ws.clone()
    by_hand[:, :2] = w_avg + (ws[:, :2] - w_avg) * 0.4
    cut = G.mapping(z, None, truncation_psi=0.4, truncation_cutoff=2)
    assert_close(by_hand, cut)
    img = G(z, None, truncation_psi=0.4, truncation_cutoff=2, noise_mode="const")
    assert_close(G.synthesis(cut, noise_mode="const"), img)
    assert_close(G.mapping(z, None, truncation_psi=0), w_avg.expand_as(ws))


def test_style_mixing(kind, G):
    """Rows of ws are written into in place; what is mixed in shows, all of it or none."""
    z = torch.from_numpy(np.stack([np.random.RandomState(seed).randn(G.z_dim) for seed in [85, 100]]))
    all_w = G.mapping(z, None)
    all_w = G.mapping.w_avg + (all_w - G.mapping.w_avg) * 0.7
    own = G.synthesis(all_w, noise_mode="const")

    def mixed(styles):
        w, w2 = G.mapping(z, None, truncation_psi=0.7)
        w[styles] = w2[styles]
        return G.synthesis(w[np.newaxis], noise_mode="const")[0]

    assert_close(mixed([]), own[0])
    assert_close(mixed(list(range(G.num_ws))), own[1])
    for styles in [[0, 1], slice(0, 4), range(2, 6)]:
        picture = mixed(styles)
        assert min((picture - img).abs().max() for img in own) > 1e-2 * own.std()


def test_interpolation(kind, G):
    """From picture to picture in w: continuous, and the ends are the ends."""
    z0, z1 = latents(G, 0), latents(G, 1)
    w0, w1 = G.mapping(z0, None), G.mapping(z1, None)
    frames = torch.cat([G.synthesis(w0.lerp(w1, t), noise_mode="const") for t in np.linspace(0, 1, 21)])
    assert_close(frames[0], G(z0, None, noise_mode="const")[0])
    assert_close(frames[-1], G(z1, None, noise_mode="const")[0])
    steps = (frames[1:] - frames[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < 0.3 * (frames[-1] - frames[0]).norm()


def test_projection(kind, G, tmp_path):
    """One w for all layers and the noise maps, optimised against a picture; the file opens as it should."""
    G = copy.deepcopy(G).eval().requires_grad_(False)
    w_samples = G.mapping(torch.from_numpy(np.random.RandomState(123).randn(100, G.z_dim)), None)
    w_samples = w_samples[:, :1, :].cpu().numpy().astype(np.float32)
    w_avg, w_std = np.mean(w_samples, axis=0, keepdims=True), float(w_samples.std())
    target = G(latents(G, 7), None, noise_mode="none")
    noise = {name: buf for name, buf in G.synthesis.named_buffers() if "noise_const" in name}
    assert len(noise) == G.num_ws - 1
    for buf in noise.values():
        buf[:] = torch.randn_like(buf)
        buf.requires_grad = True
    w_opt = torch.tensor(w_avg, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([w_opt, *noise.values()], betas=(0.9, 0.999), lr=0.05)
    torch.manual_seed(0)
    losses = []
    for step in range(60):
        jitter = torch.randn_like(w_opt) * w_std * 0.05 * max(0, 1 - step / 45) ** 2
        ws = (w_opt + jitter).repeat([1, G.mapping.num_ws, 1])
        loss = (target - G.synthesis(ws, noise_mode="const")).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for buf in noise.values():
                buf -= buf.mean()
                buf *= buf.square().mean().rsqrt()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert all(buf.grad.abs().max() > 0 for buf in [w_opt, *noise.values()])
    projected_w = w_opt.detach().repeat([1, G.mapping.num_ws, 1])
    np.savez(tmp_path / "projected_w.npz", w=projected_w.numpy())
    ws = torch.tensor(np.load(tmp_path / "projected_w.npz")["w"])
    assert ws.shape[1:] == (G.num_ws, G.w_dim)
    assert (target - G.synthesis(ws, noise_mode="const")).square().mean() < 0.5 * losses[0]


# --- metrics and training tools -----------------------------------------------------------------


def test_calls_of_metrics(kind, network_pkl, capsys):
    with open(network_pkl, "rb") as f:
        data = pickle.load(f)
    options = dnnlib.EasyDict(data["training_set_kwargs"])
    G = copy.deepcopy(data["G_ema"]).eval().requires_grad_(False).to("cpu")
    D = copy.deepcopy(data["D"]).eval().requires_grad_(False)
    options.update(resolution=G.img_resolution, use_labels=G.c_dim != 0)
    assert options.path == "faces.zip" and not options.use_labels
    z, c = torch.randn([4, G.z_dim]), torch.empty([4, G.c_dim])
    img = G.synthesis(ws=G.mapping(z=z, c=c), noise_mode="const", force_fp32=True)
    assert torch.equal(img, G(z=z, c=c, noise_mode="const"))
    torch.manual_seed(0)
    shown = misc.print_module_summary(G, [z, c])
    torch.manual_seed(0)
    assert torch.equal(shown, G(z, c))
    assert torch.equal(misc.print_module_summary(D, [shown, c]), D(shown, c))
    tables = capsys.readouterr().out
    for network, name in [(G, "mapping.fc0"), (D, "b4.out")]:
        count = sum(p.numel() for p in network.parameters())
        assert name in tables and re.search(rf"^Total +{count} ", tables, re.MULTILINE)


def test_path_length_draws_new_noise(kind, G):
    """The metric writes into the noise maps and compares pictures of w that are close to each other."""
    z, c = torch.randn([2, G.z_dim]), torch.zeros([2, G.c_dim])
    before = G(z, c, noise_mode="const")
    w0, w1 = G.mapping(z=torch.cat([z, -z]), c=torch.cat([c, c])).chunk(2)
    for name, buf in G.named_buffers():
        if name.endswith(".noise_const"):
            buf.copy_(torch.randn_like(buf))
    near = torch.cat([w0, w0.lerp(w1, 1e-4)])
    img0, img1 = G.synthesis(ws=near, noise_mode="const", force_fp32=True).chunk(2)
    assert (img0 - before).abs().max() > 1e-2 * before.std()
    assert 0 < (img0 - img1).abs().max() < 1e-2 * before.std()


def test_a_network_of_the_same_arguments_takes_all_tensors(kind, network_pkl):
    with open(network_pkl, "rb") as f:
        data = pickle.load(f)
    for name in ["G", "D", "G_ema"]:
        old = data[name]
        assert old.init_args == () and isinstance(old.init_kwargs, dnnlib.EasyDict)
        new = type(old)(**old.init_kwargs).eval().requires_grad_(False)
        misc.copy_params_and_buffers(old, new, require_all=True)
        assert_same_function(old, new)
        stream = io.BytesIO()
        torch.save(old.state_dict(), stream)
        stream.seek(0)
        new = type(old)(**old.init_kwargs).eval().requires_grad_(False)
        new.load_state_dict(torch.load(stream))  # with weights_only, torch's default
        assert_same_function(old, new)
        assert list(old.state_dict()) == list(new.state_dict())
        assert set(old.state_dict()) == {name for name, _tensor in misc.named_params_and_buffers(old)}


def assert_same_function(old, new):
    torch.manual_seed(2)
    if hasattr(old, "mapping"):
        z = torch.randn(2, old.z_dim)
        assert torch.equal(old(z, None, noise_mode="const"), new(z, None, noise_mode="const"))
    else:
        img = torch.randn(4, 3, 16, 16)
        assert torch.equal(old(img, None), new(img, None))


def half_precision(old, generation):
    """What `force_fp16` of the family's two generations does to a network."""
    kwargs = copy.deepcopy(old.init_kwargs)
    place = kwargs
    if hasattr(old, "synthesis") and (generation == 2 or "synthesis_kwargs" in kwargs):
        place = kwargs.setdefault("synthesis_kwargs", dnnlib.EasyDict())
    place["num_fp16_res"], place["conv_clamp"] = 4, 256
    new = type(old)(**kwargs).eval().requires_grad_(False)
    misc.copy_params_and_buffers(old, new, require_all=True)
    return new


@pytest.mark.parametrize("generation", [2, 3])
def test_half_precision(kind, generation, network_pkl):
    """The blocks above 4x4 are asked to use it; on a CPU they calculate as before."""
    with open(network_pkl, "rb") as f:
        data = pickle.load(f)
    for name in ["G", "D", "G_ema"]:
        new = half_precision(data[name], generation)
        assert_same_function(data[name], new)
        blocks = new.synthesis if hasattr(new, "synthesis") else new
        assert blocks.b16.use_fp16 and blocks.b8.use_fp16 and blocks.b8.conv0.conv_clamp == 256
        assert not (data[name].synthesis if hasattr(new, "synthesis") else data[name]).b16.use_fp16


@pytest.mark.parametrize("generation", [2, 3])
def test_half_precision_of_a_generator_without_synthesis_kwargs(kind, generation):
    if (
        kind == "plain" and generation == 3
    ):  # the signature is stylegan2-ada-pytorch's, whose own files fail there
        with pytest.raises(TypeError):
            Generator(z_dim=8, w_dim=8, c_dim=0, img_resolution=8, img_channels=3, num_fp16_res=4)
        return
    sides = dict(c_dim=0, img_resolution=8, img_channels=3, mapping_kwargs=dict(num_layers=1))
    if kind == "plain":
        G = Generator(z_dim=8, w_dim=8, **sides)
    else:
        G = SpatialGenerator(z_dim=8, w_dim=8, latent_grid=[1, 2], **sides)
    new = half_precision(G.eval().requires_grad_(False), generation)
    assert new.synthesis.b8.use_fp16 and new.synthesis.b8.conv1.conv_clamp == 256
    assert_same_function(G, new)


# --- elsewhere ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing(kind, snapshots):
    """torch.jit.trace, saved, loaded and run on batches of other sizes."""
    with open(snapshots[kind, 3], "rb") as f:
        G = pickle.load(f)["G_ema"]

    def picture(z, c):
        return G(z, c, truncation_psi=0.7, noise_mode="const")

    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(picture, (torch.randn(2, G.z_dim), torch.eye(3)[:2])), stream)
    stream.seek(0)
    traced = torch.jit.load(stream)
    for num in [1, 2, 3]:
        z, c = torch.randn(num, G.z_dim), torch.eye(3)[:num]
        assert_close(traced(z, c), picture(z, c))
    assert_close(picture(z, c), G(z, c, truncation_psi=0.7, noise_mode="const", force_fp32=True))


def test_another_process_gets_the_network(kind, G):
    """Its class comes along; nobody there has imported it."""
    z = latents(G, 0).float()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ws = pool.apply(operator.methodcaller("mapping", z, None), [G])
    assert_close(ws, G.mapping(z, None))


def test_a_copied_network_is_independent(kind, G):
    twin = copy.deepcopy(G)
    z = latents(G, 0)
    before = G(z, None, noise_mode="const")
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert torch.equal(G(z, None, noise_mode="const"), before)
    assert not torch.equal(twin(z, None, noise_mode="const"), before)
