# SPDX-License-Identifier: Apache-2.0
"""torch_utils.training_stats: moments against numpy, what a collector sees, exact continuation.

Sums over processes are tested in test_distributed.py.
"""

import importlib.util
import io
import math

import numpy as np
import pytest
import torch

import dnnlib
from torch_utils import training_stats


def fresh_process():
    """The module as a new process would see it: its own counters."""
    spec = importlib.util.spec_from_file_location("training_stats_copy", training_stats.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stats():
    return fresh_process()


class TestReport:
    def test_moments_match_numpy(self, stats):
        collector = stats.Collector()
        values = np.random.RandomState(0).randn(40)
        parts = values[:7], torch.tensor(values[7:20]).reshape(1, 13), list(values[20:22]), float(values[22])
        for part in (*parts, (values[23],), values[24:]):
            assert stats.report("a", part) is part
        collector.update()
        assert collector.num("a") == 40 and type(collector.num("a")) is int
        assert collector.mean("a") == collector["a"] == pytest.approx(values.mean(), abs=1e-6)
        assert collector.std("a") == pytest.approx(values.std(), abs=1e-6)

    def test_gradients_are_left_alone(self, stats):
        x = torch.ones(2, requires_grad=True)
        stats.report("a", x)
        assert not stats._counters["a"][x.device].requires_grad

    def test_names_without_values(self, stats):
        stats.report("empty", [])
        collector = stats.Collector()
        stats.report("one", 3)
        collector.update()
        assert collector.names() == ["empty", "one"]
        assert (
            collector.num("empty") == 0
            and math.isnan(collector["empty"])
            and math.isnan(collector.std("empty"))
        )
        assert collector["one"] == 3 and collector.std("one") == 0

    def test_values_that_are_not_finite(self, stats):
        collector = stats.Collector()
        stats.report("a", [1, math.inf])
        stats.report("b", [1, math.nan])
        collector.update()
        assert collector["a"] == math.inf and math.isnan(collector.std("a"))
        assert math.isnan(collector["b"]) and math.isnan(collector.std("b")) and collector.num("b") == 2

    def test_values_that_are_not_finite_spoil_their_interval_only(self, stats):
        """For every collector, however often it is updated."""
        often, seldom = stats.Collector(), stats.Collector()
        stats.report("a", [1, math.nan])
        often.update()
        assert math.isnan(often["a"]) and often.num("a") == 2
        stats.report("a", [3, 5])
        for collector in (often, seldom):
            collector.update()
        assert often["a"] == 4 and often.std("a") == 1
        assert math.isnan(seldom["a"]) and seldom.num("a") == 4
        stats.report("a", 7)
        late = stats.Collector()
        stats.report("a", 9)
        for collector in (often, seldom, late):
            collector.update()
        assert often["a"] == seldom["a"] == 8 and late["a"] == 9

    def test_constant_values_have_no_deviation(self, stats):
        collector = stats.Collector()
        stats.report("a", [0.1] * 9)
        collector.update()
        assert 0 <= collector.std("a") < 1e-4

    def test_report0_takes_only_the_first_rank(self, stats):
        stats.init_multiprocessing(rank=1, sync_device=None)
        collector = stats.Collector()
        assert stats.report0("a", 5) == 5 and stats.report("b", 5) == 5
        collector.update()
        assert (collector.num("a"), collector.num("b")) == (0, 1)
        with pytest.raises(AssertionError):
            stats.init_multiprocessing(rank=0, sync_device=None)  # too late


class TestCollector:
    def test_sees_only_what_comes_after_it(self, stats):
        stats.report("a", [1, 2])
        collector = stats.Collector()
        assert collector.num("a") == 0
        stats.report("a", 10)
        assert collector.num("a") == 0  # until the update
        collector.update()
        assert collector.num("a") == 1 and collector["a"] == 10

    def test_intervals_and_keep_previous(self, stats):
        keeping, forgetting = stats.Collector(), stats.Collector(keep_previous=False)
        stats.report("a", [1, 3])
        for collector in (keeping, forgetting):
            collector.update()
            assert (collector.num("a"), collector["a"], collector.std("a")) == (2, 2, 1)
            collector.update()
        assert keeping["a"] == 2 and forgetting.num("a") == 0
        stats.report("a", 7)
        for collector in (keeping, forgetting):
            collector.update()
            assert (collector.num("a"), collector["a"]) == (1, 7)

    def test_regex_is_a_full_match(self, stats):
        collector = stats.Collector(regex="Loss/.*")
        for name in ("Loss/G", "aLoss/G", "Loss/D", "Progress"):
            stats.report(name, 1)
        collector.update()
        assert collector.names() == ["Loss/G", "Loss/D"]
        with pytest.raises(AssertionError, match="Progress"):
            collector.mean("Progress")

    def test_as_dict(self, stats):
        collector = stats.Collector()
        stats.report("a", [1, 3])
        collector.update()
        table = collector.as_dict()
        assert table == {"a": {"num": 2, "mean": 2.0, "std": 1.0}}
        assert type(table) is dnnlib.EasyDict and type(table.a) is dnnlib.EasyDict


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestResume:
    @staticmethod
    def work(stats, collectors, steps):
        """Some steps of training: reports at every step, updates of the collectors now and then."""
        seen = []
        for step in steps:
            values = np.random.RandomState(step).randn(5) * 1e3
            stats.report("Loss/signs", np.sign(values))
            if step >= 2:
                stats.report("Loss/late", values)
            stats.report("Progress/kimg", step / 3)
            if step % 3 == 2:
                collectors[0].update()
            if step % 4 == 1:
                collectors[1].update()
            seen += [collector.as_dict() for collector in collectors]
        return seen

    @pytest.mark.parametrize("stop", range(0, 9, 2))
    def test_every_later_value_is_exactly_the_same(self, stats, stop):
        collectors = [stats.Collector(), stats.Collector("Loss/.*", keep_previous=False)]
        self.work(stats, collectors, range(stop))
        saved = through_a_file([stats.state_dict(), *(collector.state_dict() for collector in collectors)])
        expected = self.work(stats, collectors, range(stop, 20))

        other = fresh_process()
        other.report("forgotten", 1)
        other.load_state_dict(saved[0])
        resumed = [other.Collector(), other.Collector("Loss/.*", keep_previous=False)]
        for collector, state in zip(resumed, saved[1:], strict=True):
            collector.load_state_dict(state)
        assert repr(self.work(other, resumed, range(stop, 20))) == repr(expected)  # repr: NaN equals NaN
        assert other.state_dict() == stats.state_dict()

    def test_names_keep_their_order(self, stats):
        for name in ("b", "a", "c"):
            stats.report(name, 1)
        stats.Collector("c")
        other = fresh_process()
        other.load_state_dict(stats.state_dict())
        assert other.Collector().names() == ["b", "a", "c"]

    def test_state_is_plain(self, stats):
        stats.report("a", [1, 2])
        assert stats.state_dict() == {"a": [2.0, 3.0, 5.0]}
        with pytest.raises(ValueError, match="'a' needs three numbers"):
            stats.load_state_dict({"a": [1.0]})
        assert stats.state_dict() == {"a": [2.0, 3.0, 5.0]}
