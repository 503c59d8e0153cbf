# SPDX-License-Identifier: Apache-2.0
"""A run in small, before its directory is made: everything that options describe is built once.

On PyTorch's device 'meta', where tensors have shapes and no values, so that it takes no time or memory. What a
constructor refuses ends here, with the names of the options, and so does a --resume file that does not fit.
"""

import copy
import traceback

import dnnlib
from training.settings import ConfigError
from training.shapes import network_shapes


def check_parts(c, assignments):
    """Builds data, networks, augmentation, loss and optimisers of a run; the pictures of one round go through both
    networks. ConfigError naming those of `assignments` ('a.b=json', from --set) that are to blame."""
    import torch

    from training import phases

    build = dnnlib.util.construct_class_by_name
    with _blame(assignments, "training_set_kwargs"):
        data = build(**c.training_set_kwargs)
        data.close()
    with torch.device("meta"):
        with _blame(assignments, "G_kwargs"):
            G = build(**c.G_kwargs, **network_shapes(data)).train()
            z, label = (torch.zeros([c.batch_gpu, size]) for size in [G.z_dim, G.c_dim])
            img = G(z, label)
        with _blame(assignments, "D_kwargs"):
            D = build(**c.D_kwargs, **network_shapes(data)).train()
            D(img, label)
        pipe = None
        if c.get("augment_kwargs"):
            with _blame(assignments, "augment_kwargs"):
                pipe = build(**c.augment_kwargs)
        with _blame(assignments, "loss_kwargs"):
            parts = dict(G_mapping=G.mapping, G_synthesis=G.synthesis, D=D, augment_pipe=pipe)
            loss = build(device=torch.device("meta"), **parts, **c.loss_kwargs)
            rows = loss.phase_rows(c.get("G_reg_interval", 4), c.get("D_reg_interval", 16))
        for net, module in [("G", G), ("D", D)]:
            with _blame(assignments, f"{net}_opt_kwargs"):
                phases.build_phases(
                    [row for row in rows if row.net == net], {net: module}, {net: c[f"{net}_opt_kwargs"]}
                )


def check_transfer(c, source):
    """Fills networks without values from those of the --resume file; ConfigError where these do not match."""
    import torch

    from training.transfer import CoverageError

    build = dnnlib.util.construct_class_by_name
    data = build(**c.training_set_kwargs)
    data.close()
    with torch.device("meta"):
        G, D = (build(**c[key], **network_shapes(data)) for key in ("G_kwargs", "D_kwargs"))
        nets = [G, D, copy.deepcopy(G)]
    function = c.get("transfer", "training.transfer.transfer")
    try:
        dnnlib.util.call_func_by_name(source, *nets, c.get("allow_partial", []), func_name=function)
    except CoverageError as err:
        raise ConfigError(f"--resume: {err}") from err


class _blame:
    """Context: what is raised in it becomes a ConfigError that names the --set of this part, or else all of them."""

    def __init__(self, assignments, part):
        self.names = [each for each in assignments if each.startswith(f"{part}.")] or list(assignments)

    def __enter__(self):
        return self

    def __exit__(self, _kind, err, _trace):
        if not isinstance(err, Exception):
            return
        text = " ".join((str(err).strip().splitlines() or [""])[0].split())
        if isinstance(err, AssertionError) and not text:
            text = traceback.extract_tb(err.__traceback__)[-1].line
        kind = "" if isinstance(err, ValueError) else f"{type(err).__name__}: "
        raise ConfigError(f"--set {', '.join(self.names)}: {kind}{text}"[:600]) from err
