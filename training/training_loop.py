# SPDX-License-Identifier: Apache-2.0
"""The training loop: says when; the objects it builds say how.

One iteration draws its random numbers from (seed, rank, images seen), so that a run that was stopped and
continued from its checkpoint makes the very draws of the run that was not.
"""

import contextlib
import copy
import os
import signal
import time

import numpy as np
import torch

import dnnlib
from torch_utils import custom_ops, distributed, misc, training_stats
from torch_utils.images import save_image_grid, to_float  # noqa: F401 (as below)
from training import checkpoint, controllers, phases, snapshot
from training.hooks import setup_snapshot_image_grid  # noqa: F401 (users of the family find it here)
from training.shapes import network_shapes
from training.transfer import coverage_table

CHECKPOINT_SECONDS = 600  # a checkpoint at least this often, whatever --snap says
AGREE_SECONDS = (
    0.5  # several processes ask each other about this often whether to stop: it makes them wait for GPUs
)

STANDARD_HOOKS = [
    "training.hooks.ProgressBar",
    "training.hooks.StatusLine",
    "training.hooks.ImageGrids",
    "training.hooks.Snapshots",
    "training.hooks.StatsLog",
    "training.hooks.Checkpoints",
    "training.hooks.Metrics",
    "training.hooks.KeepBest",
    "training.hooks.KeepLast",
    "training.trackers.Trackers",
    "training.hooks.Progress",
]

# Options of the loop, by theme, with the family's defaults.
DEFAULTS = {
    # what is trained, and on what
    **dict(training_set_kwargs={}, data_loader_kwargs={}, G_kwargs={}, D_kwargs={}, loss_kwargs={}),
    **dict(
        G_opt_kwargs={}, D_opt_kwargs={}, G_reg_interval=4, D_reg_interval=16, ema_kimg=10, ema_rampup=None
    ),
    **dict(augment_kwargs=None, augment_p=0, ada_target=None, ada_interval=4, ada_kimg=500),
    # where it starts from and how long it takes
    **dict(resume_pkl=None, resume_trust=False, transfer="training.transfer.transfer", allow_partial=[]),
    **dict(exact_resume=False),
    **dict(total_kimg=25000, kimg_per_tick=4, batch_size=4, batch_gpu=4, random_seed=0),
    # what it writes
    **dict(
        run_dir=".",
        image_snapshot_ticks=50,
        network_snapshot_ticks=50,
        metrics=[],
        metric_kwargs={},
        best=None,
        keep_last=None,
        log=[],
        tick_hooks=[],
    ),
    # the machine
    **dict(num_gpus=1, device=None, cudnn_benchmark=True, allow_tf32=False, ops="auto"),
}


def complete_config(config):
    """The loop's options with defaults filled in; a name it does not know is a TypeError that lists the known
    ones."""
    unknown = sorted(set(config) - set(DEFAULTS))
    if unknown:
        raise TypeError(
            f"training_loop got unknown options {', '.join(unknown)}; it knows {', '.join(DEFAULTS)}"
        )
    return dnnlib.EasyDict({**copy.deepcopy(DEFAULTS), **config})


def training_loop(rank=0, abort_fn=None, progress_fn=None, **config):
    """Trains until total_kimg thousand images, a stop signal, or abort_fn() says so.

    The options are the family's (see DEFAULTS), and: `device` ('cpu', 'cuda' or None: CUDA where there is one),
    `exact_resume` (go on from run_dir/checkpoint.pt), `transfer` (dotted name of the function that fills the
    networks from resume_pkl), `allow_partial` (differences that it may meet, see training.transfer), `resume_trust`
    (that file may run its own code), `tick_hooks` (dotted names of further hooks), `metric_kwargs` (passed on to the
    metrics), `best` (a name for running.parse_best, or None), `keep_last` (how many snapshots to keep, None: all),
    `log` (names of trackers.TRACKERS). progress_fn(kimg, total_kimg) is called at the start and at every tick.
    Returns True when training is complete, False when it was stopped (the checkpoint is written then).
    """
    run = Run(complete_config(config), rank, abort_fn, progress_fn)
    with StopSignals(verbose=run.is_main) as stop:
        run.stop = stop
        try:
            run.start()
            while not run.done:
                if run.must_stop():
                    run.checkpoint_now()
                    resume = dnnlib.util.shell_word(f"--resume={run.c.run_dir}")
                    run.say(f"Stopped at {run.kimg:.1f} kimg; go on with {resume}")
                    return False
                run.iterate()
                if run.tick_due():
                    run.tick()
        finally:
            run.close()
    run.say("")
    run.say("Exiting...")
    return True


class StopSignals:
    """Context in which the first SIGINT or SIGTERM sets `requested`, and a second one acts as it always
    does."""

    SAME = 2  # seconds within which further signals are the same request, sent to every process of a group

    def __init__(self, verbose=True):
        self.verbose = verbose

    def __enter__(self):
        self.requested = False
        self.since = None
        self._old = {}
        try:
            for number in [signal.SIGINT, signal.SIGTERM]:
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: signals are somebody else's business
            pass
        return self

    def _handle(self, number, _frame):
        now = time.monotonic()
        if self.since is None:
            self.requested, self.since = True, now
            if self.verbose:
                with contextlib.suppress(OSError, RuntimeError):  # our reader may be gone already
                    name = signal.Signals(number).name
                    print(f"\n{name}: finishing this step and saving; once more stops at once.", flush=True)
        elif now - self.since > self.SAME:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self):
        while self._old:
            number, handler = self._old.popitem()
            signal.signal(number, handler)

    def __exit__(self, *exc):
        self._restore()


def draw_seed(random_seed, rank, nimg):
    """A 63-bit seed from the run's seed, the rank and the images seen."""
    return int(np.random.SeedSequence([random_seed, rank, nimg]).generate_state(1, np.uint64)[0] >> 1)


class Run:
    """One training run: the networks and their helpers, counters, data, and what one iteration and one tick
    do."""

    def __init__(self, c, rank, abort_fn=None, progress_fn=None):
        self.c = c
        self.rank = rank
        self.abort_fn = abort_fn
        self.progress_fn = progress_fn
        kind = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = distributed.local_device(kind, rank)
        self.is_main = rank == 0
        self.stop = None
        self.done = False
        self.began = time.time()
        self.hooks = []
        self.clear_line = lambda: None  # takes away what is drawn on the terminal's last line

    def say(self, text):
        """Prints on the main process."""
        if self.is_main:
            self.clear_line()
            with contextlib.suppress(BrokenPipeError):  # a reader that left must not end a training
                print(text, flush=True)

    def close(self):
        """Lets the hooks finish and ends the processes that load data."""
        for hook in self.hooks:
            hook.close()
        shut_down = getattr(getattr(self, "batches", None), "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    @property
    def kimg(self):
        """Thousands of images seen."""
        return self.counters.nimg / 1e3

    def total_seconds(self):
        """Seconds spent on this run, in all its sessions."""
        return self.seconds_before + time.time() - self.began

    # --- setting up -----------------------------------------------------------------------------------------

    def start(self):
        """Builds everything, fills it from a snapshot or a checkpoint, and lets the hooks begin."""
        c = self.c
        _select_ops(c.ops)
        if self.device.type == "cuda":
            self.say(custom_ops.status())
        torch.backends.cudnn.benchmark = c.cudnn_benchmark
        torch.backends.cuda.matmul.allow_tf32 = c.allow_tf32
        torch.backends.cudnn.allow_tf32 = c.allow_tf32
        np.random.seed(c.random_seed * c.num_gpus + self.rank)
        torch.manual_seed(c.random_seed)  # every process builds the same networks
        self._load_data()
        numbers = dict(nimg=0, tick=0, tick_start_nimg=0, seconds=0.0)
        self.counters = checkpoint.Counters(**numbers, **self.data_identity)
        self._build_networks()
        if c.resume_pkl is not None and not c.exact_resume:
            self._transfer()
        self._show_networks()
        self._build_training()
        if c.exact_resume:
            self.checkpoint.load(c.run_dir)
            self._check_data()
            if self.is_main:
                checkpoint.cut_back_logs(c.run_dir, self.kimg)
            self.say(f"Continuing at {self.kimg:.1f} kimg...")
            self.done = self.counters.nimg >= c.total_kimg * 1000
        for module in [self.G, self.D, self.G_ema]:
            distributed.broadcast_module(module)
        self.hooks = [
            dnnlib.util.construct_class_by_name(self, class_name=name)
            for name in [*STANDARD_HOOKS, *c.tick_hooks]
        ]
        self.pictures, self.results = {}, {}
        for hook in self.hooks:
            hook.start()
        self.batches = self._iterate_data()
        self.say(f"Training for {c.total_kimg} kimg...")
        self.say("")
        self.seconds_before = self.counters.seconds
        self.tick_began, self.tick_began_nimg = time.time(), self.counters.nimg
        self.saved = self.agreed = time.monotonic()
        self.agree_every = self.until_agreed = 1
        self.maintenance_seconds = self.tick_began - self.began

    def _load_data(self):
        self.say("Loading training set...")
        self.training_set = dnnlib.util.construct_class_by_name(**self.c.training_set_kwargs)
        self.say("")
        self.say(f"Num images:  {len(self.training_set)}")
        self.say(f"Image shape: {self.training_set.image_shape}")
        self.say(f"Label shape: {self.training_set.label_shape}")
        self.say("")
        # data sets of a user's own need no digest
        digest = getattr(self.training_set, "order_digest", lambda: None)()
        self.data_identity = dict(num_raw=self.training_set.num_raw, data_digest=digest)

    def _check_data(self):
        had, has, path = self.counters, self.data_identity, self.c.training_set_kwargs.path
        change = None
        if had.num_raw != has["num_raw"]:
            change = f"{path} holds {has['num_raw']} pictures, {had.num_raw} when the run began"
        elif had.data_digest != has["data_digest"]:
            change = f"{path} has other file names or labels than when the run began"
        if change:
            raise checkpoint.CheckpointError(
                f"{change}: exact continuation is not possible; start a new run from a snapshot"
            )

    def _iterate_data(self):
        """Endless batches (images uint8 [n, C, H, W], labels) from the place where the run stands."""
        c = self.c
        sampler = misc.InfiniteSampler(
            self.training_set,
            rank=self.rank,
            num_replicas=c.num_gpus,
            seed=c.random_seed,
            start=self.counters.nimg // c.num_gpus,
        )
        loader = torch.utils.data.DataLoader(
            dataset=self.training_set,
            sampler=sampler,
            batch_size=c.batch_size // c.num_gpus,
            generator=torch.Generator(),  # its own, so that it draws nothing from the run's
            **misc.loader_options(self.device, **c.data_loader_kwargs),
        )
        return iter(loader)

    def _build_networks(self):
        self.say("Constructing networks...")
        c, common = self.c, network_shapes(self.training_set)
        build = dnnlib.util.construct_class_by_name
        self.G = build(**c.G_kwargs, **common).train().requires_grad_(False).to(self.device)
        self.D = build(**c.D_kwargs, **common).train().requires_grad_(False).to(self.device)
        self.G_ema = copy.deepcopy(self.G).eval()

    @torch.no_grad()
    def _show_networks(self):
        """Prints a table of each network. Of G_ema for G: its average of w stays as it is."""
        if not self.is_main:
            return
        n, G = self.c.batch_gpu, self.G_ema
        z, label = (torch.zeros([n, size], device=self.device) for size in [G.z_dim, G.c_dim])
        with contextlib.suppress(BrokenPipeError):
            img = misc.print_module_summary(G, [z, label])
            misc.print_module_summary(self.D, [img, label])

    def _build_training(self):
        c = self.c
        self.augment = self._build_augment()
        cpu = f", {c.num_gpus} process{'es' * (c.num_gpus > 1)} on the CPU"
        on_cpu = self.device.type == "cpu"
        self.say(f"Distributing across {0 if on_cpu else c.num_gpus} GPUs{cpu if on_cpu else ''}...")
        self.loss = dnnlib.util.construct_class_by_name(
            device=self.device,
            G_mapping=self.G.mapping,
            G_synthesis=self.G.synthesis,
            D=self.D,
            augment_pipe=self.augment.pipe,
            **c.loss_kwargs,
        )
        self.say("Setting up training phases...")
        self.phases, self.optimizers = phases.build_phases(
            self.loss.phase_rows(c.G_reg_interval, c.D_reg_interval),
            modules=dict(G=self.G, D=self.D),
            opt_kwargs=dict(G=c.G_opt_kwargs, D=c.D_opt_kwargs),
        )
        self.average = controllers.WeightAverage(self.G, self.G_ema, kimg=c.ema_kimg, rampup=c.ema_rampup)
        self.stats = training_stats.Collector(regex=".*")
        self.checkpoint = checkpoint.Checkpoint(
            counters=self.counters,
            G=self.G,
            D=self.D,
            G_ema=self.G_ema,
            G_opt=self.optimizers["G"],
            D_opt=self.optimizers["D"],
            augment=self.augment,
            loss=self.loss,
            reported=training_stats,
            stats=self.stats,
        )

    def _build_augment(self):
        c = self.c
        if c.augment_kwargs is None or (c.augment_p == 0 and c.ada_target is None):
            return controllers.FixedAugment()
        self.say("Setting up augmentation...")
        pipe = (
            dnnlib.util.construct_class_by_name(**c.augment_kwargs)
            .train()
            .requires_grad_(False)
            .to(self.device)
        )
        if c.ada_target is None:
            return controllers.FixedAugment(pipe, c.augment_p)
        return controllers.AdaptiveAugment(
            pipe, c.augment_p, target=c.ada_target, interval=c.ada_interval, kimg=c.ada_kimg
        )

    def _transfer(self):
        self.say(f'Resuming from "{self.c.resume_pkl}"')
        source = snapshot.take_planned(self.c.resume_pkl, trust=self.c.resume_trust)
        nets = [self.G, self.D, self.G_ema]
        rows = dnnlib.util.call_func_by_name(source, *nets, self.c.allow_partial, func_name=self.c.transfer)
        self.say(coverage_table(rows))
        strength = 0.0 if source["augment_pipe"] is None else float(source["augment_pipe"].p)
        if strength > 0 and self.c.ada_target is not None and self.c.augment_p == 0:
            self.say(
                f"Its augmentation strength was {strength:.3f}, this run begins with 0:"
                " --initstrength=resume takes it over"
            )
        self.say("")

    # --- one iteration --------------------------------------------------------------------------------------

    def iterate(self):
        """One step of every phase that is due, then the weight average and ADA."""
        c, nimg = self.c, self.counters.nimg
        batch_idx = nimg // c.batch_size
        due = [phase for phase in self.phases if batch_idx % phase.interval == 0]
        torch.manual_seed(draw_seed(c.random_seed, self.rank, nimg))
        real_img, real_c = self._next_batch()
        for phase, gen_z, gen_c in zip(due, *self._draw_latents(len(due)), strict=True):
            rounds = zip(*(part.split(c.batch_gpu) for part in [real_img, real_c, gen_z, gen_c]), strict=True)
            phase.step(self.loss, rounds)
        self.average.update(c.batch_size, nimg)
        self.counters.nimg += c.batch_size
        self.augment.update(c.batch_size, batch_idx)
        self.done = self.counters.nimg >= c.total_kimg * 1000
        for hook in self.hooks:
            hook.step()

    def _next_batch(self):
        img, label = next(self.batches)
        img, label = (each.to(self.device, non_blocking=True) for each in [img, label])
        return to_float(img), label

    def _draw_latents(self, count):
        """`count` batches of z and of random labels of the training set."""
        size = self.c.batch_size // self.c.num_gpus
        z = torch.randn([count, size, self.G.z_dim], device=self.device)
        if not self.training_set.has_labels:
            return z, torch.zeros([count, size, 0], device=self.device)
        picks = torch.randint(len(self.training_set), [count * size]).tolist()
        labels = torch.from_numpy(np.stack([self.training_set.get_label(i) for i in picks]))
        return z, labels.reshape(count, size, -1).to(self.device, non_blocking=True)

    # --- one tick -------------------------------------------------------------------------------------------

    def tick_due(self):
        """After the first iteration, every kimg_per_tick thousand images, and at the end."""
        since = self.counters.nimg - self.counters.tick_start_nimg
        return self.done or self.counters.tick == 0 or since >= self.c.kimg_per_tick * 1000

    def tick(self):
        """Closes a tick: statistics, then the hooks in their order."""
        now = time.time()
        counters = self.counters
        self.this_tick = dnnlib.EasyDict(
            index=counters.tick,
            seconds=now - self.tick_began,
            images=counters.nimg - self.tick_began_nimg,  # those of this session only, as the seconds
            maintenance=self.maintenance_seconds,
        )
        if self.abort_fn is not None and not self.done and self.abort_fn():
            self.done = True
            self.say("")
            self.say("Aborting...")
        counters.tick += 1
        counters.tick_start_nimg = counters.nimg
        self.pictures, self.results = {}, {}
        for hook in self.hooks:
            hook.tick()
        self.tick_began, self.tick_began_nimg = time.time(), counters.nimg
        self.maintenance_seconds = self.tick_began - now

    def must_stop(self):
        """Whether any process was asked to stop; all processes agree. Saves a checkpoint where it is time.

        Several processes ask each other every so many iterations, the same number in all of them.
        """
        self.until_agreed -= 1
        if self.until_agreed > 0:
            return False
        now = time.monotonic()
        seconds, self.agreed = now - self.agreed, now
        late = self.is_main and now - self.saved > CHECKPOINT_SECONDS
        flags = [self.stop.requested, late, seconds]
        stop, late, seconds = distributed.maximum(flags, device=self.device)
        if distributed.get_world_size() > 1:
            per_iteration = max(seconds / self.agree_every, 1e-6)
            # no more than twice as many as before: the first iterations tell little
            self.agree_every = max(min(int(AGREE_SECONDS / per_iteration), 2 * self.agree_every), 1)
        self.until_agreed = self.agree_every
        if late and not stop:
            self.checkpoint_now()
        return bool(stop)

    def checkpoint_now(self):
        """Saves run_dir/checkpoint.pt, at any iteration. All processes call it: statistics are summed first."""
        self.counters.seconds = self.total_seconds()
        self.saved = time.monotonic()
        if self.is_main:
            self.checkpoint.save(self.c.run_dir)
        else:
            training_stats.state_dict()


def _select_ops(mode):
    try:
        custom_ops.select(mode)
    except RuntimeError as err:
        raise OSError(f"--ops={mode}: {err}") from err
