# SPDX-License-Identifier: Apache-2.0
"""Whole training in 1, 2 and 3 processes: the same gradients, the same weights in all, exact continuation."""

import functools
import json
import os

import numpy as np
import PIL.Image
import pytest
import torch

from tests.helpers import assert_equal_states, run_worker
from training import checkpoint

WORKER = '''\
"""What each of several processes does; started with: number of processes, folder, options of a run (JSON)."""
import json, os, sys
import torch
import dnnlib
from torch_utils import distributed, misc, training_stats
from training import settings, training_loop

TOTAL, GROUP = 12, 2  # pictures of a batch, members of a minibatch-std group


def share(batch, rank, size):
    """The pictures of one process: groups stay whole. Picture n of N belongs to group n mod (N / GROUP)."""
    groups = batch.reshape(GROUP, TOTAL // GROUP, *batch.shape[1:])
    mine = TOTAL // GROUP // size
    return groups[:, rank * mine : (rank + 1) * mine].flatten(0, 1)


def gradients(rank, folder, options):
    """The gradients of every phase after reduction, for given pictures, latents and path-length noise."""
    size = distributed.get_world_size()
    rng = torch.Generator().manual_seed(5)
    c = training_loop.complete_config(settings.easy(options))
    c.update(batch_size=TOTAL, batch_gpu=TOTAL // size, num_gpus=size, augment_kwargs=None, ada_target=None)
    c.G_kwargs.synthesis_kwargs.use_noise = False
    c.D_kwargs.epilogue_kwargs = dnnlib.EasyDict(mbstd_group_size=GROUP)
    # the regularisers take all pictures: halves of the shares would be others than the half of the whole
    c.loss_kwargs.update(style_mixing_prob=0, pl_batch_shrink=1, dist_batch_shrink=1)
    run = training_loop.Run(c, rank)
    torch.manual_seed(0)
    run._load_data()
    run.counters = training_loop.checkpoint.Counters(nimg=0)
    run._build_networks()
    run._build_training()
    run.loss.pl_mean += 3
    run.loss.pl_decay = 0.5  # so that it matters that the mean is everyone's
    real = torch.randn([TOTAL, 3, 16, 16], generator=rng)
    z = torch.randn([TOTAL, run.G.z_dim], generator=rng)
    other_z = torch.randn([TOTAL, run.G.z_dim], generator=rng)
    blocks = torch.randint(4, [1, TOTAL], generator=rng)
    noise = torch.randn([TOTAL, 3, 16, 16], generator=rng)
    labels = torch.eye(2)[torch.randint(2, [2, TOTAL], generator=rng)]
    given = {tuple(t.shape[1:]): t for t in [other_z, noise]}
    torch.randn_like = lambda like: share(given[tuple(like.shape[1:])], rank, size)
    torch.randint = lambda *args, **kwargs: share(blocks[0], rank, size)[None]
    found = {}
    for phase in run.phases:
        phase.optimizer.step = lambda: None
        parts = [share(t, rank, size) for t in [real, labels[0], z, labels[1]]]
        phase.step(run.loss, [parts])
        named = run.D if phase.net == "D" else run.G
        found[phase.name] = {n: p.grad.clone() for n, p in named.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(found, os.path.join(folder, f"gradients{size}.pt"))


def train(rank, folder, options):
    """A run, and the same one stopped and continued; what was stopped in one process stops in both."""
    easy = settings.easy
    training_stats.init_multiprocessing(rank, torch.device("cpu"))
    training_loop.AGREE_SECONDS = 0
    ends = {}
    for name, stop_after in [("whole", None), ("parts", 5)]:
        for attempt in ["first", "again"] if stop_after else ["first"]:
            training_stats.load_state_dict({})
            c = easy(dict(options, run_dir=os.path.join(folder, name), num_gpus=2, exact_resume=attempt == "again"))
            run = Run(training_loop.complete_config(c), rank, stop_after if attempt == "first" else None)
            ends[f"{name} {attempt}"] = go(run)
            for net in ["G", "D", "G_ema"]:
                misc.check_ddp_consistency(getattr(run, net), ignore_regex=r".*\\.w_avg")
    seen = dict(
        ends=ends, p=run.augment.strength, nimg=run.counters.nimg, stats=run.stats.as_dict(), pl=float(run.loss.pl_mean)
    )
    with open(os.path.join(folder, f"seen{rank}.json"), "w") as f:
        json.dump(seen, f)


class Run(training_loop.Run):
    """A run in which process 1 is asked to stop during its n-th iteration."""

    def __init__(self, c, rank, stop_after=None):
        super().__init__(c, rank)
        self.stop_after = stop_after

    def iterate(self):
        super().iterate()
        if self.stop_after == self.counters.nimg // self.c.batch_size and self.rank == 1:
            self.stop.requested = True


def go(run):
    """The loop around a run of our own."""
    make, training_loop.Run = training_loop.Run, lambda *args: run
    try:
        return training_loop.training_loop(**run.c)
    finally:
        training_loop.Run = make


def all_of_it(rank, folder, options):
    if distributed.get_world_size() == 2:
        train(rank, folder, options)
    gradients(rank, folder, options)


if __name__ == "__main__":
    folder = sys.argv[1]
    with open(os.path.join(folder, "options.json")) as f:
        options = json.load(f)
    for size in [1, 2, 3]:
        distributed.launch(all_of_it, size, (folder, options), device_type="cpu")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes have left what they saw."""
    folder = tmp_path_factory.mktemp("processes")
    rnd = np.random.RandomState(0)
    (folder / "pictures").mkdir()
    for i in range(24):
        pixels = rnd.randint(256, size=[16, 16, 3], dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "pictures" / f"{i:03d}.png")
    labels = [[f"{i:03d}.png", i % 2] for i in range(24)]
    (folder / "pictures" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (folder / "options.json").write_text(json.dumps(options(str(folder / "pictures"))))
    for name in ["whole", "parts"]:
        (folder / name).mkdir()
    run_worker(folder, WORKER, seconds=600)
    return folder


def options(path):
    """A conditional SSN of seconds, with ADA, all phases at various intervals."""
    widths = dict(channel_base=64, channel_max=8)
    adam = dict(class_name="torch.optim.Adam", lr=0.002, betas=[0.0, 0.99], eps=1e-8)
    return dict(
        total_kimg=0.08, batch_size=8, batch_gpu=2, kimg_per_tick=0.04, device="cpu",
        training_set_kwargs=dict(class_name="training.dataset.ImageFolderDataset", path=path, use_labels=True),
        data_loader_kwargs=dict(num_workers=0),
        G_kwargs=dict(
            class_name="ssn_ext.networks.SpatialGenerator", z_dim=32, w_dim=32, latent_grid=[2, 2],
            mapping_kwargs=dict(num_layers=1), synthesis_kwargs=dict(**widths, encoder_kwargs=dict(channels=4)),
        ),
        D_kwargs=dict(class_name="training.networks.Discriminator", **widths, mapping_kwargs=dict(num_layers=1)),
        loss_kwargs=dict(
            class_name="ssn_ext.loss.DistortionRegularizedLoss", lambda_d=5, dist_interval=2, r1_gamma=1
        ),
        G_opt_kwargs=adam, D_opt_kwargs=adam, G_reg_interval=2, D_reg_interval=3,
        ada_target=-2, ada_interval=3, ada_kimg=0.1,
        augment_kwargs=dict(class_name="training.augment.AugmentPipe", xflip=1, brightness=1, scale=1),
        image_snapshot_ticks=None, network_snapshot_ticks=2,
    )  # fmt: skip


@functools.cache
def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_agree_with_those_of_one_process(folder, size):
    """Given pictures, latents and noise, minibatch-std groups whole: the mean over processes is that of the whole
    batch, for every phase."""
    alone, several = (load(folder / f"gradients{n}.pt") for n in (1, size))
    assert list(alone) == list(several) == ["Gmain", "Greg", "Gdist", "Dmain", "Dreg"]
    for phase, grads in alone.items():
        assert grads.keys() == several[phase].keys()
        scale = max(float(grad.abs().max()) for grad in grads.values())
        assert scale > 1e-3
        for name, grad in grads.items():
            error = float((several[phase][name] - grad).abs().max())
            assert error <= 1e-5 * scale, (phase, name, error / scale)


def seen(folder):
    return [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(2)]


def test_all_processes_see_the_same(folder):
    """Statistics are everyone's, ADA's strength and the path-length mean are one."""
    first, second = seen(folder)
    assert first == second
    assert first["p"] > 0 and first["nimg"] == 80 and first["pl"] > 0
    # 5 iterations of the last tick, 8 real pictures each; R1 in one of two
    assert first["stats"]["Loss/signs/real"]["num"] % 8 == 0 and first["stats"]["Loss/signs/real"]["num"] > 0
    assert first["stats"]["Progress/kimg"]["num"] == 1


def test_a_stop_request_to_one_process_stops_all_and_the_run_goes_on_exactly(folder):
    """Bit for bit: weights, optimisers, ADA, statistics."""
    assert seen(folder)[0]["ends"] == {"whole first": True, "parts first": False, "parts again": True}
    whole, parts = (checkpoint.read(str(folder / name)) for name in ["whole", "parts"])
    assert_equal_states(whole, parts)
    assert sorted(os.listdir(folder / "whole")) == sorted(os.listdir(folder / "parts"))
