# SPDX-License-Identifier: Apache-2.0
"""torch_utils.persistence: the wire format, the source cache, copies, and opening where the class is
unknown."""

import copy
import importlib
import io
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import dnnlib
from torch_utils import persistence

SOURCE = '''\
"""A module with persistent classes, saved with every object."""
import torch
from torch_utils import persistence


@persistence.persistent_class
class Scale(torch.nn.Module):
    def __init__(self, factor, **options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.5, -2.0]))
        self.register_buffer("avg", torch.ones(2) * factor)

    def forward(self, x):
        return x * self.weight + self.avg


@persistence.persistent_class
class Net(torch.nn.Module):
    def __init__(self, factor=1, options=None):
        super().__init__()
        options.append("changed by the constructor")
        self.first = Scale(factor, name="first")
        self.rest = torch.nn.Sequential(Scale(2), torch.nn.Tanh())

    def forward(self, x):
        return self.rest(self.first(x))


@persistence.persistent_class
class Wide(Net):
    def forward(self, x):
        return super().forward(x).repeat(1, 2)


@persistence.persistent_class
class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Undecorated(Scale):
    pass


def make_local():
    @persistence.persistent_class
    class Local:
        pass

    return Local
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(persistence, "_import_hooks", [])


@pytest.fixture(scope="module")
def source_dir(tmp_path_factory):
    """Folder of persist_sample.py, which sits on sys.path for the tests of this file."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "persist_sample.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("persist_sample", None)


@pytest.fixture(scope="module")
def sample(source_dir):
    return importlib.import_module("persist_sample")


def metas_of(data):
    """Reads a pickle with a reader of our own, which keeps every meta instead of running its source."""
    metas = []

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
                return lambda meta: metas.append(meta) or f"object {len(metas)}"
            return super().find_class(module, name)

    Reader(io.BytesIO(data)).load()
    return metas


class TestClass:
    def test_keeps_its_name_and_says_what_it_is(self, sample):
        assert sample.Net.__name__ == "Net" and sample.Net.__module__ == "torch_utils.persistence"
        assert sample.Net._orig_class_name == "Net" and sample.Net._orig_module_src == SOURCE
        assert persistence.is_persistent(sample.Net) and persistence.is_persistent(sample.Scale(1))
        assert not persistence.is_persistent(sample.Undecorated)
        assert not persistence.is_persistent(sample.Undecorated(1))
        assert not any(map(persistence.is_persistent, ([], {}, np.zeros(2), 1, torch.nn.Linear, None)))

    def test_decorating_twice_or_no_class(self, sample):
        assert persistence.persistent_class(sample.Net) is sample.Net
        with pytest.raises(AssertionError):
            persistence.persistent_class(lambda: 0)

    def test_just_in_time(self, sample):
        made = persistence.persistent_class(sample.Undecorated)
        assert made is not sample.Undecorated and made._orig_class_name == "Undecorated"
        assert persistence.is_persistent(made(factor=2))

    def test_constructor_arguments(self, sample):
        options = dnnlib.EasyDict(a=dnnlib.EasyDict(b=[1]))
        plain = sample.Plain(options=options, table={"x": 1})
        options.a.b.append(2)
        assert plain.init_args == () and plain.init_kwargs == {
            "options": {"a": {"b": [1]}},
            "table": {"x": 1},
        }
        assert (
            type(plain.init_kwargs) is dnnlib.EasyDict
            and type(plain.init_kwargs.options.a) is dnnlib.EasyDict
        )
        assert type(plain.init_kwargs.table) is dict and type(plain._init_kwargs) is dict
        plain.init_kwargs.options.a.b.append(3)
        assert plain.init_kwargs.options.a.b == [1]
        net = sample.Net(3, options=[])
        assert net.init_args == (3,) and net.init_kwargs == {"options": []}

    def test_arguments_of_derived_classes(self, sample):
        assert sample.Wide(4, options=[]).init_args == (4,)

    def test_class_must_be_a_global_of_its_module(self, sample):
        with pytest.raises(AssertionError, match="Local must be a global"):
            sample.make_local()()

    def test_what_does_not_pickle_is_refused_at_once(self, sample):
        with pytest.raises(pickle.PicklingError, match="Plain.callback"):
            sample.Plain(fine=[1, {"a": (2.0, b"c", None)}], callback=[lambda: 0])

    def test_tensors_are_not_pickled_for_the_check(self, sample, monkeypatch):
        def fail(*args):
            raise AssertionError("pickled")

        monkeypatch.setattr(torch.nn.Parameter, "__reduce_ex__", fail)
        monkeypatch.setattr(torch.Tensor, "__reduce_ex__", fail)
        net = sample.Net(1, options=[])
        sample.Plain(deep=[{"t": (torch.zeros(3), np.zeros(3), torch.nn.Parameter(torch.ones(1)), net)}])


class TestWire:
    def test_reduce(self, sample):
        plain = sample.Plain(a=1)
        function, args, state = plain.__reduce__()
        assert function is persistence._reconstruct_persistent_obj and state is None
        meta = dict(type="class", version=6, module_src=SOURCE, class_name="Plain", state=vars(plain))
        assert type(args[0]) is dict and list(args[0].items()) == list(meta.items())
        assert list(meta["state"]) == ["a", "_init_args", "_init_kwargs"]

    def test_nested_modules_children_first_and_source_once(self, sample):
        data = pickle.dumps(sample.Wide(1, options=[]), protocol=4)
        metas = metas_of(data)
        assert [meta["class_name"] for meta in metas] == ["Scale", "Scale", "Wide"]
        assert all(meta["module_src"] is metas[0]["module_src"] for meta in metas)
        assert data.count(b"saved with every object") == 1
        assert {"_parameters", "_buffers", "_modules", "training", "_init_args"} <= set(metas[-1]["state"])

    def test_globals_are_those_that_every_checkout_has(self, sample):
        data = pickle.dumps(sample.Scale(1, nested=dnnlib.EasyDict(a=1)), protocol=4)
        strings = [arg for op, arg, _ in pickletools.genops(data) if isinstance(arg, str)]
        names = [op.name for op, _, _ in pickletools.genops(data)]
        assert "STACK_GLOBAL" in names and max(op.proto for op, _, _ in pickletools.genops(data)) <= 4
        found = set()

        class Reader(pickle.Unpickler):
            def find_class(self, module, name):
                found.add(f"{module}.{name}")
                return super().find_class(module, name)

        Reader(io.BytesIO(data)).load()
        assert "persist_sample" not in strings
        assert found <= {
            "torch_utils.persistence._reconstruct_persistent_obj",
            "collections.OrderedDict",
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_tensor_v2",
            "torch.storage._load_from_bytes",
            "dnnlib.util.EasyDict",
        }

    def test_undecorated_subclass_is_refused(self, sample):
        with pytest.raises(pickle.PicklingError, match="Undecorated"):
            pickle.dumps(sample.Undecorated(1))


def foreign_pickle(**changes):
    """A pickle as another implementation writes it, made without persistent_class."""
    source = "class Thing:\n    value = 0\n    def __init__(self): raise RuntimeError\n"
    meta = dict(type="class", version=6, module_src=source, class_name="Thing", state={"a": 1})
    meta.update(changes)

    class Foreign:
        def __reduce__(self):
            return persistence._reconstruct_persistent_obj, (meta,), None

    return pickle.dumps(Foreign(), protocol=4)


class TestLoading:
    def test_foreign_object(self):
        thing = pickle.loads(foreign_pickle())
        assert type(thing).__name__ == "Thing" and vars(thing) == {"a": 1}
        assert persistence.is_persistent(thing)
        again = pickle.loads(pickle.dumps(thing, protocol=4))
        assert type(again) is type(pickle.loads(foreign_pickle())) and again.a == 1

    def test_setstate_is_used(self):
        source = (
            "class Thing:\n    def __setstate__(self, state):\n        self.total = sum(state.values())\n"
        )
        thing = pickle.loads(foreign_pickle(module_src=source, state={"a": 1, "b": 2}))
        assert vars(thing) == {"total": 3}

    @pytest.mark.parametrize("changes", [{"version": 5}, {"type": "function"}])
    def test_other_versions_are_refused(self, changes):
        with pytest.raises(AssertionError):
            pickle.loads(foreign_pickle(**changes))

    def test_source_runs_once_in_a_module_of_its_own(self):
        source = "import sys\nRUNS = [__name__ in sys.modules]\nclass Thing: runs = RUNS\n"
        one, two = (pickle.loads(foreign_pickle(module_src=source)) for _ in range(2))
        assert type(one) is type(two) and one.runs == [True]
        assert persistence._module_of[source].__name__.startswith("_imported_module_")

    def test_failing_source_fails_again(self):
        before = set(sys.modules)
        source = "class Thing: pass\nimport not_installed_anywhere\n"
        for _ in range(2):
            with pytest.raises(ImportError, match="not_installed_anywhere"):
                pickle.loads(foreign_pickle(module_src=source))
        assert set(sys.modules) == before

    def test_last_registration_of_a_source_wins(self, source_dir, sample):
        data = pickle.dumps(sample.Plain(a=1), protocol=4)
        assert type(pickle.loads(data)) is sample.Plain  # same source: the local class
        (source_dir / "persist_twin.py").write_text(SOURCE)
        importlib.invalidate_caches()
        twin = importlib.import_module("persist_twin")
        try:
            assert type(pickle.loads(data)) is twin.Plain
            assert type(copy.deepcopy(sample.Plain(a=1))) is twin.Plain
        finally:
            del sys.modules["persist_twin"]
            persistence._module_of[SOURCE] = sample

    def test_hooks(self, sample):
        seen = []

        def rename(meta):
            assert type(meta) is dnnlib.EasyDict and type(meta.state) is dnnlib.EasyDict
            seen.append(meta.class_name)
            return meta

        def edit(meta):
            if meta.class_name == "Plain":
                meta.state.edited = True
            return meta

        assert persistence.import_hook(rename) is None
        persistence.import_hook(edit)
        copy.deepcopy(sample.Net(1, options=[]))
        assert seen == ["Scale", "Scale", "Net"]  # children first
        assert pickle.loads(pickle.dumps(sample.Plain(a=1))).edited
        persistence.import_hook(lambda meta: None)
        with pytest.raises(AssertionError):
            copy.deepcopy(sample.Plain())
        with pytest.raises(AssertionError):
            persistence.import_hook(3)


class TestCopies:
    def test_deepcopy_is_equal_and_separate(self, sample):
        net = sample.Net(1, options=[]).eval().requires_grad_(False)
        other = copy.deepcopy(net)
        x = torch.tensor([[0.5, 0.25]])
        expected = torch.tanh((x * net.first.weight + 1) * net.first.weight + 2)
        assert torch.equal(net(x), expected) and torch.equal(other(x), expected)
        assert type(other) is sample.Net and not other.training and not other.first.weight.requires_grad
        other.first.weight.zero_()
        assert torch.equal(net(x), expected) and other.init_kwargs == net.init_kwargs

    def test_shared_parameters_stay_shared(self, sample):
        net = sample.Net(1, options=[])
        net.rest[0].weight = net.first.weight
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net, protocol=4))):
            assert other.rest[0].weight is other.first.weight

    def test_opens_with_only_dnnlib_and_torch_utils(self, sample, tmp_path):
        net = sample.Wide(0.5, options=[])
        x = [[0.5, 0.25]]
        with open(tmp_path / "net.pkl", "wb") as file:
            pickle.dump({"net": net, "copy": copy.deepcopy(net)}, file, protocol=4)
        root = os.path.dirname(os.path.dirname(dnnlib.__file__))
        for package in ("dnnlib", "torch_utils"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(os.path.join(root, package), tmp_path / package, ignore=ignore)
        script = f"""if True:
            import json, pickle, sys, torch
            nets = pickle.load(open('net.pkl', 'rb'))
            assert 'persist_sample' not in sys.modules
            data = pickle.dumps(nets, protocol=4)       # and it can be passed on from there
            nets = pickle.loads(data)
            out = [nets[key](torch.tensor({x})).tolist() for key in ('net', 'copy')]
            print(json.dumps([out, nets['net'].init_args, data == open('net.pkl', 'rb').read()]))
        """
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr.decode()
        outputs, init_args, _ = json.loads(done.stdout)
        assert outputs == [net(torch.tensor(x)).tolist()] * 2 and init_args == [0.5]
