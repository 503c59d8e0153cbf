# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases: scalars, metrics and picture grids of a run, for who asks for them (--log)."""

import importlib
import json
import math
import os
import uuid

import dnnlib
from torch_utils.images import read_image
from training.hooks import Hook


class TrackerError(ValueError):
    """A tracker that cannot be used."""


class TensorBoard:
    """events.out.tfevents.* in the run directory."""

    MODULE, PACKAGE = "torch.utils.tensorboard", "tensorboard"

    def __init__(self, run):
        from torch.utils.tensorboard import SummaryWriter

        # what a continued run had written past its checkpoint is not shown any more
        purge_step = int(run.kimg) + 1 if run.c.exact_resume else None
        self.writer = SummaryWriter(run.c.run_dir, purge_step=purge_step)

    def log(self, scalars, pictures, step):
        """Scalars by name, pictures as name -> path, at `step` = whole kimg."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, global_step=step)
        for name, path in pictures.items():
            self.writer.add_image(name, read_image(path), global_step=step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        """Closes the file."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases, named after the run directory; wandb.json there holds its id, so that a continued run
    goes on in the same one. Project, entity and mode are wandb's own settings (WANDB_PROJECT, WANDB_MODE, ...)."""

    MODULE, PACKAGE = "wandb", "wandb"

    def __init__(self, run):
        import wandb

        folder = os.path.abspath(run.c.run_dir)
        path = os.path.join(folder, "wandb.json")
        if run.c.exact_resume and os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                run_id = json.load(f)["id"]
        else:
            run_id = uuid.uuid4().hex[:12]
            with dnnlib.util.open_atomic(path) as f:
                f.write(json.dumps(dict(id=run_id)).encode("utf-8"))
        self.make_image = wandb.Image
        name = os.path.basename(folder)
        self.run = wandb.init(id=run_id, resume="allow", name=name, dir=folder, config=dict(run.c))

    def log(self, scalars, pictures, step):
        """Scalars by name, pictures as name -> path, at `step` = whole kimg."""
        images = {name: self.make_image(path) for name, path in pictures.items()}
        self.run.log({**scalars, **images}, step=step)

    def close(self):
        """Sends the rest."""
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def why_unavailable(name):
    """One line saying why a tracker cannot be used here, or None."""
    tracker = TRACKERS[name]
    try:
        importlib.import_module(tracker.MODULE)
    except ImportError as err:
        return (
            f"--log={name} needs the Python package {tracker.PACKAGE} (pip install {tracker.PACKAGE}): {err}"
        )
    return None


class Trackers(Hook):
    """Passes statistics, Metrics/<name> and new picture grids on to the trackers of the run."""

    def __init__(self, run):
        super().__init__(run)
        self.trackers = []

    def start(self):
        """Opens them; TrackerError where one refuses."""
        run = self.run
        for name in run.c.log if run.is_main else []:
            try:
                self.trackers.append(TRACKERS[name](run))
            except Exception as err:  # no account, no network, a full disk: theirs to say
                raise TrackerError(f"--log={name}: {err}") from err
        self._log({})

    def tick(self):
        """Passes on what this tick brought."""
        run = self.run
        stats = {name: each.mean for name, each in run.stats.as_dict().items() if each.num}
        numbers = (pair for results in run.results.values() for pair in results.items())
        metrics = {f"Metrics/{name}": value for name, value in numbers if isinstance(value, int | float)}
        self._log({name: value for name, value in {**stats, **metrics}.items() if not math.isnan(value)})

    def _log(self, scalars):
        for tracker in list(self.trackers):
            try:
                tracker.log(scalars, self.run.pictures, int(self.run.kimg))
            except Exception as err:  # a log that fails must not end a training
                self.run.say(
                    f"Warning: going on without {type(tracker).__name__}: {type(err).__name__}: {err}"
                )
                self.trackers.remove(tracker)

    def close(self):
        """Closes them."""
        for tracker in self.trackers:
            tracker.close()
