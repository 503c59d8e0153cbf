# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2's loss against golden gradients and the reference numbers of its phases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import overflow_and_recover
from torch_utils import training_stats
from training.loss import StyleGAN2Loss
from training.networks import Discriminator, Generator

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_networks():
    data = np.load(GOLDEN / "loss_gradients.npz")
    with np.load(GOLDEN / "networks_skip_resnet.npz") as networks:
        config = json.loads(str(networks["config"]))
    G, D = Generator(**config["G"]), Discriminator(**config["D"])
    for name, net in [("G", G), ("D", D)]:
        prefix = f"{name}."
        net.load_state_dict({k[2:]: torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)})
    return data, G.train().requires_grad_(False), D.train().requires_grad_(False)


@pytest.mark.parametrize("phase", ["Gmain", "Dmain", "Dreg", "Dboth"])
def test_golden_gradients(phase):
    data, G, D = golden_networks()
    loss = StyleGAN2Loss("cpu", G.mapping, G.synthesis, D, style_mixing_prob=0, pl_weight=0, r1_gamma=10)
    net = G if phase.startswith("G") else D
    net.requires_grad_(True)
    c = torch.zeros(4, 0)
    loss._generated_loss = torch.zeros([])
    loss.accumulate_gradients(
        phase, torch.from_numpy(data["real"]), c, torch.from_numpy(data["z"]), c, gain=2
    )
    want = {k[len(phase) + 1 :]: torch.from_numpy(data[k]) for k in data.files if k.startswith(f"{phase}.")}
    # the gradient of a noise strength depends on the noise that was drawn
    want = {k: v for k, v in want.items() if not k.endswith("noise_strength")}
    total = sum(float(v.square().sum()) for v in want.values()) ** 0.5
    params = dict(net.named_parameters())
    for name, value in want.items():
        got = torch.zeros_like(value) if params[name].grad is None else params[name].grad
        # R1's gradients of biases are a millionth of the whole: their own rounding errors are larger than
        # 1e-4
        assert (got - value).norm() <= 1e-4 * value.norm() + 1e-6 * total, name
    assert len(want) > 10


def test_reference_numbers_of_all_phases():
    """Sum of squared gradients of each phase, pl_mean, w_avg and the reported statistics (contract, appendix
    A)."""
    torch.manual_seed(0)
    G = Generator(
        16,
        0,
        16,
        16,
        3,
        mapping_kwargs=dict(num_layers=2),
        synthesis_kwargs=dict(channel_base=128, channel_max=32),
    )
    torch.manual_seed(1)
    D = Discriminator(c_dim=0, img_resolution=16, img_channels=3, channel_base=128, channel_max=32)
    G.train().requires_grad_(False), D.train().requires_grad_(False)
    stats = training_stats.Collector()
    loss = StyleGAN2Loss("cpu", G.mapping, G.synthesis, D, r1_gamma=10)
    real = torch.from_numpy(np.random.RandomState(1).randn(4, 3, 16, 16)).clamp(-1, 1).float()
    z = torch.from_numpy(np.random.RandomState(2).randn(4, 16)).float()
    c = torch.zeros(4, 0)
    want = dict(Gmain=0.0960828, Greg=1132.871, Dmain=0.1593885, Dreg=0.8562037)
    for phase, gain in [("Gmain", 1), ("Greg", 4), ("Dmain", 1), ("Dreg", 16)]:
        net = G if phase.startswith("G") else D
        net.requires_grad_(True)
        net.zero_grad()
        torch.manual_seed(7)
        loss.accumulate_gradients(phase, real, c, z, c, gain=gain)
        net.requires_grad_(False)
        total = sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
        assert total == pytest.approx(want[phase], rel=1e-3), phase
    stats.update()
    assert float(loss.pl_mean) == pytest.approx(0.01337426, rel=1e-3)
    assert float(G.mapping.w_avg.sum()) == pytest.approx(0.03507577, rel=1e-3)
    reported = {"G/loss": 0.649752, "pl_penalty": 1.926328, "G/reg": 3.852655, "D/loss": 1.450417}
    reported.update({"r1_penalty": 0.010686, "D/reg": 0.053431})
    for name, value in reported.items():
        assert stats[f"Loss/{name}"] == pytest.approx(value, rel=1e-3), name


def test_an_overflow_does_not_stay_in_the_mean_of_path_lengths():
    G = Generator(8, 0, 8, 8, 3, synthesis_kwargs=dict(channel_base=64, channel_max=8))
    loss = StyleGAN2Loss("cpu", G.mapping, G.synthesis, None)
    overflow_and_recover(loss.path_length, lambda: loss.pl_mean, G)


def test_terms_of_weight_zero_cost_nothing():
    G, D = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    loss = StyleGAN2Loss("cpu", G, G, D, r1_gamma=0, pl_weight=0)
    loss.accumulate_gradients("Greg", None, None, None, None)  # would fail if it ran a network
    loss.accumulate_gradients("Dreg", None, None, None, None)


def test_unknown_phase():
    with pytest.raises(ValueError, match="unknown phase 'Gfoo': expected one of Gmain, Greg"):
        StyleGAN2Loss("cpu", None, None, None).accumulate_gradients("Gfoo", None, None, None, None)
