# SPDX-License-Identifier: Apache-2.0
"""Downloads that break, go on, meet each other, or bring something else."""

import hashlib
import json
import os
import random
import sys
import threading

import pytest

from dnnlib import download

BODY = random.Random(0).randbytes(5000)
OTHER = random.Random(1).randbytes(5000)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Few bytes at a time, so that a connection that breaks has brought something."""
    monkeypatch.setattr(download, "_CHUNK", 100)
    monkeypatch.setattr(download, "_PAGE_LIMIT", 200)


@pytest.fixture
def fetch(server, tmp_path):
    """fetch(answers, **options) -> bytes of the file; asks for /net.pkl."""

    def fetch(*answers, verbose=False, **options):
        server.script["/net.pkl"] = list(answers)
        return download.fetch(server.url + "/net.pkl", tmp_path, verbose=verbose, **options).read_bytes()

    return fetch


def names(folder):
    """Names of files without the md5 of the URL."""
    return sorted(name[32:] for name in os.listdir(folder))


@pytest.mark.parametrize("version", [dict(ETag='"1"'), dict(Last_Modified="Sat, 22 Nov 2025 00:00:00 GMT")])
def test_a_broken_download_is_gone_on_with(fetch, range_file, tmp_path, version):
    first, rest = range_file(BODY, cut=3000, **version), range_file(BODY, **version)
    assert fetch(first, rest) == BODY
    assert first.asked == [None] and rest.asked == ["bytes=3000-"]
    assert names(tmp_path) == [".json", "_net.pkl"]


def test_also_by_a_later_call(fetch, server, range_file, tmp_path, capsys):
    first, rest = range_file(BODY, cut=3000, ETag='"1"'), range_file(BODY, ETag='"1"')
    with pytest.raises(OSError, match="the connection broke|ended after 3000 of 5000 bytes"):
        fetch(first, num_attempts=1)
    assert names(tmp_path) == [".part", ".part.json"]
    assert fetch(rest, verbose=True) == BODY and rest.asked == ["bytes=3000-"]
    assert capsys.readouterr().out == f"Downloading {server.url}/net.pkl ... from 0.0 MB on done\n"


def test_ctrl_c_keeps_what_has_come(fetch, range_file, tmp_path, monkeypatch):
    def interrupt(self, size, total):
        if size >= 3000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download._Report, "progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(range_file(BODY, ETag='"1"'))
    rest = range_file(BODY, ETag='"1"')
    assert fetch(rest) == BODY and rest.asked == ["bytes=3000-"]


def test_a_part_that_lacks_nothing_needs_no_request(fetch, range_file, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt  # between the last byte and the file's own name

    with monkeypatch.context() as patch:
        patch.setattr(download, "_compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(range_file(BODY, ETag='"1"'))
    assert fetch((500, {}, b"")) == BODY


@pytest.mark.parametrize(
    "answer",
    [
        dict(ETag='"2"'),  # answers 200 with all of it
        dict(ETag='"2"', blind=True),  # answers 206 with the rest of another file
        dict(Last_Modified="now"),
    ],
)
def test_another_version_starts_over(fetch, range_file, answer):
    assert fetch(range_file(BODY, cut=3000, ETag='"1"'), range_file(OTHER, **answer)) == OTHER


def test_another_length_starts_over(fetch, range_file):
    shorter = range_file(OTHER[:2000], blind=True, ETag='"1"')
    assert fetch(range_file(BODY, cut=3000, ETag='"1"'), shorter) == OTHER[:2000]  # answers 416 at first
    assert shorter.asked == ["bytes=3000-", None]


def test_a_longer_file_under_the_same_tag_starts_over(fetch, range_file):
    longer = range_file(OTHER + BODY, blind=True, ETag='"1"')
    assert fetch(range_file(BODY, cut=3000, ETag='"1"'), longer) == OTHER + BODY
    assert longer.asked == ["bytes=3000-", None]


@pytest.mark.parametrize("version", [dict(), dict(ETag='W/"1"'), dict(ETag='"1"', Accept_Ranges="none")])
def test_without_a_version_everything_is_asked_for_again(fetch, range_file, tmp_path, version):
    """Bytes 3000 and on of who knows which file are worth nothing, and so is the part."""
    first, second = range_file(BODY, cut=3000, **version), range_file(BODY, **version)
    with pytest.raises(OSError):
        fetch(first, num_attempts=1)
    assert names(tmp_path) == []
    assert fetch(first, second) == BODY and second.asked == [None]


def test_a_server_without_ranges_starts_over(fetch):
    tag = {"ETag": '"1"', "Content-Length": "5000"}
    assert fetch((200, tag, BODY[:3000]), (200, tag, BODY)) == BODY


def test_too_short(fetch, tmp_path):
    with pytest.raises(OSError, match=r"Cannot download http://.*/net.pkl \(.*conn") as info:
        fetch((200, {"Content-Length": "5001"}, BODY), num_attempts=3)
    assert "\n" not in str(info.value) and names(tmp_path) == []


def test_what_is_not_there_is_asked_for_once(fetch, server):
    with pytest.raises(OSError, match=r"HTTPError: 404 Not Found"):
        fetch((404, {}, b"no"))
    assert len(server.requests) == 1
    assert fetch((429, {}, b"slowly"), (503, {}, b"later"), (200, {}, BODY)) == BODY


# The record.


def test_the_first_download_is_recorded_and_later_ones_compared(fetch, server, tmp_path):
    assert fetch((200, {}, BODY)) == BODY
    (record,) = tmp_path.glob("*.json")
    digest = hashlib.sha256(BODY).hexdigest()
    assert json.loads(record.read_text())["sha256"] == digest == download.sha256_of(*tmp_path.glob("*_*"))
    (path,) = tmp_path.glob("*_net.pkl")
    path.unlink()
    with pytest.raises(
        download.ChecksumError, match="What comes now is not what http.*delete that record"
    ) as info:
        fetch((200, {}, OTHER))
    assert str(record) in str(info.value) and "\n" not in str(info.value)
    assert names(tmp_path) == [".json"]
    assert fetch((200, {}, BODY)) == BODY
    record.unlink()
    path.unlink()
    assert fetch((200, {}, OTHER)) == OTHER


def test_a_cached_file_that_changed(fetch, tmp_path):
    fetch((200, {}, BODY))
    (path,) = tmp_path.glob("*_net.pkl")
    os.utime(path, ns=(1, 1))
    assert fetch() == BODY  # touched, but the same
    path.write_bytes(BODY[:-1])
    with pytest.raises(OSError, match="_net.pkl is not what http.*delete the file to fetch it again"):
        fetch()
    path.unlink()
    assert fetch((200, {}, BODY)) == BODY


def test_files_of_other_tools_are_taken_and_recorded(fetch, server, tmp_path):
    key = hashlib.md5(f"{server.url}/net.pkl".encode()).hexdigest()
    (tmp_path / f"{key}_net.pkl").write_bytes(BODY)
    assert fetch() == BODY and server.requests == []
    assert names(tmp_path) == [".json", "_net.pkl"]
    (tmp_path / f"{key}.json").write_text("half a rec")
    assert fetch() == BODY


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    server.script["/net.pkl"] = [(200, {}, BODY)]
    with pytest.raises(
        download.DownloadError, match="Cannot keep http.*DNNLIB_CACHE_DIR names another place"
    ):
        download.fetch(server.url + "/net.pkl", tmp_path / "file", verbose=False)
    assert server.requests == []


# Several at once.


def test_processes_wait_for_each_other(server, tmp_path, monkeypatch, capsys):
    """The first one's answer is held back until the second one waits; there is only one request."""
    waits = threading.Event()

    def answer(_headers):
        assert waits.wait(20)
        return 200, {}, BODY

    monkeypatch.setattr(download.time, "sleep", lambda seconds: waits.set() if seconds else None)
    server.script["/net.pkl"] = [answer]
    found = []

    def one():
        found.append(download.fetch(server.url + "/net.pkl", tmp_path).read_bytes())

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BODY, BODY] and server.requests == ["/net.pkl"]
    assert "Waiting for another process to download" in capsys.readouterr().out
    assert names(tmp_path) == [".json", "_net.pkl"]


def test_without_locks_each_has_a_part_of_its_own(fetch, server, tmp_path, monkeypatch):
    def unsupported(_file):
        raise OSError("no locks here")

    monkeypatch.setattr(download, "_try_lock", unsupported)
    shown = []

    def answer(_headers):
        shown.append(names(tmp_path))
        return 200, {"ETag": '"1"', "Content-Length": "5001"}, BODY

    with pytest.raises(OSError, match="Cannot download"):
        fetch(answer, num_attempts=2)
    assert [name for name in shown[1] if name.endswith(".part")] != [".part"]
    assert names(tmp_path) == []  # nobody could go on from it
    assert fetch((200, {}, BODY)) == BODY


# What is said.


def test_a_log_gets_a_few_percentages_of_large_files(fetch, server, monkeypatch, capsys):
    monkeypatch.setattr(download, "_LARGE", 5000)
    fetch((200, {}, BODY), verbose=True)
    assert capsys.readouterr().out == f"Downloading {server.url}/net.pkl ... 25% 50% 75% done\n"


def test_a_terminal_gets_size_rate_and_time_left(monkeypatch, capsys):
    """200 MB, of which 50 are there: 10 MB/s, and one line that is rewritten."""
    clock = [100.0]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(download.time, "monotonic", lambda: clock[0])
    report = download._Report("https://host.name/net.pkl", verbose=True)
    report.attempt(0, 50_000_000)
    for second in (2.0, 2.1, 5.0):  # the second one comes too soon
        clock[0] = 100 + second
        report.progress(50_000_000 + int(second * 1e7), 200_000_000)
    clock[0] += 1
    report.progress(110_000_000, None)
    report.end(" done")
    first, rest = capsys.readouterr().out.split("\n", 1)
    assert first == "Downloading https://host.name/net.pkl ... from 50.0 MB on"
    assert [line.rstrip() for line in rest.split("\r")] == [
        "  35% 70.0 of 200.0 MB, 10.0 MB/s, eta 13s",
        "  50% 100.0 of 200.0 MB, 10.0 MB/s, eta 10s",
        "      110.0 MB, 10.0 MB/s",
        " done",
    ]
    assert rest.endswith("\n")


def test_answers_without_a_length(fetch):
    """In chunks, whose end is marked: one that has no end is broken."""
    headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    parts = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:4000], BODY[4000:]))
    with pytest.raises(OSError, match="Cannot download"):
        fetch((200, headers, parts), num_attempts=2)
    assert fetch((200, headers, parts + b"0\r\n\r\n"), verbose=True) == BODY
