# SPDX-License-Identifier: Apache-2.0
"""dnnlib.util: dictionaries, the logger, names to objects, files."""

import builtins
import copy
import ctypes
import datetime
import errno
import io
import math
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dnnlib
from dnnlib import util
from tests.helpers import other_process_locks


def test_importing_stays_light():
    heavy = {"torch", "numpy", "requests", "scipy"}
    code = f"import sys, dnnlib.plugins; print(sorted({heavy} & set(sys.modules)))"
    root = os.path.dirname(os.path.dirname(dnnlib.__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


class TestEasyDict:
    def test_attributes_are_items(self):
        d = dnnlib.EasyDict(a=1)
        d.b = 2
        d["c"] = 3
        del d.a
        assert d == {"b": 2, "c": 3} and d.c == 3 and list(d) == ["b", "c"]

    def test_missing_names(self):
        d = dnnlib.EasyDict()
        with pytest.raises(AttributeError, match="^nope$"):
            _ = d.nope
        with pytest.raises(KeyError):
            del d.nope
        assert getattr(d, "nope", 5) == 5 and not hasattr(d, "nope")

    def test_nested_dicts_are_left_alone(self):
        inner = {"x": 1}
        assert dnnlib.EasyDict(inner=inner).inner is inner and type(inner) is dict

    def test_pickles_and_copies_as_itself(self):
        d = dnnlib.EasyDict(a=dnnlib.EasyDict(b=[1]), c={"d": 2})
        for other in (pickle.loads(pickle.dumps(d, protocol=4)), copy.deepcopy(d)):
            assert other == d and type(other.a) is dnnlib.EasyDict and type(other.c) is dict
            assert other.a.b is not d.a.b
        assert type(d).__module__ == "dnnlib.util"


class TestLogger:
    @staticmethod
    def screen(monkeypatch):  # not a fixture: pytest changes the streams between set-up and test
        streams = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        return streams

    def test_both_streams_reach_console_and_file(self, monkeypatch, tmp_path):
        screen = self.screen(monkeypatch)
        path = tmp_path / "log.txt"
        with util.Logger(str(path)) as logger:
            print("one")
            print("two", file=sys.stderr)
            logger.write(b"three\n")
            logger.write("")
            assert path.read_text() == "one\ntwo\nthree\n"  # flushed at every write
        assert (sys.stdout, sys.stderr) == screen
        assert screen[0].getvalue() == "one\ntwo\nthree\n" and screen[1].getvalue() == ""

    def test_append(self, monkeypatch, tmp_path):
        self.screen(monkeypatch)
        path = tmp_path / "log.txt"
        path.write_text("before\n")
        with util.Logger(str(path), file_mode="a", should_flush=False):
            print("after")
        assert path.read_text() == "before\nafter\n"

    def test_without_file_and_closed_twice(self, monkeypatch):
        screen = self.screen(monkeypatch)
        logger = util.Logger()
        assert not sys.stdout.isatty()  # that of the stream behind
        logger.close()
        logger.close()
        assert sys.stdout is screen[0]

    def test_a_terminal_with_a_file_beside_it_is_none(self, monkeypatch, tmp_path):
        screen = self.screen(monkeypatch)
        monkeypatch.setattr(screen[0], "isatty", lambda: True)
        with util.Logger():
            assert sys.stdout.isatty()
        with util.Logger(str(tmp_path / "log.txt")):
            assert not sys.stdout.isatty()  # rewritten lines would pile up in the file

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
    def test_a_full_disk_does_not_keep_the_streams(self, monkeypatch):
        screen = self.screen(monkeypatch)
        logger = util.Logger("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            print("lost")
        with pytest.raises(OSError, match="No space left"):
            logger.close()
        assert (sys.stdout, sys.stderr) == screen and logger.file is None
        logger.close()

    def test_leaves_the_streams_of_others_alone(self, monkeypatch):
        screen = self.screen(monkeypatch)
        logger = util.Logger()
        other = io.StringIO()
        sys.stdout = other
        logger.close()
        assert sys.stdout is other and sys.stderr is screen[1]


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m 00s")]
    + [(86399, "23h 59m 59s"), (86400, "1d 00h 00m"), (200000, "2d 07h 33m")],
)
def test_format_time(seconds, text):
    assert util.format_time(seconds) == util.format_time(np.float64(seconds)) == text


@pytest.mark.parametrize(
    "seconds, text", [(59, "0h 00m"), (3600, "1h 00m"), (86399, "23h 59m"), (200000, "2d 07h")]
)
def test_format_time_brief(seconds, text):
    assert util.format_time_brief(seconds) == text


def test_shell_words_come_back_as_they_were():
    for text in ["--resume=runs/00000-a", "--from=Mein schöner Ordner/1", "it's $HOME"]:
        assert shlex.split(util.shell_word(text)) == [text]
    assert util.shell_word("--from=out/00000-blocks5_6") == "--from=out/00000-blocks5_6"


def test_ask_yes_no_insists(monkeypatch):
    replies = iter(["", "perhaps", " Yes ", "n"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(replies))
    assert util.ask_yes_no("Sure?") is True
    assert util.ask_yes_no("Sure?") is False


def test_values_and_types():
    assert util.tuple_product((2, 3, 4)) == 24 and util.tuple_product(()) == 1
    assert util.get_dtype_and_ctype("uint8") == (np.dtype("uint8"), ctypes.c_uint8)
    assert util.get_dtype_and_ctype(np.int16) == (np.dtype("int16"), ctypes.c_int16)
    assert util.get_dtype_and_ctype(np.dtype("float64")) == (np.dtype("float64"), ctypes.c_double)
    with pytest.raises(ValueError, match="complex64"):
        util.get_dtype_and_ctype("complex64")
    assert util.is_pickleable({"a": 1}) and not util.is_pickleable(lambda: 0)


class TestNames:
    def test_longest_module_wins(self):
        assert util.get_module_from_obj_name("os.path.join") == (os.path, "join")
        assert util.get_module_from_obj_name("os.path") == (os.path, "")
        assert util.get_module_from_obj_name("datetime.datetime.now")[1] == "datetime.now"
        assert util.get_obj_by_name("datetime.datetime.min") == datetime.datetime.min
        assert util.get_obj_by_name("os.path") is os.path
        assert util.get_obj_by_name("np.float32") is np.float32

    def test_failures_tell_the_real_reason(self, tmp_path, monkeypatch):
        with pytest.raises(AttributeError, match="Nope"):
            util.get_obj_by_name("os.path.Nope")
        with pytest.raises(ImportError, match="no_such_package"):
            util.get_obj_by_name("no_such_package.module.Class")
        (tmp_path / "needs_more.py").write_text("import something_not_installed\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match="something_not_installed"):
            util.get_obj_by_name("needs_more.Class")

    def test_a_function_shadowing_a_module(self, tmp_path, monkeypatch):
        package = tmp_path / "shadowed_pkg"
        package.mkdir()
        (package / "__init__.py").write_text("from shadowed_pkg.tool import tool\n")
        (package / "tool.py").write_text("def tool(): pass\ntool.speed = 7\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert util.get_obj_by_name("shadowed_pkg.tool.speed") == 7

    def test_calls(self):
        assert util.call_func_by_name(3, 4, func_name="math.hypot") == 5
        made = util.construct_class_by_name(class_name="fractions.Fraction", numerator=1, denominator=2)
        assert made == 0.5
        with pytest.raises(AssertionError):
            util.call_func_by_name(1)
        with pytest.raises(AssertionError, match="not callable"):
            util.call_func_by_name(func_name="math.pi")

    def test_back_to_names(self):
        assert util.get_module_dir_by_obj_name("dnnlib.util.EasyDict") == os.path.dirname(dnnlib.__file__)
        assert util.is_top_level_function(util.format_time)
        assert not util.is_top_level_function(lambda: 0) and not util.is_top_level_function(math.pi)
        assert util.get_top_level_function_name(util.format_time) == "dnnlib.util.format_time"


class TestFiles:
    @pytest.fixture
    def tree(self, tmp_path):
        for name in ("src/a.py", "src/b.pyc", "src/sub/c.py", "src/.git/d.py"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return tmp_path

    def test_list_and_copy(self, tree):
        found = util.list_dir_recursively_with_ignore(str(tree / "src"), ignores=["*.pyc", ".git"])
        relative = sorted(rel for _, rel in found)
        assert relative == ["a.py", os.path.join("sub", "c.py")]
        assert all(path == os.path.join(tree, "src", rel) for path, rel in found)
        util.copy_files_and_create_dirs([(path, str(tree / "dst" / rel)) for path, rel in found])
        assert (tree / "dst" / "sub" / "c.py").read_text() == "src/sub/c.py"

    def test_base_folder_in_front(self, tree):
        found = util.list_dir_recursively_with_ignore(
            str(tree / "src"), ["sub", ".*"], add_base_to_relative=True
        )
        assert sorted(rel for _, rel in found) == [os.path.join("src", name) for name in ("a.py", "b.pyc")]
        with pytest.raises(NotADirectoryError, match="nowhere"):
            util.list_dir_recursively_with_ignore("nowhere")

    def test_open_atomic_keeps_the_old_file_on_failure(self, tmp_path):
        path = tmp_path / "x.bin"
        with util.open_atomic(path) as file:
            file.write(b"old")
        with pytest.raises(RuntimeError), util.open_atomic(path) as file:
            file.write(b"half of the new")
            raise RuntimeError("power cut")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]

    def test_open_atomic_is_on_the_disk_before_it_takes_the_name(self, tmp_path, monkeypatch):
        sizes, replaced = [], os.replace
        monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
        monkeypatch.setattr(os, "replace", lambda *paths: sizes.append("name") or replaced(*paths))
        with util.open_atomic(tmp_path / "x.bin") as file:
            file.write(b"four")
        assert sizes == [4, "name"]

    def test_drafts_of_a_killed_process_are_removed_and_nothing_else(self, tmp_path, monkeypatch):
        with monkeypatch.context() as m:  # as if killed
            m.setattr(os, "replace", lambda *paths: None)
            m.setattr(Path, "unlink", lambda *args, **kwargs: None)
            with util.open_atomic(tmp_path / "a.bin") as file:
                file.write(b"x")
        others = [".hidden", "my.tmp", ".0123.tmp"]
        for name in others:
            (tmp_path / name).touch()
        assert len(os.listdir(tmp_path)) == 4
        util.remove_drafts(tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(others)

    def test_a_lock_excludes_other_processes_until_they_end(self, tmp_path):
        pytest.importorskip("fcntl", reason="this system has no such locks")
        path = str(tmp_path / ".lock")
        with other_process_locks(path):
            with util.file_lock(path) as free:
                assert not free
        with util.file_lock(path) as free:
            assert free

    def test_where_there_are_no_locks_all_are_free(self, tmp_path, monkeypatch):
        fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")

        def refuse(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", refuse)
        with util.file_lock(tmp_path / ".lock") as free:
            assert free

    def test_open_atomic_names_the_file_that_could_not_be_written(self, tmp_path):
        path = tmp_path / "x.bin"
        with pytest.raises(OSError) as caught, util.open_atomic(path) as file:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")  # as write() does: without a name
        assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'" and not os.listdir(
            tmp_path
        )
        with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*missing/y.bin'"):
            with util.open_atomic(tmp_path / "missing" / "y.bin"):
                pass
        other = OSError("of the user's own")
        with pytest.raises(OSError) as caught, util.open_atomic(path):
            raise other
        assert caught.value is other
        with pytest.raises(FileNotFoundError, match="elsewhere"), util.open_atomic(path):
            open(tmp_path / "elsewhere")

    def test_cache_dir_order(self, monkeypatch):
        for name in ("DNNLIB_CACHE_DIR", "HOME", "USERPROFILE"):
            monkeypatch.delenv(name, raising=False)
        assert util.make_cache_dir_path("a").endswith(os.path.join(".cache", "dnnlib", "a"))
        for name, root in (("USERPROFILE", "/user"), ("HOME", "/home/me")):
            monkeypatch.setenv(name, root)
            assert util.make_cache_dir_path("a", "b") == os.path.join(root, ".cache", "dnnlib", "a", "b")
        monkeypatch.setenv("DNNLIB_CACHE_DIR", "/env")
        assert util.make_cache_dir_path("a") == os.path.join("/env", "a")
        monkeypatch.setattr(util, "_cache_root", None)  # restored afterwards
        util.set_cache_dir("/set")
        assert dnnlib.make_cache_dir_path() == "/set"
