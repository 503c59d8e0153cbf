# SPDX-License-Identifier: Apache-2.0
"""dnnlib.util.open_url against a web server on this machine that answers as it is told."""

import hashlib
import os

import pytest

from dnnlib import util

BINARY = bytes(range(256)) * 3  # not UTF-8, well below 8 KB


def read(*args, **kwargs):
    with util.open_url(*args, **kwargs) as file:
        return file.read()


@pytest.mark.parametrize(
    "obj, remote, with_files",
    [
        ("http://a.b/c", True, True),
        ("https://h.o?x=1", True, True),
        ("file:///c/d.e", False, True),
        ("http://localhost/c.d", False, False),
        ("a.b/c", False, False),
        ("http://", False, False),
        (b"http://a.b", False, False),
        (3, False, False),
    ],
)
def test_is_url(obj, remote, with_files):
    assert util.is_url(obj) is remote and util.is_url(obj, allow_file_urls=True) is with_files


def test_local_files(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    path.write_bytes(BINARY)
    for url in (str(path), f"file://{path}", path):
        assert read(url) == BINARY
        assert util.open_url(url, return_filename=True) == str(path)
    assert util.open_url("file:///C:/x.bin", return_filename=True) == "C:/x.bin"
    with pytest.raises(FileNotFoundError, match="missing.bin"):
        util.open_url(str(tmp_path / "missing.bin"))


def test_malformed_url_is_a_clear_error():
    with pytest.raises(ValueError, match="'http://localhost/x.pkl'.*local path"):
        util.open_url("http://localhost/x.pkl")
    with pytest.raises(AssertionError):
        util.open_url("http://a.b/c", num_attempts=0)
    with pytest.raises(AssertionError):
        util.open_url("http://a.b/c", cache=False, return_filename=True)


def test_downloads_once_and_caches(server, tmp_path, capsys):
    server.script["/net%20work.pkl?x=1"] = [(200, {}, BINARY)]
    url = server.url + "/net%20work.pkl?x=1"
    assert read(url, cache_dir=str(tmp_path)) == BINARY
    assert capsys.readouterr().out == f"Downloading {url} ... done\n"
    name = hashlib.md5(url.encode()).hexdigest() + "_net_work.pkl"
    assert sorted(os.listdir(tmp_path)) == [f"{name[:32]}.json", name]
    assert util.open_url(url, cache_dir=str(tmp_path), return_filename=True) == str(tmp_path / name)
    assert read(url, cache_dir=str(tmp_path)) == BINARY
    assert len(server.requests) == 1


def test_default_cache_and_no_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    server.script["/a"] = [(200, {"Content-Disposition": 'attachment; filename="the file.bin"'}, BINARY)]
    assert read(server.url + "/a", cache=False, verbose=False) == BINARY
    assert os.listdir(tmp_path) == []
    name = util.open_url(server.url + "/a", return_filename=True, verbose=False)
    assert os.path.dirname(name) == str(tmp_path / "downloads") and name.endswith("_the_file.bin")


def test_tries_again_up_to_num_attempts(server, tmp_path, capsys):
    answers = [(500, {}, b"busy"), (200, {}, b""), (200, {}, BINARY)]
    server.script["/x"] = list(answers)
    assert read(server.url + "/x", cache_dir=str(tmp_path), num_attempts=3) == BINARY
    assert capsys.readouterr().out == f"Downloading {server.url}/x ..... done\n"
    server.script["/y"] = list(answers)
    with pytest.raises(OSError, match="empty file") as info:
        util.open_url(server.url + "/y", cache_dir=str(tmp_path), num_attempts=2)
    assert f"{server.url}/y" in str(info.value) and "\n" not in str(info.value)
    assert capsys.readouterr().out.endswith(" failed\n")
    assert server.requests == ["/x"] * 3 + ["/y"] * 2


def test_offline_message_is_one_line_and_says_what_to_do(server, tmp_path, capsys):
    url = server.url + "/detector.pkl"
    server.http.server_close()  # now nobody listens there
    with pytest.raises(OSError) as info:
        util.open_url(url, cache_dir=str(tmp_path), num_attempts=2, verbose=False)
    message = str(info.value)
    assert url in message and "local path" in message and "\n" not in message
    assert "(ConnectionError: no connection to 127.0.0.1)" in message
    assert str(tmp_path) in message and "DNNLIB_CACHE_DIR" in message
    assert capsys.readouterr().out == "" and os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="ConnectionError") as info:
        util.open_url(url, cache=False, num_attempts=1, verbose=False)
    assert "DNNLIB_CACHE_DIR" not in str(info.value)


def test_keyboard_interrupt_gets_through(server, tmp_path, monkeypatch):
    import requests

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Session, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        util.open_url(server.url + "/x", cache_dir=str(tmp_path), verbose=False)


def test_google_drive_confirmation(server, tmp_path):
    cookie = {"Set-Cookie": "download_warning_1=t; Path=/"}
    page = b'<a href="/help">?</a> <a href="/uc?export=download&amp;confirm=t">Download anyway</a>'
    server.script["/uc"] = [(200, cookie, page)]
    server.script["/uc?export=download&confirm=t"] = [(200, {}, BINARY)]
    assert read(server.url + "/uc", cache_dir=str(tmp_path), verbose=False) == BINARY
    with pytest.raises(OSError, match="confirmation pages"):
        util.open_url(server.url + "/uc", cache=False, num_attempts=1, verbose=False)


def test_pages_in_place_of_files(server, tmp_path):
    quota, page = b"<html>Google Drive - Quota exceeded</html>", b"\n<!DOCTYPE html><html>log in first</html>"
    server.script["/q"], server.script["/p.pkl"] = [(200, {}, quota)], [(200, {}, page)]
    server.script["/p.html"] = [(200, {}, page)]
    for path, message in [("/q", "quota"), ("/p.pkl", "web page in place of the file")]:
        with pytest.raises(OSError, match=message):
            util.open_url(server.url + path, cache_dir=str(tmp_path), verbose=False)
    assert os.listdir(tmp_path) == [] and server.requests == ["/q", "/p.pkl"]  # asked once
    assert read(server.url + "/p.html", cache_dir=str(tmp_path), verbose=False) == page
