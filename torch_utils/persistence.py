# SPDX-License-Identifier: Apache-2.0
"""Objects whose pickles carry the source code of their class and so open where that class does not exist.

Wire format (shared with the StyleGAN2-ADA family, version 6): a persistent object reduces to

    (_reconstruct_persistent_obj, (meta,), None)
    meta = dict(type='class', version=6, module_src=<source of the module>, class_name=..., state=<__dict__>)

and loading runs `module_src` as a fresh module, unless a module of exactly that source is at hand already,
then fills an instance without calling its constructor. Unpickling therefore executes what the file says.
"""

import copy
import inspect
import pickle
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dnnlib

_VERSION = 6

_decorators = set()  # the classes made by persistent_class
_made_of = {}  # original class -> the one made of it
_import_hooks = []  # meta -> meta, in order of registration
_source_of = {}  # module -> its source
_module_of = {}  # source -> the module registered last under it


def persistent_class(orig_class: type) -> type:
    """Class decorator: a subclass of the same name whose instances pickle with their module's source.

    Instances gain `init_args` (tuple) and `init_kwargs` (EasyDict): deep copies of the constructor's
    arguments. The class must be a global of a module with readable source and keep its state in `__dict__`;
    constructing an object whose attributes do not pickle raises pickle.PicklingError. A persistent class is
    returned as it is.
    """
    assert isinstance(orig_class, type), f"persistent_class needs a class, not {orig_class!r}"
    if is_persistent(orig_class):
        return orig_class
    if orig_class in _made_of:  # e.g. the source of a pickle that was decorated just in time
        return _made_of[orig_class]
    module = sys.modules[orig_class.__module__]
    source = _register_source(module)

    class Decorator(orig_class):
        _orig_module_src = source
        _orig_class_name = orig_class.__name__

        def __init__(self, *args, **kwargs):
            given = copy.deepcopy((args, kwargs))  # before the constructor can change them
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = given
            if type(self) is Decorator:  # else the class derived from this one does it
                name = orig_class.__name__
                assert name in vars(module), f"{name} must be a global of {module.__name__}"
                _check_pickleable(self)

        init_args = property(lambda self: copy.deepcopy(self._init_args))
        init_kwargs = property(lambda self: dnnlib.EasyDict(copy.deepcopy(self._init_kwargs)))

        def __reduce__(self):
            return _with_source(self, super().__reduce__())

    for name in ("__name__", "__qualname__", "__doc__"):
        setattr(Decorator, name, getattr(orig_class, name))
    _decorators.add(Decorator)
    _made_of[orig_class] = Decorator
    return Decorator


def is_persistent(obj: Any) -> bool:
    """Whether `obj` is a class made by persistent_class, or an instance of exactly such a class."""
    return (obj if isinstance(obj, type) else type(obj)) in _decorators


def import_hook(hook: Callable) -> None:
    """Registers a function meta (EasyDict) -> meta, called for every persistent object unpickled or copied.

    Hooks run in order of registration, children before their parents, and may edit or replace the meta, e.g.
    to mend the source of an old pickle. They must be idempotent: copy.deepcopy runs them, too.
    """
    assert callable(hook)
    _import_hooks.append(hook)


# ----------------------------------------------------------------------------------------
# Saving


def _with_source(obj, reduced):
    """Turns what the default __reduce__ gives into the wire format."""
    if reduced[0] is _reconstruct_persistent_obj:  # done by a persistent base class
        return reduced
    cls = type(obj)
    if cls not in _decorators:
        raise pickle.PicklingError(
            f"{cls.__name__} derives from a persistent class but lacks @persistent_class"
        )
    meta = dict(
        type="class",
        version=_VERSION,
        module_src=cls._orig_module_src,
        class_name=cls._orig_class_name,
        state=reduced[2] if len(reduced) > 2 else None,
    )
    return (_reconstruct_persistent_obj, (meta,), None, *reduced[3:])


class _Nowhere:
    """A file that forgets."""

    def write(self, data):
        return len(data)


class _DryPickler(pickle.Pickler):
    """Pickles everything but what is known to pickle: tensors, arrays, and persistent objects (checked when
    built)."""

    def persistent_id(self, obj):
        return "fine" if isinstance(obj, (torch.Tensor, np.ndarray)) or type(obj) in _decorators else None


def _check_pickleable(obj):
    """Raises PicklingError, naming the attribute, if part of a persistent object's state does not pickle."""
    state = obj.__reduce__()[1][0]["state"]
    assert isinstance(state, dict), (
        f"The state of a persistent object must be a dict, not {type(state).__name__}"
    )
    for name, value in state.items():
        try:
            _DryPickler(_Nowhere(), protocol=4).dump(value)
        except Exception as error:  # pickle raises whatever the object's own code raises
            where = f"{type(obj).__name__}.{name}"
            raise pickle.PicklingError(f"{where} of a persistent class cannot be pickled: {error}") from error


# ----------------------------------------------------------------------------------------
# Loading


def _reconstruct_persistent_obj(meta):
    """The function that pickles of persistent objects call; `meta` is described at the head of this
    module."""
    meta = dnnlib.EasyDict(meta)
    meta.state = dnnlib.EasyDict(meta.state)
    for hook in _import_hooks:
        meta = hook(meta)
        assert meta is not None, "An import hook must return the meta"
    assert meta.version == _VERSION, f"Persistent object of version {meta.version}, can read {_VERSION}"
    assert meta.type == "class", f"Unknown kind of persistent object: {meta.type!r}"
    module = _module_of.get(meta.module_src) or _run_source(meta.module_src)
    cls = persistent_class(vars(module)[meta.class_name])
    obj = cls.__new__(cls)
    restore = getattr(obj, "__setstate__", None)
    if callable(restore):
        restore(meta.state)
    else:
        obj.__dict__.update(meta.state)
    return obj


def _register_source(module):
    """Source of a module; remembers that the module stands for it from now on."""
    if module not in _source_of:
        _source_of[module] = inspect.getsource(module)
    source = _source_of[module]
    _module_of[source] = module
    return source


def _run_source(source):
    """Executes source code as a new module, which is known to sys.modules and to the caches while it runs."""
    module = types.ModuleType("_imported_module_" + uuid.uuid4().hex)
    sys.modules[module.__name__] = module
    _source_of[module] = source
    _module_of[source] = module
    try:
        exec(source, vars(module))
    except BaseException:  # half a module must not answer for this source next time
        del sys.modules[module.__name__], _source_of[module], _module_of[source]
        raise
    return module
