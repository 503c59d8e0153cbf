# SPDX-License-Identifier: Apache-2.0
"""torch_utils.distributed: alone, and in two processes started once for the whole file."""

import json

import pytest
import torch

from tests.helpers import run_worker
from torch_utils import distributed

WORKER = '''\
"""What two processes do; each writes what it saw to result<rank>.json."""
import json
import os
import sys
import torch
from torch_utils import distributed, misc, training_stats


def grads(rank):
    rng = torch.Generator().manual_seed(rank)
    values = [torch.randn(shape, generator=rng) for shape in ([2, 3], [], [4])]
    if rank == 1:
        values[2][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return values


def work(rank, folder):
    seen = dict(rank=distributed.get_rank(), size=distributed.get_world_size(), main=distributed.is_main())
    seen["object"] = distributed.broadcast_object(["from", rank] if rank == 1 else None, src=1)
    seen["average"] = distributed.average(torch.tensor([rank, 4.0 * rank])).tolist()
    seen["any"] = [distributed.any_rank(flag) for flag in (rank == 1, False, True)]

    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads(rank)]
    for param, grad in zip(params, grads(rank)):
        param.grad = grad
    identity = [id(param.grad) for param in params]
    distributed.all_reduce_gradients([params[0], torch.nn.Parameter(torch.ones(9)), *params[1:]])
    assert identity == [id(param.grad) for param in params]
    seen["grads"] = [param.grad.tolist() for param in params]

    torch.manual_seed(rank)
    module = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    module.register_buffer("count", torch.tensor(rank + 5))
    module.register_buffer("flag", torch.tensor([rank == 1, True]))
    try:
        misc.check_ddp_consistency(module, ignore_regex=r"Conv2d\\.(count|flag)")
        seen["difference"] = None
    except AssertionError as error:
        seen["difference"] = str(error)
    seen["before"] = module.weight.flatten().tolist()
    distributed.broadcast_module(module, src=1)
    misc.check_ddp_consistency(module)
    seen["after"] = module.weight.flatten().tolist()
    seen["buffers"] = [module.count.item(), module.flag.tolist()]
    seen["channels_last"] = module.weight.is_contiguous(memory_format=torch.channels_last)

    training_stats.init_multiprocessing(rank, torch.device("cpu"))
    collector = training_stats.Collector()
    training_stats.report("both", [1.0, 2.0] if rank == 0 else [6.0])
    training_stats.report0("first", 10.0 * (rank + 1))
    seen["state"] = training_stats.state_dict()
    collector.update()
    seen["stats"] = collector.as_dict()
    with open(os.path.join(folder, f"result{rank}.json"), "w") as file:
        json.dump(seen, file)


def die(rank, folder):
    if rank == 1:
        os._exit(3)
    distributed.barrier()
    distributed.barrier()


if __name__ == "__main__":
    for fn in (work, die):
        try:
            distributed.launch(fn, 2, (sys.argv[1],), device_type="cpu")
            outcome = "fine"
        except Exception as error:
            outcome = str(error)
        with open(os.path.join(sys.argv[1], f"{fn.__name__}.txt"), "w") as file:
            file.write(outcome)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder in which WORKER has left its results. It gets two minutes: a hang is a failure."""
    folder = tmp_path_factory.mktemp("two")
    run_worker(folder, WORKER, seconds=120)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    assert (folder / "work.txt").read_text() == "fine"
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(2)]


class TestTwoProcesses:
    def test_ranks(self, results):
        assert [(r["rank"], r["size"], r["main"]) for r in results] == [(0, 2, True), (1, 2, False)]
        assert [r["object"] for r in results] == [["from", 1]] * 2
        assert [r["any"] for r in results] == [[True, False, True]] * 2
        assert [r["average"] for r in results] == [[0.5, 2.0]] * 2

    def test_gradients_are_the_mended_mean(self, results):
        draws = []
        for rank in range(2):
            rng = torch.Generator().manual_seed(rank)
            draws.append([torch.randn(shape, generator=rng) for shape in ([2, 3], [], [4])])
        mean = [(a + b) / 2 for a, b in zip(*draws, strict=True)]
        mean[2][:3] = torch.tensor([0, 1e5, -1e5])
        for result in results:
            for got, expected in zip(result["grads"], mean, strict=True):
                assert torch.equal(torch.tensor(got), expected)

    def test_module_is_that_of_the_source(self, results):
        first, second = results
        assert first["before"] != second["before"]
        assert first["after"] == second["after"] == second["before"]
        assert first["buffers"] == second["buffers"] == [6, [True, True]]
        assert first["channels_last"] and second["channels_last"]

    def test_consistency_check_names_the_tensor(self, results):
        assert [r["difference"] for r in results] == [None, "Conv2d.weight"]

    def test_statistics_add_up(self, results):
        for result in results:
            assert result["state"] == {"both": [3, 9, 41], "first": [1, 10, 100]}
            assert result["stats"]["both"] == {"num": 3, "mean": 3, "std": pytest.approx((41 / 3 - 9) ** 0.5)}
            assert result["stats"]["first"] == {"num": 1, "mean": 10, "std": 0}


def test_a_dead_process_stops_the_others(folder):
    assert "process 1 terminated with exit code 3" in (folder / "die.txt").read_text()


class TestAlone:
    def test_everything_is_a_no_op(self):
        assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main()) == (0, 1, True)
        distributed.barrier()
        thing = object()
        assert distributed.broadcast_object(thing) is thing
        assert distributed.average(torch.tensor([3.0])).tolist() == [3.0]
        assert distributed.any_rank(True) is True and distributed.any_rank(False) is False
        distributed.broadcast_module(torch.nn.Linear(1, 1))

    def test_gradients_are_only_mended(self):
        params = [torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(1))]
        params[0].grad = grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.5])
        distributed.all_reduce_gradients(iter(params))
        assert params[0].grad is grad and grad.tolist() == [0, 1e5, -1e5, 2.5] and params[1].grad is None
        distributed.all_reduce_gradients([])

    def test_launch_of_one_stays_in_this_process(self):
        seen = []
        distributed.launch(lambda *args: seen.append(args), 1, ("a", 2))
        assert seen == [(0, "a", 2)]

    def test_mistakes(self):
        with pytest.raises(ValueError, match="at least 1, not 0"):
            distributed.launch(print, 0)
        with pytest.raises(ValueError, match="'tpu'"):
            distributed.init_process(0, 1, "file:///nowhere", "tpu")


@pytest.mark.parametrize(
    "gpus, device, count, expected",
    [
        (0, "auto", 8, (1, "cpu")),
        (1, "auto", 0, (1, "cpu")),
        (1, "auto", 1, (1, "cuda")),
        (3, "auto", 8, (3, "cuda")),
        (3, "cpu", 8, (3, "cpu")),
        (8, "cuda", 8, (8, "cuda")),
        (2, "auto", 0, "2 CUDA devices asked for, this machine has 0"),
        (1, "cuda", 0, "1 CUDA device asked for, this machine has 0"),
        (0, "cuda", 1, "--gpus=0 is the CPU, --device=cuda is not"),
        (-1, "auto", 1, "--gpus must be at least 1"),
    ],
)
def test_choose_device(monkeypatch, gpus, device, count, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            distributed.choose_device(gpus, device)
    else:
        assert distributed.choose_device(gpus, device) == expected
