# SPDX-License-Identifier: Apache-2.0
"""Tick hooks of spatial generators: a sheet of change maps beside each grid of fakes, and SPADE's statistics."""

import numpy as np
import torch

from ssn_ext import figures, resampling
from ssn_ext.grids import block_counts, grids_of
from torch_utils.images import to_uint8, write_png
from training.hooks import Hook

PICTURES = 6
STATISTICS_OF = 256  # pictures
STATISTICS_BATCH = 32


class ChangeMaps(Hook):
    """changes%06d.png: what re-drawing each block changes, for the same latents throughout a run."""

    def start(self):
        """Draws the latents, from the run's seed alone."""
        run = self.run
        rnd = torch.Generator().manual_seed(run.c.random_seed)
        self.z, self.fresh = torch.randn([2, PICTURES, run.G.z_dim], generator=rnd)
        self.c = torch.zeros([PICTURES, run.G.c_dim])
        if run.G.c_dim:
            self.c = torch.stack([torch.from_numpy(run.training_set.get_label(i)) for i in range(PICTURES)])

    @torch.no_grad()
    def tick(self):
        """Writes the sheet when the grids of fakes are due."""
        run = self.run
        if not run.is_main or not self.due(run.c.image_snapshot_ticks):
            return
        G, device = run.G_ema, run.device
        grids = grids_of(G)
        count = sum(block_counts(grids))
        shown = sorted({round(i) for i in np.linspace(0, count - 1, min(count, 16))})
        pictures = resampling.resample_each(
            G, self.z.to(device), self.c.to(device), self.fresh.to(device), shown
        )
        pictures = [
            to_uint8(each).permute(0, 2, 3, 1).cpu().numpy() for each in pictures
        ]  # each [N, H, W, C]
        before, after = pictures[0], pictures[1:]
        sheet = figures.change_sheet(
            list(before), [[step[n] for step in after] for n in range(PICTURES)], shown, grids
        )
        write_png(self.path(f"changes{run.counters.nimg // 1000:06d}.png"), sheet)


class AverageStatistics(Hook):
    """Measures the batch statistics of G_ema anew before each tick shows, saves or judges its pictures.

    Those that G keeps while it trains, which the weight average copies, belong to other weights.
    """

    def start(self):
        """Draws the latents, from the run's seed alone, so that all processes agree."""
        run = self.run
        rnd = torch.Generator().manual_seed(run.c.random_seed)
        self.z = torch.randn([STATISTICS_OF, run.G.z_dim], generator=rnd)
        self.c = torch.zeros([STATISTICS_OF, run.G.c_dim])
        if run.G.c_dim:
            picks = torch.randint(len(run.training_set), [STATISTICS_OF], generator=rnd).tolist()
            self.c = torch.from_numpy(np.stack([run.training_set.get_label(i) for i in picks]))

    def step(self):
        """Measures, where a tick comes next."""
        run = self.run
        if run.tick_due():
            measure_statistics(run.G_ema, self.z.to(run.device), self.c.to(run.device))


@torch.no_grad()
def measure_statistics(G, z, c):
    """Sets the running statistics of a SPADE generator to their means over batches of these latents.

    z [N, z_dim], c [N, c_dim]; constant noise. Only layers with statistics work in training mode meanwhile.
    """
    layers = [module for module in G.modules() if hasattr(module, "running_var")]
    for layer in layers:
        layer.count.zero_()
        layer.train()
    for part, labels in zip(z.split(STATISTICS_BATCH), c.split(STATISTICS_BATCH), strict=True):
        G(part, labels, noise_mode="const")
    for layer in layers:
        layer.eval()
