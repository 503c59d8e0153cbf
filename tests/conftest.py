# SPDX-License-Identifier: Apache-2.0
"""A tiny training run through train.py, in this process."""

import json
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: before torch counts the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

TINY = """
    --cfg=laptop --gpus=0 --workers=0 --batch=4 --metrics=none --set=G_kwargs.synthesis_kwargs.channel_max=8
    --set=D_kwargs.channel_max=8 --set=G_kwargs.z_dim=8 --set=G_kwargs.w_dim=8
""".split()
SHORT = ["--set=kimg_per_tick=0.008", "--set=total_kimg=0.024", "--set=image_snapshot_ticks=null"]


class Result:
    """What a command printed, its exit status, and the run directory that it made (None for none)."""

    def __init__(self, outdir, before, result):
        self.output, self.status = result.output, result.exit_code
        new = sorted(set(outdir.iterdir() if outdir.exists() else []) - before)
        self.dir = new[-1] if new else None

    def snapshots(self):
        """Names of the snapshots, in order."""
        return sorted(path.name for path in self.dir.glob("network-snapshot-*.pkl"))

    def networks(self, name=None):
        """The dict of a snapshot, by default the last."""
        from training import snapshot

        return snapshot.load_network_pkl(self.dir / (name or self.snapshots()[-1]))

    def checkpoint(self):
        """The state in checkpoint.pt."""
        from training import checkpoint

        return checkpoint.read(str(self.dir))

    def stats(self):
        """The lines of stats.jsonl."""
        return [json.loads(line) for line in (self.dir / "stats.jsonl").read_text().splitlines()]

    def options(self):
        """training_options.json."""
        return json.loads((self.dir / "training_options.json").read_text())


@pytest.fixture
def own_cache(tmp_path):
    """A cache of the test's own; the folder of the metrics in it."""
    from dnnlib import util

    util.set_cache_dir(str(tmp_path / "cache"))
    yield tmp_path / "cache" / "gan-metrics"
    util.set_cache_dir(None)


@pytest.fixture(scope="session")
def ds(tmp_path_factory):
    """Folder `ds` of 12 random 8x8 pictures with two classes."""
    folder = tmp_path_factory.mktemp("data") / "ds"
    folder.mkdir()
    rnd = np.random.RandomState(0)
    for i in range(12):
        PIL.Image.fromarray(rnd.randint(256, size=[8, 8, 3], dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [[f"{i:02d}.png", i % 2] for i in range(12)]}))
    return folder


@pytest.fixture
def tiny_run(ds, tmp_path):
    """Function that trains: 24 pictures in 6 iterations and 4 ticks unless short=False. new=False adds no options."""
    import train
    from torch_utils import training_stats

    def run(*args, new=True, short=True, outdir=Path(tmp_path) / "runs"):
        training_stats.load_state_dict({})  # as in a process of its own
        before = set(outdir.iterdir()) if outdir.exists() else set()
        given = [f"--outdir={outdir}", *map(str, args)]
        given[1:1] = [f"--data={ds}", *TINY, *(SHORT if short else [])] if new else []
        return Result(outdir, before, CliRunner().invoke(train.build_command(), given))

    return run
