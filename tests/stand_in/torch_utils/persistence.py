# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import sys
import types
import uuid

import dnnlib

_made = set()
_sources, _modules = {}, {}


def persistent_class(orig_class):
    if is_persistent(orig_class):
        return orig_class
    module = sys.modules[orig_class.__module__]
    source = _sources.get(module) or inspect.getsource(module)
    _sources[module], _modules[source] = source, module

    class Decorator(orig_class):
        _orig_module_src = source
        _orig_class_name = orig_class.__name__

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args = copy.deepcopy(args)
            self._init_kwargs = copy.deepcopy(kwargs)
            assert orig_class.__name__ in vars(module)

        @property
        def init_args(self):
            return copy.deepcopy(self._init_args)

        @property
        def init_kwargs(self):
            return dnnlib.EasyDict(copy.deepcopy(self._init_kwargs))

        def __reduce__(self):
            fields = list(super().__reduce__()) + [None] * 3
            if fields[0] is not _reconstruct_persistent_obj:
                meta = dict(
                    type="class",
                    version=6,
                    module_src=source,
                    class_name=orig_class.__name__,
                    state=fields[2],
                )
                fields[:3] = [_reconstruct_persistent_obj, (meta,), None]
            return tuple(fields[:3])

    Decorator.__name__ = orig_class.__name__
    _made.add(Decorator)
    return Decorator


def is_persistent(obj):
    try:
        if obj in _made:
            return True
    except TypeError:
        pass
    return type(obj) in _made


def _reconstruct_persistent_obj(meta):
    meta = dnnlib.EasyDict(meta)
    meta.state = dnnlib.EasyDict(meta.state)
    assert meta.version == 6 and meta.type == "class"
    module = _modules.get(meta.module_src)
    if module is None:
        module = types.ModuleType("_imported_module_" + uuid.uuid4().hex)
        sys.modules[module.__name__] = module
        _sources[module], _modules[meta.module_src] = meta.module_src, module
        exec(meta.module_src, vars(module))
    cls = persistent_class(vars(module)[meta.class_name])
    obj = cls.__new__(cls)
    setstate = getattr(obj, "__setstate__", None)
    if callable(setstate):
        setstate(meta.state)
    else:
        obj.__dict__.update(meta.state)
    return obj
