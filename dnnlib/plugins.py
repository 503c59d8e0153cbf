# SPDX-License-Identifier: Apache-2.0
"""Plug-ins (`<name>_ext/plugin.py` beside dnnlib/) and the registries they add to."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib import util


class PluginError(RuntimeError):
    """A plug-in that cannot be loaded. The message names it; the cause is chained."""


class Registry:
    """Names, in order of registration, with what they stand for: a dotted name, imported on first use, or a
    callable.

    `kind` is the word for one entry in messages, e.g. 'metric'.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._targets: dict = {}

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def names(self) -> list:
        """All names, first registered first."""
        return list(self._targets)

    def register(self, name: str, target: str | Callable) -> None:
        """Adds a name. ValueError if it is taken, or if `target` is neither a dotted name nor callable."""
        if name in self._targets:
            raise ValueError(
                f"The {self.kind} {name!r} is registered twice: {self._targets[name]!r} and {target!r}"
            )
        if not (callable(target) or (isinstance(target, str) and "." in target.strip("."))):
            raise ValueError(f"The {self.kind} {name!r} needs a dotted name or a callable, not {target!r}")
        self._targets[name] = target

    def resolve(self, name: str) -> Any:
        """The object behind a name. ValueError for an unknown name, listing the known ones."""
        if name not in self._targets:
            known = ", ".join(map(str, self._targets)) or "none"
            raise ValueError(f"Unknown {self.kind} {name!r}; known: {known}")
        target = self._targets[name]
        return util.get_obj_by_name(target) if isinstance(target, str) else target


_loaded: dict = {}  # name of a plug-in -> its folder

# Packages here whose names no file may give: they run what they are told to.
TOOLS = {"dnnlib", "torch_utils"}


def own_class(name: object, base: type) -> bool:
    """Whether a dotted name out of a file is that of a class derived from `base` which this program or a loaded plug-in
    defines. Imports nothing else, and runs nothing."""
    package = str(name).partition(".")[0]
    if not isinstance(name, str) or not _is_own(package):
        return False
    try:
        found = util.get_obj_by_name(name)
    except (ImportError, AttributeError):
        return False
    if not (isinstance(found, type) and issubclass(found, base)):
        return False
    home = found.__module__ if found.__module__ != "torch_utils.persistence" else found.__mro__[1].__module__
    return _is_own(home.partition(".")[0])


def _is_own(package: str) -> bool:
    """Whether this is the name of a package beside dnnlib/, or of a plug-in that is loaded."""
    root = Path(__file__).resolve().parents[1]
    beside = package.isidentifier() and package not in TOOLS and any((root / package).glob("*.py"))
    return beside or package in _loaded


def load_plugins(root: str | Path | None = None) -> list:
    """Imports `<x>_ext/plugin.py` of every `<x>_ext` in `root` (default: beside dnnlib/) and calls its
    `register()`.

    Sorted by name, once per process however often it is called; returns the names (`<x>_ext`). A plug-in that
    fails to import or to register raises PluginError. A child process that needs the registries calls this,
    too.
    """
    base = Path(__file__).resolve().parents[1] if root is None else Path(root).resolve()
    folders = sorted(path.parent for path in base.glob("*_ext/plugin.py"))
    for folder in folders:
        if _loaded.get(folder.name) != folder:
            _load(folder)
            _loaded[folder.name] = folder
    return [folder.name for folder in folders]


def _load(folder: Path) -> None:
    """Imports one plug-in and calls its register()."""
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))  # stays: the dotted names it registers are imported later
    try:
        plugin = importlib.import_module(f"{folder.name}.plugin")
        origin = Path(plugin.__file__).resolve().parent
        if origin != folder:
            raise ImportError(f"another {folder.name} is imported already, from {origin}")
        plugin.register()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise PluginError(f"The plug-in {folder.name} ({folder}) does not load: {problem}") from error
