# SPDX-License-Identifier: Apache-2.0
"""A network from its constructor's arguments and its tensors, both as a file that nobody vouches for gives them.

The network is laid out without memory first, then its tensors are compared with the file's, and only then copied:
arguments that ask for an absurd network cost nothing.
"""

import contextlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

import dnnlib

LARGEST_NUMBER = 2**24  # of any whole number among the arguments: sizes, counts, seeds
LONGEST_LIST = 64
MOST_VALUES = 1000  # among all arguments of a network
MOST_TENSORS = 5000  # of a network; one for 1024x1024 has some 300
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build_from_tensors(cls: type, kwargs: Mapping, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """cls(**kwargs) with `tensors` (name -> tensor of any float type) as its parameters and buffers.

    Names and shapes must agree exactly on both sides. The tensors are copied, as float32. The result is on the CPU,
    in training mode and with gradients, as the constructor makes it. ValueError, in one line that names the argument
    or the tensor, for anything else; soon and without much memory, whatever the arguments are.
    """
    return fill(layout(cls, kwargs, len(tensors)), tensors)


def layout(cls: type, kwargs: Mapping, num_tensors: int) -> torch.nn.Module:
    """cls(**kwargs) without values: its tensors are on the meta device, but for filters, which follow from the
    arguments.

    num_tensors: how many there are to fill it. ValueError where the arguments are not plain values, absurdly large, or
    ask for a network of many more tensors.
    """
    if num_tensors > MOST_TENSORS:
        raise ValueError(f"{cls.__name__}: {num_tensors} tensors are too many, the most is {MOST_TENSORS}")
    kwargs = plain_values(cls.__name__, kwargs, LARGEST_NUMBER, num_tensors)
    count, limit = 0, 2 * num_tensors + 100

    def counted(_module, _name, tensor):
        nonlocal count
        count += tensor is not None
        if count > limit:
            raise ValueError(f"it has more than {limit} tensors")

    with contextlib.ExitStack() as stack:
        for register in [
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_buffer_registration_hook,
        ]:
            stack.callback(register(counted).remove)
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_WithoutValues())
        try:
            return cls(**kwargs)
        except Exception as err:  # a constructor may raise anything on arguments that make no sense
            raise ValueError(f"{cls.__name__} cannot be built from its arguments: {one_line(err)}") from err


class _WithoutValues(TorchFunctionMode):
    """Spares the meta device what only matters for values: its randn and its products with numbers are Python code for
    which PyTorch imports its compiler, a second at the start of every command."""

    PRODUCTS = (torch.Tensor.mul, torch.Tensor.div)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn:
            func = torch.empty
        elif func in self.PRODUCTS and not kwargs and args[0].is_meta and isinstance(args[1], int | float):
            return _like(args[0], "meta")
        return func(*args, **(kwargs or {}))


def _like(tensor, device):
    """A tensor of the same shape and memory format without values: torch.empty_like, but for that it is Python code,
    too, for meta tensors."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def named_tensors(network: torch.nn.Module) -> dict:
    """Name -> parameter or buffer."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def fill(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Gives a network from `layout` copies of all its tensors, checked first; returns it. ValueError as for
    `build_from_tensors`."""
    own = named_tensors(network)
    _check_tensors(type(network).__name__, own, tensors)
    for name, place in own.items():
        value = _like(place, "cpu")
        value.copy_(tensors[name].detach())
        if isinstance(place, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=place.requires_grad)
        parent, _dot, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, value)
    return network


def translated(
    network: torch.nn.Module, theirs: Mapping, counterpart: Callable[[str], tuple], what: str
) -> dict:
    """Tensors for `fill` from a file of other names and layouts: name -> tensor.

    theirs: name -> tensor or array. counterpart(name of ours): (name of theirs, change of layout, a function of the
    tensor). Filters follow from the arguments and stay as they are. ValueError, of which `what` is the beginning ('...:
    variable'), for one that is missing or of another shape.
    """
    own = named_tensors(network)
    tensors = {name: place for name, place in own.items() if name.endswith("resample_filter")}
    sources = {name: counterpart(name) for name in own if name not in tensors}
    for name, (source, _change) in sources.items():
        if source not in theirs:
            raise ValueError(f"{what} {source} is missing, expected {list(own[name].shape)} for {name}")
    _check_memory(what.partition(":")[0], [theirs[source] for source, _change in sources.values()])
    for name, (source, change) in sources.items():
        place, value = own[name], _as_tensor(theirs[source], f"{what} {source}")
        try:
            tensors[name] = change(value)
        except (IndexError, RuntimeError):  # too few or too many dimensions for its layout
            tensors[name] = None
        if tensors[name] is None or tensors[name].shape != place.shape:
            raise ValueError(
                f"{what} {source} has shape {list(value.shape)}, expected that of {list(place.shape)} for {name}"
            )
    return tensors


def _as_tensor(value, what):
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(
        value, float
    ):  # as np.float32 arrives, which TensorFlow gives for a tensor without dimensions
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, (np.ndarray, np.floating)) and value.dtype.kind == "f":
        return torch.from_numpy(np.array(value, dtype=np.float32))
    raise ValueError(f"{what} is not an array of floats")


def one_line(err: BaseException) -> str:
    """What an exception says, for use within a message: its first line, shortened, and its kind where that helps."""
    text = (str(err).splitlines() or [""])[0][:200]
    return text if text and isinstance(err, (AssertionError, ValueError)) else f"{type(err).__name__}: {text}"


def shown(value: object) -> str:
    """A value from a file within a message: short text and numbers as they are, of everything else the kind. Costs
    nothing, however large the value is."""
    if isinstance(value, str):
        return repr(value[:80])
    plain = value is None or isinstance(value, (bool, float))
    if plain or isinstance(value, int) and value.bit_length() <= 64:
        return repr(value)
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def plain_values(owner: str, kwargs: Mapping, largest: int = 2**63, most_layers: int | None = None) -> dict:
    """A copy of the arguments in plain Python values; ValueError where one is of another kind or too large.

    owner: whose arguments these are, for messages. largest: of the whole numbers; most_layers: of `num_layers`.
    """
    count = 0

    def copied(name, value, depth):
        nonlocal count
        count += 1
        if count > MOST_VALUES or depth > 8:
            raise ValueError(f"{owner} cannot have more than {MOST_VALUES} arguments, nested 8 deep")
        if isinstance(value, np.generic):
            value = value.item()  # pickles of NumPy's numbers do not open with every version of it
        if isinstance(value, Mapping):
            entries = {_argument_name(owner, k): copied(k, v, depth + 1) for k, v in value.items()}
            return dnnlib.EasyDict(entries) if isinstance(value, dnnlib.EasyDict) else entries
        if isinstance(value, (list, tuple)):
            if len(value) > LONGEST_LIST:
                raise ValueError(
                    f"{owner}: argument {name} has {len(value)} entries, the most is {LONGEST_LIST}"
                )
            entries = [copied(name, v, depth + 1) for v in value]
            return tuple(entries) if isinstance(value, tuple) else entries
        if isinstance(value, int) and not isinstance(value, bool):
            most = largest if most_layers is None or name != "num_layers" else most_layers
            if abs(value) > most:
                raise ValueError(
                    f"{owner}: argument {name} is {shown(value)}, the most for this file is {most}"
                )
        elif not (value is None or isinstance(value, (bool, float, str))):
            raise ValueError(f"{owner}: argument {name} is a {type(value).__name__}, not a plain value")
        return value

    return {_argument_name(owner, name): copied(name, value, 1) for name, value in kwargs.items()}


def _argument_name(owner, name):
    if not (isinstance(name, str) and name.isidentifier() and len(name) <= 64):
        raise ValueError(f"{owner}: {shown(name)} is not the name of an argument")
    return name


def _check_tensors(owner, own, tensors):
    """ValueError unless the tensors are plain ones of the names and shapes of `own`, and no more memory than they are
    stored in holds them all."""
    wrong = [f"{name} {list(place.shape)} is missing" for name, place in own.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            wrong.append(f"{name!r:.80} is not one of its tensors")
        elif tensor.layout is not torch.strided or tensor.dtype not in FLOATS or tensor.device.type == "meta":
            wrong.append(f"{name} holds {tensor.dtype}, {tensor.layout} on {tensor.device}, not plain floats")
        elif tensor.shape != own[name].shape:
            wrong.append(f"{name} has shape {list(tensor.shape)}, expected {list(own[name].shape)}")
    if wrong:
        raise ValueError(f"{owner}: {len(wrong)} tensors do not fit its arguments: {'; '.join(wrong[:3])}")
    _check_memory(owner, tensors.values())


def _check_memory(owner, values):
    """ValueError where tensors or arrays are views of less memory than their numbers need."""
    held = {}
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, np.ndarray):
            base = value
            while isinstance(base, np.ndarray) and base.base is not None:
                base = base.base
            held[id(base)] = base.nbytes if hasattr(base, "nbytes") else len(base)
        else:
            continue
        total += value.nbytes
    if total > sum(held.values()):
        raise ValueError(f"{owner}: its tensors of {total} bytes are views of less memory")
