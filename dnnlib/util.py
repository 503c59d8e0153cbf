# SPDX-License-Identifier: Apache-2.0
"""Small helpers used everywhere. Imports neither torch nor numpy, so that `--help` stays instant.

EasyDict must be defined in this very module: pickles of the StyleGAN2-ADA family name it
`dnnlib.util.EasyDict`.
"""

import contextlib
import ctypes
import fnmatch
import importlib
import inspect
import io
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any


class EasyDict(dict):
    """A dict whose items can also be read, written and deleted as attributes. Nested dicts are left as they
    are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


# ----------------------------------------------------------------------------------------
# Console


class Logger:
    """Sends everything written to sys.stdout and sys.stderr to the original stdout and, if named, to a file.

    Takes effect on construction; `close()` or leaving the `with` block puts the streams back, but only those
    that still are this logger. `file_mode` is 'w' or 'a'; `should_flush` flushes after every write.
    """

    def __init__(self, file_name: str | None = None, file_mode: str = "w", should_flush: bool = True):
        self.stdout, self.stderr = sys.stdout, sys.stderr
        self.should_flush = should_flush
        self.file = None if file_name is None else open(file_name, file_mode, encoding="utf-8")
        sys.stdout = sys.stderr = self

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        # encoding, fileno() and the like are those of the terminal behind.
        if name in ("stdout", "stderr", "file"):
            raise AttributeError(name)
        return getattr(self.stdout, name)

    def isatty(self) -> bool:
        """Whether this is a terminal and nothing else: lines that are rewritten would pile up in the file."""
        return self.file is None and self.stdout.isatty()

    def _sinks(self) -> list:
        return [self.stdout] if self.file is None else [self.file, self.stdout]

    def write(self, text: str | bytes) -> None:
        """Writes text (bytes are decoded as UTF-8) to the console and the file; an empty string is
        ignored."""
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        if not text:
            return
        for sink in self._sinks():
            sink.write(text)
        if self.should_flush:
            self.flush()

    def flush(self) -> None:
        """Flushes the console and the file."""
        for sink in self._sinks():
            sink.flush()

    def close(self) -> None:
        """Puts the original streams back and closes the file. May be called twice. The streams are back even where
        this raises an OSError, as the disk is full."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is self:
                setattr(sys, name, getattr(self, name))
        file, self.file = self.file, None
        try:
            self.flush()
        finally:
            if file is not None:
                file.close()


def format_time(seconds: float) -> str:
    """Readable duration, rounded to seconds: '7s', '1m 00s', '1h 00m 00s', '2d 07h 33m'."""
    minutes, secs = divmod(round(float(seconds)), 60)
    hours, mins = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}h {mins:02}m"
    if hours:
        return f"{hours}h {mins:02}m {secs:02}s"
    return f"{mins}m {secs:02}s" if mins else f"{secs}s"


def format_time_brief(seconds: float) -> str:
    """Readable duration in two units: '0h 01m' below a day, else '2d 07h'."""
    hours, rest = divmod(round(float(seconds)), 3600)
    return f"{hours // 24}d {hours % 24:02}h" if hours >= 24 else f"{hours}h {rest // 60:02}m"


def shell_word(text: str) -> str:
    """The text as one word of a command line, in quotes where it has spaces or signs that mean something there."""
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def ask_yes_no(question: str) -> bool:
    """Asks on the console until the answer means yes or no."""
    answers = {"y": True, "yes": True, "true": True, "t": True, "on": True, "1": True}
    answers.update({"n": False, "no": False, "false": False, "f": False, "off": False, "0": False})
    while True:
        reply = input(f"{question} [y/n] ").strip().lower()
        if reply in answers:
            return answers[reply]


# ----------------------------------------------------------------------------------------
# Values and types


def tuple_product(t: tuple) -> Any:
    """Product of the numbers in `t`; 1 for an empty tuple."""
    return math.prod(t)


def get_dtype_and_ctype(type_obj: Any) -> tuple:
    """(numpy dtype, ctypes type) of a number type given by its name, a numpy type or a dtype.

    Accepted: uint8 ... uint64, int8 ... int64, float32, float64; anything else is a ValueError.
    """
    import numpy as np

    name = (
        type_obj
        if isinstance(type_obj, str)
        else getattr(type_obj, "__name__", getattr(type_obj, "name", None))
    )
    ctypes_of = {
        f"{sign}int{bits}": getattr(ctypes, f"c_{sign}int{bits}")
        for bits in (8, 16, 32, 64)
        for sign in ("u", "")
    }
    ctypes_of.update(float32=ctypes.c_float, float64=ctypes.c_double)
    if name not in ctypes_of:
        raise ValueError(f"Unknown number type {type_obj!r}; accepted: {', '.join(ctypes_of)}")
    return np.dtype(name), ctypes_of[name]


def is_pickleable(obj: Any) -> bool:
    """Whether pickle accepts the object. Costs as much as pickling it."""
    try:
        pickle.dumps(obj)
    except Exception:  # pickle raises whatever the object's own code raises
        return False
    return True


# ----------------------------------------------------------------------------------------
# Names to objects


def get_module_from_obj_name(obj_name: str) -> tuple:
    """Splits 'package.module.Class.attr' into (the module, imported, and the rest of the name).

    The longest importable module path wins. 'np.' and 'tf.' stand for numpy and tensorflow. When nothing
    fits, the error that tells most is raised: an ImportError from inside a module that exists, an
    AttributeError of the last module found, or the ImportError of the first part.
    """
    first, dot, rest = obj_name.partition(".")
    parts = (
        ({"np": "numpy", "tf": "tensorflow"}.get(first, first) + dot + rest).split(".") if dot else [first]
    )
    failure: Exception | None = None
    for cut in range(len(parts), 0, -1):
        module_name, local_name = ".".join(parts[:cut]), ".".join(parts[cut:])
        try:
            module = importlib.import_module(module_name)
            get_obj_from_module(module, local_name)
            return module, local_name
        except ModuleNotFoundError as error:
            # A missing import *inside* an existing module is the user's real problem: do not hide it.
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            failure = failure or (error if cut == 1 else None)
        except AttributeError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def get_obj_from_module(module: Any, obj_name: str) -> Any:
    """Follows a dotted name from a module; the empty name is the module itself."""
    obj = module
    for part in filter(None, obj_name.split(".")):
        obj = getattr(obj, part)
    return obj


def get_obj_by_name(name: str) -> Any:
    """The object of a full dotted name, e.g. 'training.loss.StyleGAN2Loss'."""
    return get_obj_from_module(*get_module_from_obj_name(name))


def call_func_by_name(*args: Any, func_name: str | None = None, **kwargs: Any) -> Any:
    """Calls the function (or class) of a dotted name with the other arguments."""
    assert func_name is not None, "func_name is required"
    target = get_obj_by_name(func_name)
    assert callable(target), f"{func_name} is not callable"
    return target(*args, **kwargs)


def construct_class_by_name(*args: Any, class_name: str | None = None, **kwargs: Any) -> Any:
    """Builds an object of the class of a dotted name with the other arguments."""
    return call_func_by_name(*args, func_name=class_name, **kwargs)


def get_module_dir_by_obj_name(obj_name: str) -> str:
    """Folder of the module that defines the object of a dotted name."""
    return str(Path(inspect.getfile(get_module_from_obj_name(obj_name)[0])).parent)


def is_top_level_function(obj: Any) -> bool:
    """Whether the object is callable and a global of its module."""
    return callable(obj) and hasattr(obj, "__name__") and obj.__name__ in vars(sys.modules[obj.__module__])


def get_top_level_function_name(obj: Any) -> str:
    """Dotted name of a top-level function; `__main__` becomes the name of the script."""
    assert is_top_level_function(obj), f"{obj!r} is not a top-level function"
    module = obj.__module__
    if module == "__main__":
        module = Path(sys.modules[module].__file__).stem
    return f"{module}.{obj.__name__}"


# ----------------------------------------------------------------------------------------
# Files


def list_dir_recursively_with_ignore(
    dir_path: str, ignores: list | None = None, add_base_to_relative: bool = False
) -> list:
    """Lists the files below a folder as (absolute path, relative path) pairs.

    `ignores`: fnmatch patterns; files and whole folders of such a name are left out. `add_base_to_relative`
    puts the folder's own name in front of the relative paths.
    """
    root = os.path.abspath(dir_path)
    if not os.path.isdir(root):
        raise NotADirectoryError(f"Not a folder: {dir_path}")
    start = os.path.dirname(root) if add_base_to_relative else root

    def wanted(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, pattern) for pattern in ignores or ())

    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = filter(wanted, subfolders)  # in place: os.walk then does not enter the others
        paths = [os.path.join(folder, name) for name in names if wanted(name)]
        found += [(path, os.path.relpath(path, start)) for path in paths]
    return found


def copy_files_and_create_dirs(files: list) -> None:
    """Copies (source, destination) pairs, creating the folders of the destinations."""
    for source, destination in files:
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike):
    """A binary file that appears under `path` complete or not at all.

    Written under another name in the same folder, to the disk itself, so that a power cut leaves the old file or the
    new one, then renamed; on an exception nothing is left behind. An OSError of writing, such as a full disk, names
    `path`.
    """
    final = Path(path)
    draft = final.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, final)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(draft)):
            raise  # not of this file
        raise OSError(error.errno, error.strerror, str(final)) from error
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(folder: str | os.PathLike) -> None:
    """Deletes what open_atomic left in a folder when its process was killed; nobody may be writing there."""
    for path in Path(folder).iterdir():
        if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name):
            path.unlink()


@contextlib.contextmanager
def file_lock(path: str | os.PathLike):
    """Context that no two processes are in at the same time for one file; gives whether it was free.

    The file is made, and stays. The lock ends with this process, however it ends, and child processes do not share it.
    Always free where the system or the file system knows no such locks.
    """
    with open(path, "a") as file:
        free = True
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            free = False
        except (ImportError, OSError):
            pass
        yield free


_cache_root: str | None = None


def set_cache_dir(path: str | None) -> None:
    """Sets the root of the cache for this process; None returns to the default."""
    global _cache_root
    _cache_root = path


def make_cache_dir_path(*paths: str) -> str:
    """Path below the cache root, which is the first of: set_cache_dir(), $DNNLIB_CACHE_DIR,
    $HOME/.cache/dnnlib, %USERPROFILE%/.cache/dnnlib, <temp>/.cache/dnnlib. Creates nothing."""
    root = _cache_root or os.environ.get("DNNLIB_CACHE_DIR")
    if root is None:
        home = os.environ.get("HOME") or os.environ.get("USERPROFILE") or tempfile.gettempdir()
        root = os.path.join(home, ".cache", "dnnlib")
    return os.path.join(root, *paths)


# ----------------------------------------------------------------------------------------
# URLs


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Whether the object is a string with a scheme and a host with a dot in it (or a file:// URL, if
    allowed)."""
    if not isinstance(obj, str):
        return False
    scheme, separator, rest = obj.partition("://")
    if not (scheme and separator):
        return False
    if scheme == "file" and allow_file_urls:
        return True
    return "." in re.split(r"[/?#]", rest)[0]


def open_url(
    url: str,
    cache_dir: str | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
) -> Any:
    """Opens a local path, a file:// URL or something to download; returns a binary file, or a local file
    name.

    Downloads are kept in `cache_dir` (default: 'downloads' in the cache) as <md5 of the URL>_<name> and never
    fetched again; an interrupted one is gone on with. `num_attempts`: how many requests at most.
    `return_filename` needs `cache`. Raises OSError in one line when the file cannot be had or is not what the
    URL gave at first, ValueError for a malformed URL.
    """
    assert num_attempts >= 1
    assert cache or not return_filename
    local = _local_path_of(url)
    if local is None:
        from dnnlib import download

        if not is_url(url):
            raise ValueError(
                f"Not a URL to download from: {url!r}; accepted: https://host.name/..., file://, a local path"
            )
        if not cache:
            return io.BytesIO(download.fetch_bytes(url, num_attempts, verbose))
        folder = make_cache_dir_path("downloads") if cache_dir is None else cache_dir
        local = download.fetch(url, Path(folder), num_attempts, verbose)
    return str(local) if return_filename else open(local, "rb")


def _local_path_of(url: str | os.PathLike) -> str | None:
    """The local path that a path or file:// URL names; None for other URLs."""
    text = os.fspath(url)
    if not re.match(r"[a-z]+://", text):
        return text
    if not text.startswith("file://"):
        return None
    path = text[len("file://") :]
    return path[1:] if re.match(r"/[a-zA-Z]:", path) else path  # '/C:/x' is 'C:/x' on Windows
