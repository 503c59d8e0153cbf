# SPDX-License-Identifier: Apache-2.0
"""train.py: every option does what it says, seen in what tiny trainings leave behind."""

import json

import numpy as np
import pytest
import torch

import dnnlib
import train
from torch_utils import custom_ops, training_stats
from training import controllers, dataset, phases, settings, snapshot
from training.augment import AugmentPipe
from training.loss import StyleGAN2Loss
from training.networks import Discriminator, Generator

DATA = dict(img_resolution=8, img_channels=3, c_dim=0)
WIDTHS = dict(channel_base=1024, channel_max=8)


def tensors(network):
    """Parameters and buffers by name."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def assert_same(a, b):
    """The networks hold the same values."""
    assert tensors(a).keys() == tensors(b).keys()
    for name, value in tensors(a).items():
        assert torch.equal(value, tensors(b)[name]), name


@pytest.fixture(scope="module")
def source_pkl(tmp_path_factory):
    """A snapshot of networks as tiny_run builds them, with an augmentation strength of 0.25."""
    torch.manual_seed(3)
    synthesis = dict(WIDTHS, use_noise=False)
    G = Generator(z_dim=8, w_dim=8, mapping_kwargs=dict(num_layers=2), synthesis_kwargs=synthesis, **DATA)
    D = Discriminator(**WIDTHS, epilogue_kwargs=dict(mbstd_group_size=4), **DATA)
    pipe = AugmentPipe(xflip=1)
    pipe.p.copy_(torch.as_tensor(0.25))
    path = tmp_path_factory.mktemp("source") / "source.pkl"
    snapshot.save_network_pkl(path, G=G, D=D, G_ema=G, augment_pipe=pipe)
    return path


# --- how long, how much, how fast ---------------------------------------------------------------------------


def test_kimg_batch_and_snap(tiny_run):
    """2 kimg in ticks of 0.5: ticks 0 to 4; snapshots of pictures and networks at 0, 3 and, as the last, 4."""
    result = tiny_run(
        "--kimg=2", "--batch=500", "--snap=3", "--aug=noaug", "--set=kimg_per_tick=0.5", short=False
    )
    assert result.status == 0, result.output
    assert [line["Progress/kimg"]["mean"] for line in result.stats()] == pytest.approx([0.5, 1, 1.5, 2])
    assert result.snapshots() == ["network-snapshot-000000.pkl", "network-snapshot-000002.pkl"]
    names = ["fakes000000.png", "fakes000002.png", "fakes_init.png"]
    assert sorted(path.name for path in result.dir.glob("fakes*.png")) == names
    assert result.dir.name == "00000-ds-laptop-kimg2-batch500-noaug"
    assert result.options()["total_kimg"] == 2


def test_gamma_weighs_r1(tiny_run):
    first = tiny_run("--gamma=3").stats()[0]
    assert first["Loss/D/reg"]["mean"] == pytest.approx(1.5 * first["Loss/r1_penalty"]["mean"], rel=1e-5)
    assert "Loss/r1_penalty" not in tiny_run("--gamma=0").stats()[0]


def test_learning_rates(tiny_run):
    """The optimisers hold them times the lazy correction, 4/5 and 16/17."""
    result = tiny_run("--glr=0.004", "--dlr=0.001")
    state = result.checkpoint()
    assert state["G_opt"]["param_groups"][0]["lr"] == pytest.approx(0.004 * 4 / 5)
    assert state["D_opt"]["param_groups"][0]["lr"] == pytest.approx(0.001 * 16 / 17)
    assert result.dir.name.endswith("-glr0.004-dlr0.001")


def test_seed(tiny_run):
    """The same seed gives the same networks, another one does not."""
    first, again, other = (tiny_run(f"--seed={seed}").networks() for seed in [0, 0, 1])
    for name in ["G", "D", "G_ema"]:
        assert_same(first[name], again[name])
    assert not torch.equal(first["G"].synthesis.b4.const, other["G"].synthesis.b4.const)


def test_workers_change_nothing(tiny_run):
    """None, one, and more than there are cores."""
    none, one = (tiny_run(f"--workers={n}") for n in [0, 1])
    assert none.options()["data_loader_kwargs"] == dict(pin_memory=True, num_workers=0)
    assert one.options()["data_loader_kwargs"] == dict(pin_memory=True, num_workers=1, prefetch_factor=2)
    assert_same(none.networks()["G"], one.networks()["G"])


def test_three_processes(tiny_run):
    """Any number of processes, not just powers of two: 6 pictures, 2 each."""
    args = ["--gpus=3", "--device=cpu", "--batch=6"]
    result = tiny_run(*args, "--set=total_kimg=0.012")
    assert result.status == 0, result.output
    line = result.stats()[-1]
    assert line["Progress/kimg"] == dict(num=1, mean=pytest.approx(0.012), std=0)
    # Gmain and Dmain of one iteration, 6 generated pictures each
    assert line["Loss/scores/fake"]["num"] == 12


# --- data ---------------------------------------------------------------------------------------------------


def test_mirror_adds_flipped_pictures(tiny_run):
    result = tiny_run("--mirror=1")
    assert "Num images:  24" in result.output and result.dir.name.startswith("00000-ds-mirror-")
    data = dnnlib.util.construct_class_by_name(**result.options()["training_set_kwargs"])
    for i in range(12):
        assert (data[12 + i][0] == data[i][0][:, :, ::-1]).all()


def test_subset_is_chosen_by_the_seed(tiny_run):
    """The sorted first N of RandomState(seed)'s shuffle."""
    for seed in [0, 5]:
        result = tiny_run("--subset=5", f"--seed={seed}")
        assert "Num images:  5\n" in result.output and "-ds-subset5-laptop" in result.dir.name
        data = dnnlib.util.construct_class_by_name(**result.options()["training_set_kwargs"])
        order = np.arange(12)
        np.random.RandomState(seed).shuffle(order)
        assert [data.get_details(i).raw_idx for i in range(len(data))] == sorted(order[:5])


def test_cond_trains_on_labels(tiny_run):
    networks = tiny_run("--cond=1").networks()
    assert networks["G"].c_dim == networks["D"].c_dim == 2
    z = torch.randn([1, 8])
    zero, one = (networks["G_ema"](z, torch.eye(2)[i : i + 1]) for i in range(2))
    assert not torch.equal(zero, one)
    assert tiny_run("--cond=0").networks()["G"].c_dim == 0


# --- augmentation -------------------------------------------------------------------------------------------


def test_aug_modes(tiny_run):
    assert tiny_run("--aug=noaug").networks()["augment_pipe"] is None
    fixed = tiny_run("--aug=fixed", "--p=0.25", "--augpipe=blit")
    assert float(fixed.networks()["augment_pipe"].p) == 0.25
    assert [line["Progress/augment"]["mean"] for line in fixed.stats()] == [0.25] * 4
    assert fixed.dir.name == "00001-ds-laptop-batch4-fixed-p0.25-blit"


def test_initstrength_and_target(tiny_run):
    """p begins at 0.5; a target of 1 cannot be passed, so that ADA lowers p: twice, by 4 * 4 / 1000 each."""
    result = tiny_run("--initstrength=0.5", "--target=1", "--set=ada_kimg=1")
    assert float(result.networks()["augment_pipe"].p) == pytest.approx(0.5 - 2 * 0.016)
    assert result.dir.name == "00000-ds-laptop-batch4-target1-initstrength0.5"
    assert float(tiny_run("--target=1").networks()["augment_pipe"].p) == 0


@pytest.mark.parametrize(
    "signs,expected", [([1, 1, 1, -1], 0.516), ([1, 1, -1, -1], 0.484), ([1, 1, 1, 0], 0.516)]
)
def test_ada_moves_towards_its_target(signs, expected):
    """Up where D is too sure of real pictures (mean sign above 0.4), down where it is not."""
    training_stats.load_state_dict({})
    ada = controllers.AdaptiveAugment(AugmentPipe(xflip=1), p=0.5, target=0.4, interval=4, kimg=1)
    training_stats.report("Loss/signs/real", torch.tensor(signs, dtype=torch.float32))
    for batch_idx in range(1, 5):
        ada.update(batch_size=4, batch_idx=batch_idx)
    assert ada.strength == pytest.approx(expected)


BLIT, GEOM = ["xflip", "rotate90", "xint"], ["scale", "rotate", "aniso", "xfrac"]
COLOR = ["brightness", "contrast", "lumaflip", "hue", "saturation"]


@pytest.mark.parametrize(
    "name,transforms",
    [
        ("blit", BLIT),
        ("geom", GEOM),
        ("color", COLOR),
        ("filter", ["imgfilter"]),
        ("noise", ["noise"]),
        ("cutout", ["cutout"]),
        ("bg", BLIT + GEOM),
        ("bgc", BLIT + GEOM + COLOR),
        ("bgcf", [*BLIT, *GEOM, *COLOR, "imgfilter"]),
        ("bgcfn", [*BLIT, *GEOM, *COLOR, "imgfilter", "noise"]),
        ("bgcfnc", [*BLIT, *GEOM, *COLOR, "imgfilter", "noise", "cutout"]),
    ],
)
def test_augpipe_enables_just_its_transforms(ds, name, transforms):
    desc, args = train.setup_training_loop_kwargs(data=str(ds), augpipe=name)
    pipe = dnnlib.util.construct_class_by_name(**args.augment_kwargs)
    every = [*BLIT, *GEOM, *COLOR, "imgfilter", "noise", "cutout"]
    assert {each: getattr(pipe, each) for each in every} == {
        each: float(each in transforms) for each in every
    }
    assert desc == f"ds-auto1-{name}"


# --- transfer -----------------------------------------------------------------------------------------------


def test_freezed_layers_stay_as_they_were(tiny_run, source_pkl):
    """fromrgb and conv0 of the first block keep their bits; all other layers of D learn."""
    result = tiny_run(f"--resume={source_pkl}", "--freezed=2")
    before, after = (
        tensors(data["D"]) for data in [snapshot.load_network_pkl(source_pkl), result.networks()]
    )
    frozen = [name for name in before if name.startswith(("b8.fromrgb.", "b8.conv0."))]
    assert len(frozen) == 2 * 3  # weight, bias, filter
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == (name in frozen or name.endswith("resample_filter")), name
    assert result.dir.name.endswith("-resumecustom-freezed2")


def test_a_new_run_does_not_inherit_frozen_layers(tiny_run, source_pkl):
    """Also where the arguments of D are those of the source."""
    frozen = tiny_run(f"--resume={source_pkl}", "--freezed=2")
    spatial = ["--cfg=ssn", "--latent-grid=2x2", "--set=G_kwargs.z_dim=32", "--set=G_kwargs.w_dim=32"]
    result = tiny_run(*spatial, f"--resume={frozen.dir / frozen.snapshots()[-1]}")
    assert result.status == 0, result.output
    assert len(list(frozen.networks()["D"].parameters())) < len(list(result.networks()["D"].parameters()))


def test_strength_of_the_source(tiny_run, source_pkl):
    """A plain transfer begins at 0, as in the family, and says so; --initstrength=resume takes it over."""
    plain = tiny_run(f"--resume={source_pkl}", "--target=1")
    line = "Its augmentation strength was 0.250, this run begins with 0: --initstrength=resume takes it over"
    assert line in plain.output and float(plain.networks()["augment_pipe"].p) == 0
    taken = tiny_run(f"--resume={source_pkl}", "--target=1", "--initstrength=resume")
    assert line not in taken.output and taken.options()["augment_p"] == 0.25
    # ADA of a transfer moves by 4 * 4 / 100,000 each time
    assert float(taken.networks()["augment_pipe"].p) == pytest.approx(0.25 - 2 * 0.00016)


def test_trust_pickle_reaches_the_reader(tiny_run, source_pkl, monkeypatch):
    asked = []
    load = snapshot.load_network_pkl
    monkeypatch.setattr(
        snapshot, "load_network_pkl", lambda source, trust=False: asked.append(trust) or load(source)
    )
    tiny_run(f"--resume={source_pkl}", "--initstrength=resume")
    assert asked == [False]  # by the options, which hand it to the loop
    result = tiny_run(f"--resume={source_pkl}", "--initstrength=resume", "--trust-pickle")
    assert asked[1:] == [True] and result.options()["resume_trust"] is True


# --- performance --------------------------------------------------------------------------------------------


def half_layers(networks):
    """Names of the blocks that compute in half precision, of G and D."""
    return [
        name
        for net in ["G", "D"]
        for name, m in networks[net].named_modules()
        if getattr(m, "use_fp16", False)
    ]


@pytest.mark.parametrize("flag", ["--fp32=1", "--precision=fp32"])
def test_full_precision(tiny_run, flag):
    networks = tiny_run("--precision=fp16", "--set=kimg_per_tick=1").networks()
    assert half_layers(networks) == ["synthesis.b8", "b8"]
    assert networks["G"].synthesis.b8.conv1.conv_clamp == networks["D"].b8.conv1.conv_clamp == 256
    paper = [
        "--cfg=paper256",
        "--set=G_kwargs.synthesis_kwargs.channel_max=8",
        "--set=D_kwargs.channel_max=8",
    ]
    assert half_layers(tiny_run(*paper).networks()) == ["synthesis.b8", "b8"]
    networks = tiny_run(*paper, flag).networks()
    assert half_layers(networks) == []
    assert networks["G"].synthesis.b8.conv1.conv_clamp is networks["D"].b8.conv1.conv_clamp is None


def test_bf16_options(ds):
    _desc, args = train.setup_training_loop_kwargs(data=str(ds), cfg="paper256", precision="bf16")
    assert args.G_kwargs.synthesis_kwargs.half_dtype == args.D_kwargs.block_kwargs.half_dtype == "bfloat16"
    assert args.G_kwargs.synthesis_kwargs.num_fp16_res == args.D_kwargs.num_fp16_res == 4
    _desc, args = train.setup_training_loop_kwargs(data=str(ds), cfg="laptop", precision="bf16")
    assert args.G_kwargs.synthesis_kwargs.num_fp16_res == args.D_kwargs.num_fp16_res == 4
    _desc, args = train.setup_training_loop_kwargs(data=str(ds), cfg="paper256", precision="fp16")
    assert "half_dtype" not in args.D_kwargs.block_kwargs and args.D_kwargs.num_fp16_res == 4


@pytest.mark.parametrize("cfg", ["laptop", "ssn"])
def test_bf16_trains(tiny_run, cfg):
    """And rounds: from one seed, other pictures than float32's, but not by much."""
    grid = ["--latent-grid=2x2", "--set=G_kwargs.z_dim=32", "--set=G_kwargs.w_dim=32"] if cfg == "ssn" else []
    result = tiny_run("--precision=bf16", f"--cfg={cfg}", *grid)
    assert result.status == 0, result.output
    assert half_layers(result.networks()) == ["synthesis.b8", "b8"]
    assert result.stats()[-1]["Progress/nonfinite"]["mean"] == 0
    G = result.networks()["G_ema"]
    half, full = (
        G(torch.ones([1, G.z_dim]), None, noise_mode="const", force_fp32=force) for force in [False, True]
    )
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_nhwc_lays_out_channels_last(tiny_run):
    """The weights of half-precision layers, in memory."""

    def is_last(*args):
        D = tiny_run("--precision=fp16", *args).networks()["D"]
        return D.b8.conv0.weight.is_contiguous(memory_format=torch.channels_last)

    assert is_last("--nhwc=1") and not is_last() and not is_last("--nhwc=0")


@pytest.fixture
def backends():
    """The two backends with switches, put back as they were afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield cudnn, matmul
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_switches_of_the_backends(tiny_run, backends):
    cudnn, matmul = backends
    result = tiny_run()
    assert "cudnn_benchmark" not in result.options() and "allow_tf32" not in result.options()
    assert cudnn.benchmark and not cudnn.allow_tf32 and not matmul.allow_tf32
    result = tiny_run("--nobench=1", "--allow-tf32=1")
    assert result.options()["cudnn_benchmark"] is False and result.options()["allow_tf32"] is True
    assert not cudnn.benchmark and cudnn.allow_tf32 and matmul.allow_tf32


def test_ops(tiny_run, monkeypatch):
    monkeypatch.setattr(custom_ops, "_mode", "auto")
    monkeypatch.setattr(custom_ops, "_decision", None)
    result = tiny_run("--ops=reference")
    assert result.options()["ops"] == "reference"
    assert custom_ops.status() == "Operations: reference path (as asked)"
    assert "ops" not in tiny_run("--ops=auto").options() and custom_ops._mode == "auto"


def test_batch_gpu_splits_the_batch(tiny_run, monkeypatch):
    sizes = []
    accumulate = StyleGAN2Loss.accumulate_gradients

    def spy(self, phase, real_img, real_c, gen_z, gen_c, **kwargs):
        sizes.append((phase, len(real_img), len(real_c), len(gen_z), len(gen_c)))
        accumulate(self, phase, real_img, real_c, gen_z, gen_c, **kwargs)

    monkeypatch.setattr(StyleGAN2Loss, "accumulate_gradients", spy)
    assert tiny_run("--batch=8", "--batch-gpu=2", "--set=total_kimg=0.016").options()["batch_gpu"] == 2
    assert sizes[:4] == [("Gmain", 2, 2, 2, 2)] * 4  # the first iteration runs all phases
    assert len(sizes) == 4 * (4 + 2)


@pytest.mark.parametrize("group,parts", [(None, "halves"), (4, "interleaved")])
def test_gradients_of_the_parts_add_up(group, parts):
    """Two parts give twice the gradient of the mean over the batch (the family sums, it does not average).

    With minibatch statistics that holds for parts that are the groups of the whole batch: n, n + 2, n + 4, n + 6.
    """
    torch.manual_seed(0)
    D = Discriminator(
        **WIDTHS, epilogue_kwargs=dict(mbstd_group_size=4, mbstd_num_channels=bool(group) * 1), **DATA
    )
    G = Generator(
        z_dim=8,
        w_dim=8,
        mapping_kwargs=dict(num_layers=1),
        synthesis_kwargs=dict(WIDTHS, use_noise=False),
        **DATA,
    )
    loss = StyleGAN2Loss("cpu", G.mapping, G.synthesis, D, style_mixing_prob=0)
    G.eval().requires_grad_(False)
    img, z, c = torch.randn([8, 3, 8, 8]), torch.randn([8, 8]), torch.zeros([8, 0])
    steps = {}
    for name, picks in {
        "whole": [slice(None)],
        "halves": [slice(4), slice(4, 8)],
        "interleaved": [slice(0, 8, 2), slice(1, 8, 2)],
    }.items():
        (phase, *_), _opt = phases.build_phases(
            [row for row in loss.phase_rows() if row.name == "Dmain"],
            dict(D=D),
            dict(D=dict(class_name="torch.optim.SGD", lr=0.0)),
        )
        phase.step(loss, [(img[i], c[i], z[i], c[i]) for i in picks])
        steps[name] = torch.cat([p.grad.flatten() for p in D.parameters()])
    torch.testing.assert_close(steps[parts], 2 * steps["whole"], rtol=1e-4, atol=1e-6)
    assert steps["whole"].abs().max() > 0.01
    if group:
        assert not torch.allclose(steps["halves"], 2 * steps["whole"], rtol=1e-2, atol=1e-4)


# --- memory and numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize(
    "err", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), MemoryError(), "allocate"]
)
def test_out_of_memory_suggests_smaller_parts(tiny_run, monkeypatch, err):
    def full(self, *args, **kwargs):
        if err == "allocate":
            torch.empty(10**15)  # what PyTorch raises on a CPU
        raise err

    monkeypatch.setattr(StyleGAN2Loss, "accumulate_gradients", full)
    result = tiny_run("--batch=24")
    assert result.status == 1
    assert result.output.splitlines()[-1] == (
        "Error: out of memory. Try --batch-gpu=12: 12 pictures at a time on each process instead of 24, the batch stays"
        " 24"
    )
    assert "Try --batch-gpu" in (result.dir / "log.txt").read_text()


@pytest.mark.parametrize(
    "batch,gpus,part,group,expected",
    [
        (24, 1, 24, 4, 12),
        (64, 2, 32, 8, 16),
        (12, 1, 4, 4, 2),
        (30, 1, 15, 4, 3),
        (8, 1, 1, 4, None),
        (18, 1, 9, None, 3),
    ],
)
def test_smaller_parts_are_allowed_ones(batch, gpus, part, group, expected):
    c = dnnlib.EasyDict(batch_size=batch, num_gpus=gpus, batch_gpu=part)
    c.D_kwargs = dict(epilogue_kwargs=dict(mbstd_group_size=group))
    smaller = settings.smaller_batch_gpu(c)
    assert smaller == expected
    if smaller is None:
        assert train.less_memory(c).startswith("There is one picture at a time already")
    else:
        settings.check_batch(dnnlib.EasyDict(c, batch_gpu=smaller))


def test_gradients_that_are_not_finite_are_counted_and_said_once(tiny_run, monkeypatch):
    """One nan and one infinity in the gradient of each of G's steps."""
    accumulate = StyleGAN2Loss.accumulate_gradients

    def poison(self, phase, *args, **kwargs):
        accumulate(self, phase, *args, **kwargs)
        if phase == "Gmain":
            self.G_synthesis.b4.const.grad[0, 0, :2] = torch.tensor([float("nan"), float("inf")])

    assert tiny_run().stats()[-1]["Progress/nonfinite"]["mean"] == 0
    monkeypatch.setattr(StyleGAN2Loss, "accumulate_gradients", poison)
    result = tiny_run()
    first = result.stats()[0]["Progress/nonfinite"]
    assert (
        first["num"] == 4 and first["mean"] == 2 / 4
    )  # four phases in the first iteration, one of them with two
    assert result.output.count("Warning: some gradients were nan or infinite") == 1
    assert all(torch.isfinite(t).all() for t in tensors(result.networks()["G"]).values())


# --- continuation -------------------------------------------------------------------------------------------


def test_options_that_may_change_when_a_run_goes_on(tiny_run):
    first = tiny_run()
    changes = ["--kimg=1", "--workers=1", "--snap=7", "--metrics=fid1k", "--detector=efficientnet-lite0",
               "--best=kid1k", "--keep-last=2", "--log=tensorboard", "--trust-pickle"]  # fmt: skip
    output = tiny_run(f"--resume={first.dir}", *changes, "--dry-run", new=False).output
    text = output.split("Training options:\n")[1]
    c = json.loads(text[: text.index("\n}\n") + 2])
    expected = dict(
        total_kimg=1, network_snapshot_ticks=7, metrics=["fid1k", "kid1k"], best="kid1k", keep_last=2
    )
    expected.update(log=["tensorboard"], metric_kwargs=dict(detector="efficientnet-lite0"))
    assert {name: c[name] for name in expected} == expected
    for fixed in [
        "--seed=1",
        "--batch-gpu=2",
        "--precision=fp32",
        "--glr=1",
        "--freezed=1",
        "--nobench=1",
        "--cfg=auto",
    ]:
        result = tiny_run(f"--resume={first.dir}", fixed, "--dry-run", new=False)
        assert result.status == 2 and f"but the command says {fixed.split('=')[0]}=" in result.output


def test_dataset_class_is_the_familys(ds):
    _desc, args = train.setup_training_loop_kwargs(data=str(ds))
    assert isinstance(
        dnnlib.util.construct_class_by_name(**args.training_set_kwargs), dataset.ImageFolderDataset
    )
