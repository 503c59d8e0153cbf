# SPDX-License-Identifier: Apache-2.0
"""The tick hook of spatial generators: a sheet of change maps beside each grid of fakes."""

import numpy as np
import torch

from ssn_ext import figures, resampling
from torch_utils.images import to_uint8, write_png
from training.hooks import Hook

PICTURES = 6


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
        count = G.latent_grid[0] * G.latent_grid[1]
        shown = sorted({round(i) for i in np.linspace(0, count - 1, min(count, 16))})
        pictures = resampling.resample_each(
            G, self.z.to(device), self.c.to(device), self.fresh.to(device), shown
        )
        pictures = [
            to_uint8(each).permute(0, 2, 3, 1).cpu().numpy() for each in pictures
        ]  # each [N, H, W, C]
        before, after = pictures[0], pictures[1:]
        sheet = figures.change_sheet(
            list(before), [[step[n] for step in after] for n in range(PICTURES)], shown, G.latent_grid
        )
        write_png(self.path(f"changes{run.counters.nimg // 1000:06d}.png"), sheet)
