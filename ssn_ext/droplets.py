# SPDX-License-Identifier: Apache-2.0
"""Droplets: how a generator's feature maps are looked at, and how much they peak (figure 4 of the SSN paper).

A generator whose layers normalise by statistics of their own input can send a signal past them through one small spot
that is far stronger than the rest: it sets the statistics, and so the strength of everything else. Such spots are hard
to see in the picture and easy to see in the feature maps (Karras et al. 2020, arXiv:1912.04958, section 2): so we take
each layer's features h [C, H, W], the norm over channels at every position, and divide it by its mean,

    norm(x, y) = |h(:, x, y)|,      peak = max norm / mean norm      (1 for a map without any structure)
"""

import re
from collections.abc import Iterator

import torch

from metrics import metric_utils

NUM_PICTURES = 256
BATCH = 32


def conv_layers(G: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Name below G.synthesis -> its 3x3 convolution layers in order, an encoder's left out.

    Any generator of the family: layers are told by their weight [O, I, k, k] with k > 1. ValueError where there is
    none.
    """
    found = {}
    for name, module in G.synthesis.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 4 and weight.shape[2] > 1:
            if not re.search(r"(^|\.)encoder", name):
                found[name] = module
    if not found:
        raise ValueError(
            f"{type(G).__name__} has no convolutions larger than 1x1 whose features could be shown"
        )
    return found


@torch.no_grad()
def feature_norms(
    G: torch.nn.Module, ws: torch.Tensor, noise_mode: str = "const"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pictures [N, C, H, W] of ws [N, num_ws, w_dim], and layer -> the norms of its output, float32 [N, H', W'].

    The outputs are those of whole layers: after noise, bias and activation.
    """
    norms, handles = {}, []
    for name, module in conv_layers(G).items():

        def keep(_module, _inputs, output, name=name):
            norms[name] = output.detach().to(torch.float32).square().sum(dim=1).sqrt()

        handles.append(module.register_forward_hook(keep))
    try:
        return G.synthesis(ws, noise_mode=noise_mode), norms
    finally:
        for handle in handles:
            handle.remove()


def peak_to_mean(norms: torch.Tensor) -> torch.Tensor:
    """max / mean over positions of maps [N, H, W] >= 0 -> [N]; 1 for a map of zeros."""
    mean = norms.mean(dim=[1, 2])
    return torch.where(mean > 0, norms.amax(dim=[1, 2]) / mean.clamp(min=1e-30), torch.ones_like(mean))


def droplet(opts) -> dict[str, float]:
    """Peak-to-mean ratio of feature norms, for any generator; droplets raise it.

    G_ema, constant noise, NUM_PICTURES latents. Results: droplet, the mean over layers, and its standard error over
    latents; droplet_worst, the largest of the layers' means; and every layer's mean, droplet_<layer>.
    """
    G = metric_utils.copy_of_generator(opts)
    if opts.rank != 0:
        return {}
    layers = {}
    for ws in _latents(opts, G):
        _pictures, norms = feature_norms(G, ws)
        for name, each in norms.items():
            layers.setdefault(name, []).append(peak_to_mean(each).double().cpu())
    table = torch.stack([torch.cat(parts) for parts in layers.values()])  # [layers, N]
    per_latent, per_layer = table.mean(dim=0), table.mean(dim=1)
    opts.details.update(num_latents=NUM_PICTURES, noise_mode="const")
    return {
        "droplet": float(per_latent.mean()),
        "droplet_stderr": float(per_latent.std() / len(per_latent) ** 0.5),
        "droplet_worst": float(per_layer.max()),
        **{f"droplet_{name}": float(value) for name, value in zip(layers, per_layer, strict=True)},
    }


droplet.better = "lower"


def _latents(opts, G) -> Iterator[torch.Tensor]:
    """ws of NUM_PICTURES latents, each from (seed, number) alone, with random labels of the data set."""
    dataset = metric_utils.label_dataset(opts)
    labels = 0 if dataset is None else len(dataset)
    progress = opts.progress.sub(tag="droplets", num_items=NUM_PICTURES, flush_interval=64)
    done = 0
    for numbers in metric_utils.chunks(range(NUM_PICTURES), BATCH):
        z, _t, picks = metric_utils.latents(opts, numbers, num_labels=labels)
        c = metric_utils.labels_for(opts, dataset, picks)
        yield G.mapping(z[:, 0].to(opts.device), c[:, 0])
        done += len(numbers)
        progress.update(done)
