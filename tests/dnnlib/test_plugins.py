# SPDX-License-Identifier: Apache-2.0
"""dnnlib.plugins: registries and the plug-ins that fill them, from a temporary tree."""

import sys

import pytest

from dnnlib import plugins
from dnnlib.plugins import PluginError, Registry, load_plugins


class TestRegistry:
    def test_order_and_membership(self):
        registry = Registry("metric")
        registry.register("zebra", "os.path.join")
        registry.register("ant", len)
        assert registry.names() == ["zebra", "ant"]
        assert "ant" in registry and "bee" not in registry

    def test_resolves_lazily(self):
        registry = Registry("config")
        registry.register("calendar", "no_such_module_at_all.thing")  # nothing is imported here
        registry.register("join", "os.path.join")
        registry.register("size", len)
        import os.path

        assert registry.resolve("join") is os.path.join and registry.resolve("size") is len
        with pytest.raises(ImportError, match="no_such_module_at_all"):
            registry.resolve("calendar")

    def test_mistakes_are_named(self):
        registry = Registry("network")
        registry.register("a", len)
        with pytest.raises(ValueError, match="network 'a' is registered twice"):
            registry.register("a", len)
        with pytest.raises(ValueError, match="Unknown network 'b'; known: a"):
            registry.resolve("b")
        for target in ("nodot", 3, None):
            with pytest.raises(ValueError, match="dotted name or a callable"):
                registry.register("c", target)
        with pytest.raises(ValueError, match="known: none"):
            Registry("x").resolve("b")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder for plug-ins; what they leave in this process is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plugins, "_loaded", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "_ext" in name or name == "toy_shelf":
            del sys.modules[name]


def write_plugin(root, name, source):
    folder = root / name
    folder.mkdir()
    (folder / "plugin.py").write_text(source)


SHELF = "from dnnlib.plugins import Registry\nTOYS = Registry('toy')\n"
TOY = """
import toy_shelf
def register():
    toy_shelf.TOYS.register('{0}', '{0}_ext.plugin.make')
def make():
    return '{0}'
"""


def test_loads_each_plugin_once_in_order(tree):
    (tree / "toy_shelf.py").write_text(SHELF)
    for name in ("toy", "ball"):
        write_plugin(tree, f"{name}_ext", TOY.format(name))
    (tree / "empty_ext").mkdir()
    write_plugin(tree, "other", "raise RuntimeError('not a plug-in')")
    assert load_plugins(tree) == ["ball_ext", "toy_ext"]
    assert load_plugins(str(tree)) == ["ball_ext", "toy_ext"]  # a second registration would raise
    import toy_shelf

    assert toy_shelf.TOYS.names() == ["ball", "toy"] and toy_shelf.TOYS.resolve("toy")() == "toy"


@pytest.mark.parametrize(
    "source, cause",
    [("import not_there_either\n", ImportError), ("def register():\n    1 / 0\n", ZeroDivisionError)]
    + [("x = 1\n", AttributeError), ("def register(:\n", SyntaxError)],
)
def test_a_broken_plugin_is_loud(tree, source, cause):
    write_plugin(tree, "broken_ext", source)
    with pytest.raises(PluginError, match="broken_ext.*does not load") as info:
        load_plugins(tree)
    assert isinstance(info.value.__cause__, cause)
    with pytest.raises(PluginError):  # and stays so
        load_plugins(tree)


def test_duplicate_name_is_loud(tree):
    (tree / "toy_shelf.py").write_text(SHELF)
    write_plugin(tree, "a_ext", TOY.format("toy"))
    write_plugin(tree, "b_ext", TOY.format("toy"))
    with pytest.raises(PluginError, match="b_ext.*'toy' is registered twice"):
        load_plugins(tree)


def test_same_name_in_two_trees(tree):
    for root in ("one", "two"):
        (tree / root).mkdir()
        write_plugin(tree / root, "twin_ext", "def register(): pass\n")
    assert load_plugins(tree / "one") == ["twin_ext"]
    with pytest.raises(PluginError, match="another twin_ext is imported already"):
        load_plugins(tree / "two")


def test_default_root_is_beside_dnnlib(monkeypatch):
    seen = []
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_load", lambda folder: seen.append(folder))
    names = load_plugins()
    assert [folder.name for folder in seen] == names == sorted(names)
    root = plugins.Path(plugins.__file__).resolve().parents[1]
    assert all(folder.parent == root for folder in seen)
