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

    name = orig_class.__name__

    def construct(self, *args, **kwargs):
        given = copy.deepcopy((args, kwargs))
        orig_class.__init__(self, *args, **kwargs)
        vars(self).update(zip(("_init_args", "_init_kwargs"), given, strict=True))
        assert name in vars(module)

    def reduce(self):
        found = orig_class.__reduce__(self)
        if found[0] is _reconstruct_persistent_obj:
            return found
        state = found[2] if len(found) > 2 else None
        meta = dict(type="class", version=6, module_src=source, class_name=name, state=state)
        return _reconstruct_persistent_obj, (meta,), None

    members = dict(__init__=construct, __reduce__=reduce, _orig_module_src=source, _orig_class_name=name)
    members["init_args"] = property(lambda self: copy.deepcopy(self._init_args))
    members["init_kwargs"] = property(lambda self: dnnlib.EasyDict(copy.deepcopy(self._init_kwargs)))
    made = type(name, (orig_class,), members)
    _made.add(made)
    return made


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
