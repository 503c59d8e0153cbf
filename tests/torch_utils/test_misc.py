# SPDX-License-Identifier: Apache-2.0
"""torch_utils.misc: constants, shape checks, the sampler's sequence, copying, the summary table."""

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils import misc

ROOT = Path(__file__).resolve().parents[2]


class TestConstant:
    def test_made_once_per_key(self):
        one = misc.constant([1, 2])
        assert misc.constant(np.array([1, 2])) is one and misc.constant((1, 2)) is one
        assert one.dtype == torch.float32 and one.tolist() == [1, 2] and one.device.type == "cpu"
        for other in (
            misc.constant([1.0, 2.0]),
            misc.constant([[1, 2]]),
            misc.constant([1, 2], dtype=torch.int64),
            misc.constant([1, 2], shape=[3, 2]),
        ):
            assert other is not one

    def test_shape_and_memory_format(self):
        t = misc.constant([[[1.0]], [[2.0]]], shape=[1, 2, 3, 3], memory_format=torch.channels_last)
        assert t.shape == (1, 2, 3, 3) and t.is_contiguous(memory_format=torch.channels_last)
        assert t[0, 1].tolist() == [[2.0] * 3] * 3
        assert misc.constant(0.5, shape=(2, 2)).is_contiguous()

    def test_usable_in_autograd_even_if_first_made_in_inference_mode(self):
        with torch.inference_mode():
            c = misc.constant([3.25, 4.125])
        x = torch.ones(2, requires_grad=True)
        (x * c).sum().backward()
        assert x.grad.tolist() == [3.25, 4.125]


class TestShapes:
    def test_assert_shape(self):
        t = torch.zeros(2, 3)
        misc.assert_shape(t, [2, 3])
        misc.assert_shape(t, (None, torch.tensor(3)))
        with pytest.raises(AssertionError, match="^Wrong number of dimensions: got 2, expected 3$"):
            misc.assert_shape(t, [2, 3, 1])
        with pytest.raises(AssertionError, match="^Wrong size for dimension 1: got 3, expected 4$"):
            misc.assert_shape(t, [None, 4])
        with pytest.raises(AssertionError, match="^Wrong size for dimension 0"):
            misc.assert_shape(t, [torch.tensor(1), 3])

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
    def test_assert_shape_under_tracing(self):
        def fn(x):
            misc.assert_shape(x, [None, 3])
            return x * 2

        traced = torch.jit.trace(fn, torch.ones(2, 3))  # TracerWarning would be an error here
        assert traced(torch.ones(4, 3)).shape == (4, 3)

    def test_suppress_tracer_warnings(self):
        before = list(warnings.filters)
        with misc.suppress_tracer_warnings(), misc.suppress_tracer_warnings():
            warnings.warn("quiet", torch.jit.TracerWarning, stacklevel=1)
            with pytest.raises(UserWarning):
                warnings.warn("loud", UserWarning, stacklevel=1)
        assert list(warnings.filters) == before
        with pytest.raises(RuntimeError), misc.suppress_tracer_warnings():
            raise RuntimeError
        assert list(warnings.filters) == before

    def test_aliases(self):
        x = torch.tensor([float("nan"), float("inf"), -float("inf")])
        assert misc.nan_to_num(x, nan=0, posinf=1, neginf=-1, out=x) is x and x.tolist() == [0, 1, -1]
        with pytest.raises(AssertionError, match="told so"):
            misc.symbolic_assert(False, "told so")


def test_profiled_function_has_its_name_in_the_profile():
    @misc.profiled_function
    def peculiar_name(x, y=1):
        return x + y

    with torch.autograd.profiler.profile() as profile:
        assert peculiar_name(torch.ones(1), y=2).item() == 3
    assert peculiar_name.__name__ == "peculiar_name"
    assert "peculiar_name" in {event.name for event in profile.function_events}


def reference_sequence(size, rank=0, num_replicas=1, shuffle=True, seed=0, window_size=0.5):
    """The contract's algorithm, one draw at a time."""
    order = np.arange(size)
    rnd = np.random.RandomState(seed)
    if shuffle:
        rnd.shuffle(order)
    window = int(np.rint(size * window_size)) if shuffle else 0
    for idx in itertools.count():
        i = idx % size
        if idx % num_replicas == rank:
            yield int(order[i])
        if window >= 2:
            j = (i - rnd.randint(window)) % size
            order[i], order[j] = order[j], order[i]


def take(iterable, count):
    return list(itertools.islice(iterable, count))


class TestInfiniteSampler:
    @pytest.mark.parametrize(
        "kwargs, expected",
        [
            ({}, "2,8,4,9,1,6,2,3,0,9,7,8,1,5,6,4,3,8,2,1,9,6,7,5,8"),
            (dict(rank=1, num_replicas=2), "8,9,6,3,9,8,5,4,8,1,6,5"),
            (dict(seed=5, window_size=0), "9,5,2,4,7,1,0,8,6,3,9,5"),
            (dict(shuffle=False), "0,1,2,3,4,5,6,7,8,9,0,1"),
            (dict(shuffle=False, rank=2, num_replicas=3), "2,5,8,1,4,7,0"),
        ],
    )
    def test_published_sequences(self, kwargs, expected):
        expected = [int(item) for item in expected.split(",")]
        sampler = misc.InfiniteSampler(range(10), **kwargs)
        assert take(sampler, len(expected)) == expected
        assert take(sampler, len(expected)) == expected  # each iteration begins anew
        assert all(type(item) is int for item in take(sampler, 3))

    @pytest.mark.parametrize("size, ranks", [(7, 1), (10, 3), (3000, 2)])
    @pytest.mark.parametrize("window_size", [0.0, 0.1, 0.5, 1.0])
    def test_start_continues_the_same_sequence(self, size, ranks, window_size):
        common = dict(num_replicas=ranks, seed=3, window_size=window_size)
        for rank in range(ranks):
            whole = take(reference_sequence(size, rank=rank, **common), 5000)  # beyond one chunk of draws
            for start in (0, 1, size // ranks, size + 1, 4100):
                sampler = misc.InfiniteSampler(range(size), rank=rank, start=start, **common)
                assert take(sampler, 50) == whole[start : start + 50]

    def test_ranks_share_out_the_sequence(self):
        whole = take(misc.InfiniteSampler(range(10)), 30)
        parts = [take(misc.InfiniteSampler(range(10), rank=r, num_replicas=3, start=2), 8) for r in range(3)]
        assert [item for row in zip(*parts, strict=True) for item in row] == whole[6:]

    def test_in_a_data_loader_and_attributes(self):
        sampler = misc.InfiniteSampler([5, 6, 7], seed=1, start=2)
        loader = torch.utils.data.DataLoader([5, 6, 7], sampler=sampler, batch_size=4)
        indices = take(misc.InfiniteSampler(range(3), seed=1), 6)[2:]
        assert next(iter(loader)).tolist() == [5 + i for i in indices]
        assert (sampler.rank, sampler.num_replicas, sampler.shuffle) == (0, 1, True)
        assert (sampler.seed, sampler.window_size, sampler.start, len(sampler.dataset)) == (1, 0.5, 2, 3)

    @pytest.mark.parametrize(
        "kwargs",
        [dict(dataset=[]), dict(num_replicas=0), dict(rank=1), dict(rank=-1), dict(start=-1)]
        + [dict(window_size=1.1), dict(window_size=-0.1)],
    )
    def test_impossible_arguments(self, kwargs):
        with pytest.raises(AssertionError):
            misc.InfiniteSampler(**{"dataset": [1], **kwargs})


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 4)
        self.act = torch.nn.ReLU(inplace=True)
        self.register_buffer("avg", torch.zeros(5))

    def forward(self, x):
        y = self.act(self.fc(x))
        return y, y.sum().to(torch.float64)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.again = torch.nn.Linear(3, 4)
        self.again.weight = self.block.fc.weight

    def forward(self, x):
        return self.block(x)[0] + self.again(x)


class TestParametersAndBuffers:
    def test_lists(self):
        block = Block()
        names = [name for name, _ in misc.named_params_and_buffers(block)]
        assert names == ["fc.weight", "fc.bias", "avg"]
        assert misc.params_and_buffers(block)[2] is block.avg

    def test_copy(self):
        src, dst = Net(), Net().requires_grad_(False)
        src.block.avg += 3
        misc.copy_params_and_buffers(src, dst, require_all=True)
        for a, b in zip(misc.params_and_buffers(src), misc.params_and_buffers(dst), strict=True):
            assert torch.equal(a, b) and a is not b and not b.requires_grad
        misc.copy_params_and_buffers(src, Block().requires_grad_(False))  # no name in common: nothing happens
        with pytest.raises(AssertionError, match="fc.weight"):
            misc.copy_params_and_buffers(src, Block().requires_grad_(False), require_all=True)
        with pytest.raises(RuntimeError):
            misc.copy_params_and_buffers(src, Net())  # requires gradients


def test_ddp_sync_leaves_plain_modules_alone():
    for sync in (True, False):
        with misc.ddp_sync(torch.nn.Linear(1, 1), sync):
            pass


class TestSummary:
    EXPECTED = """
Net          Parameters  Buffers  Output shape  Datatype
---          ---         ---      ---           ---
block.fc     16          -        [2, 4]        float32
block:0      -           5        [2, 4]        float32
block:1      -           -        []            float64
again        4           -        [2, 4]        float32
<top-level>  -           -        [2, 4]        float32
---          ---         ---      ---           ---
Total        20          5        -             -

"""

    def test_table(self, capsys):
        net, x = Net(), torch.ones(2, 3)
        assert torch.equal(misc.print_module_summary(net, [x]), net(x))
        lines = [line.rstrip() for line in capsys.readouterr().out.split("\n")]
        assert lines == self.EXPECTED.split("\n")
        assert not net._forward_hooks and not net.block.act._forward_pre_hooks

    def test_depth_and_redundant_rows(self, capsys):
        misc.print_module_summary(Net(), (torch.ones(2, 3),), max_nesting=1)
        names = [line.split(" ")[0] for line in capsys.readouterr().out.split("\n")]
        assert names == [
            "",
            "Net",
            "---",
            "block:0",
            "block:1",
            "again",
            "<top-level>",
            "---",
            "Total",
            "",
            "",
        ]
        misc.print_module_summary(Net(), (torch.ones(2, 3),), skip_redundant=False)
        assert "block.act" in capsys.readouterr().out

    def test_arguments(self):
        with pytest.raises(AssertionError):
            misc.print_module_summary(Net(), torch.ones(2, 3))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is on Linux only")
def test_kept_memory_comes_back_without_page_faults():
    code = (
        "import resource, sys, torch\n"
        "from torch_utils import misc\n"
        "if sys.argv[1] == 'keep': assert misc.keep_memory()\n"
        "def work(): return len([torch.ones(2**22 * (1 + i % 3)) for i in range(12)])\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def cost(): before = faults(); work(); return faults() - before\n"
        "print(min(cost() for _ in range(10)))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, os.environ.get("PYTHONPATH", "")]))
    run = [
        int(subprocess.check_output([sys.executable, "-c", code, how], env=environment))
        for how in ("keep", "")
    ]
    assert run[0] * 3 < run[1]


def test_memory_is_left_to_whoever_set_the_environment(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert misc.keep_memory() is False
