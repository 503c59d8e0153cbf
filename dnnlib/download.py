# SPDX-License-Identifier: Apache-2.0
"""Downloading files into a cache: what dnnlib.util.open_url does when the file is not local.

In the folder of the cache, KEY being the md5 of the URL:

    KEY_name        the file: complete, or not there at all
    KEY.json        its sha256 at the first download or first use; later ones must agree
    KEY.part        what has come so far (with a note in KEY.part.json): the next attempt goes on from there
    KEY.lock        there while a process downloads; others wait for that one
"""

import contextlib
import hashlib
import html
import itertools
import json
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from dnnlib.util import format_time, open_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TIMEOUT = (15, 120)  # seconds: to connect, and between two packets
_PAUSE = 0.5  # seconds before a server that answered is asked again; doubles each time, 8 at most
_CHUNK = 1 << 18
_PAGE_LIMIT = 8192  # a body below this may be a web page that Google Drive sends in place of the file
_LARGE = 16 << 20  # bytes from which on a log shows how far a download is
_PASSING = (408, 425, 429)  # errors 4xx that may be over soon; others stay


class DownloadError(OSError):
    """A file that cannot be had; one line says why and what works in its place, `reason` only why."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason or message


class ChecksumError(DownloadError):
    """A file that is not what the same URL gave at first."""


class _Refused(Exception):
    """An answer that is not the file. `passing`: asking again may help."""

    def __init__(self, reason: str, passing: bool):
        super().__init__(reason)
        self.passing = passing


def fetch(url: str, folder: Path, num_attempts: int = 10, verbose: bool = True) -> Path:
    """Path of a URL's file in the cache `folder`; downloaded if it is not there yet, as module docs say.

    DownloadError after `num_attempts` failures, or where the file cannot be kept; ChecksumError for a file
    that differs from the first one.
    """
    key = hashlib.md5(url.encode("utf-8")).hexdigest()
    record = folder / f"{key}.json"
    path = _find(folder, key)
    if path is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _turn(folder / f"{key}.lock", url, verbose) as alone:
                path = _find(folder, key)
                if path is None:
                    part = _Part(folder / (f"{key}.part" if alone else f"{key}-{uuid.uuid4().hex}.part"))
                    with part.kept_if_useful(alone):
                        _download(url, part, folder, num_attempts, verbose)
                        _compare(url, part.path, record, fresh=True)
                        path = folder / f"{key}_{part.note['name']}"
                        os.replace(part.path, path)
        except DownloadError:
            raise
        except OSError as err:
            raise DownloadError(
                f"Cannot keep {url} in {folder} ({err.strerror or err}): the environment variable"
                " DNNLIB_CACHE_DIR names another place"
            ) from err
    _compare(url, path, record)
    return path


def fetch_bytes(url: str, num_attempts: int = 10, verbose: bool = True) -> bytes:
    """What a URL's file holds; nothing is kept. DownloadError after `num_attempts` failures."""
    with tempfile.TemporaryDirectory() as folder:
        part = _Part(Path(folder) / "file.part")
        _download(url, part, None, num_attempts, verbose)
        return part.path.read_bytes()


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find(folder: Path, key: str) -> Path | None:
    """The one file of this key; two of them are as good as none."""
    hits = list(folder.glob(f"{key}_*"))
    return hits[0] if len(hits) == 1 else None


def _compare(url: str, path: Path, record: Path, fresh: bool = False) -> None:
    """Writes the file's sha256 down, or compares it with what is written; unchanged files are not read
    again. `fresh`: it has just come, and is deleted where it is not the one."""
    stat = path.stat()
    seen = dict(size=stat.st_size, mtime_ns=stat.st_mtime_ns)
    known = _read_json(record)
    if known.items() >= seen.items():
        return
    digest = sha256_of(path)
    if known.get("sha256", digest) != digest:
        what, remedy = f"{path} is", "the file to fetch it again, or the record"
        if fresh:
            path.unlink()
            what, remedy = "What comes now is", "that record"
        raise ChecksumError(
            f"{what} not what {url} first was: its sha256 is {digest[:16]}..., {record} says"
            f" {known['sha256'][:16]}...; delete {remedy} to accept it"
        )
    with contextlib.suppress(OSError):  # a cache that many read and nobody may write
        _write_json(record, dict(url=url, sha256=digest, **seen))


def _read_json(path: Path) -> dict:
    """What a record or note holds; {} where there is none, or where it is broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, values: dict) -> None:
    with open_atomic(path) as file:
        file.write(json.dumps(values, indent=2).encode())


# ----------------------------------------------------------------------------------------
# One process at a time


@contextlib.contextmanager
def _turn(path: Path, url: str, verbose: bool) -> Iterator[bool]:
    """Waits until no other process downloads; True inside, or at once False where files cannot be locked.

    The system lets go of the lock when its process ends in whatever way: no lock outlives its owner.
    """
    waiting = False
    while True:
        with open(path, "wb") as file:
            try:
                locked = _try_lock(file)
            except OSError:
                locked = None
            if locked is None or (locked and _is_at(file, path)):
                try:
                    yield bool(locked)
                finally:
                    with contextlib.suppress(OSError):  # Windows does not delete open files
                        path.unlink()
                return
        if verbose and not locked and not waiting:
            print(f"Waiting for another process to download {url} ...", flush=True)
        waiting = True
        time.sleep(0.2)


def _try_lock(file: Any) -> bool:
    """Whether the lock was free; OSError where the file system knows no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_at(file: Any, path: Path) -> bool:
    """Whether the open file still has this name: its last owner deletes it after use."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------
# What has come so far


class _Part:
    """A file that grows over several attempts, and a note beside it of what it is a part of.

    note: name of the whole file, total size in bytes (None: the server does not say), validator (what tells
    one version of the file from another; None: the server cannot go on in the middle).
    """

    def __init__(self, path: Path):
        self.path, self.note_path = path, path.with_name(f"{path.name}.json")
        self.note = _read_json(self.note_path) if path.is_file() else {}

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def can_continue(self) -> bool:
        return bool(self.note.get("validator")) and self.size > 0

    @property
    def is_whole(self) -> bool:
        return self.can_continue and self.size == self.note.get("total")

    def headers(self) -> dict:
        """What asks for the rest, of the same version only; {} asks for everything."""
        if not self.can_continue:
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": self.note["validator"]}

    def is_continued_by(self, response: Any) -> bool:
        """Whether a response 206 is the rest of this file. Some servers ignore If-Range: look again."""
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not self.can_continue or place is None or int(place[1]) != self.size:
            return False
        same_total = place[2] in ("*", str(self.note.get("total")))
        return same_total and _validator(response) in (None, self.note["validator"])

    def begin(self, response: Any, name: str) -> None:
        """Starts over with the file of this response."""
        self.drop()
        plain = response.headers.get("Content-Encoding", "identity") == "identity"
        length = response.headers.get("Content-Length", "") if plain else ""
        total = int(length) if length.isdigit() else None
        self.note = dict(name=name, total=total, validator=_validator(response) if plain else None)
        _write_json(self.note_path, self.note)

    def drop(self) -> None:
        """Deletes all of it."""
        for path in (self.path, self.note_path):
            path.unlink(missing_ok=True)
        self.note = {}

    @contextlib.contextmanager
    def kept_if_useful(self, alone: bool) -> Iterator[None]:
        """On the way out, also after Ctrl-C, deletes what no later attempt can go on from."""
        try:
            yield
        finally:
            if not (alone and self.can_continue):
                self.drop()


def _validator(response: Any) -> str | None:
    """A strong ETag, else the time of the last change, of a file that can be had in parts; else None."""
    headers = response.headers
    etag = headers.get("ETag", "")
    if headers.get("Accept-Ranges") == "none":
        return None
    return etag if etag.startswith('"') else headers.get("Last-Modified")


# ----------------------------------------------------------------------------------------
# Asking a server


def _download(url: str, part: _Part, folder: Path | None, num_attempts: int, verbose: bool) -> None:
    """Fills `part` with the whole file, in up to `num_attempts` requests; DownloadError if it stays
    incomplete."""
    if part.is_whole:
        return
    import requests  # only here: most runs never download

    report = _Report(url, verbose)
    address, reason, cause, pause = url, "it only leads to confirmation pages", None, 0.0
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"  # parts and lengths are those of the file itself
        for attempt in range(num_attempts):
            report.attempt(attempt, part.size if part.can_continue else 0)
            time.sleep(pause)
            pause = 0.0  # none after a failure to connect: offline is offline
            try:
                with session.get(address, headers=part.headers(), stream=True, timeout=_TIMEOUT) as response:
                    pause = min(_PAUSE * 2**attempt, 8.0)
                    link = _receive(response, url, part, report)
                if link is None:
                    report.end(" done")
                    return
                address = link
            except (requests.RequestException, _Refused) as error:
                reason, cause = _explain(error), error
                if not _may_pass(error):
                    break
    report.end(" failed")
    where = f"; it would be kept in {folder}, or where DNNLIB_CACHE_DIR says" if folder is not None else ""
    raise DownloadError(
        f"Cannot download {url} ({reason}): a local path to the file works in its place{where}", reason
    ) from cause


def _receive(response: Any, url: str, part: _Part, report: "_Report") -> str | None:
    """Takes one answer into `part`. Returns None when the file is whole, or another address to ask."""
    if response.status_code in (206, 416) and not part.is_continued_by(response):
        part.drop()
        raise _Refused("the file has changed on the server", passing=True)
    response.raise_for_status()
    chunks = response.iter_content(_CHUNK)
    if response.status_code != 206:
        head = b""
        while len(head) < _PAGE_LIMIT and (chunk := next(chunks, None)) is not None:
            head += chunk
        link = _confirmation_link(response, head)
        if link is not None:
            return link
        _reject_empty_and_pages(response, head)
        part.begin(response, _file_name(response, url))
        chunks = itertools.chain([head], chunks)
    total = part.note["total"]
    with open(part.path, "ab") as file:
        for chunk in chunks:
            file.write(chunk)
            report.progress(file.tell(), total)
    if total is not None and part.size != total:
        size = part.size
        if size > total:
            part.drop()
        raise _Refused(f"the connection ended after {size} of {total} bytes", passing=True)
    return None


def _confirmation_link(response: Any, head: bytes) -> str | None:
    """The 'download anyway' link of a Google Drive warning page, else None."""
    if "download_warning" not in response.headers.get("Set-Cookie", "") or len(head) >= _PAGE_LIMIT:
        return None
    links = re.findall(r'href="([^"]*export=download[^"]*)"', head.decode("utf-8", errors="replace"))
    return urljoin(response.url, html.unescape(links[0])) if len(links) == 1 else None


def _reject_empty_and_pages(response: Any, head: bytes) -> None:
    """_Refused for a body that cannot be the file: nothing, or a web page (of a login, a proxy, Google
    Drive) where the URL does not end like one."""
    if not head:
        raise _Refused("the server sent an empty file", passing=True)
    if b"Google Drive - Quota exceeded" in head:
        raise _Refused(
            "Google Drive's download quota for this file is exceeded, try again later", passing=False
        )
    is_page = re.match(rb"\s*(<!doctype html|<html)", head, re.IGNORECASE)
    if is_page and not urlsplit(response.url).path.lower().endswith((".html", ".htm")):
        raise _Refused("the server sent a web page in place of the file", passing=False)


def _file_name(response: Any, url: str) -> str:
    """The name that the server gives the file, else the last part of the URL; only [0-9a-zA-Z-._] remain."""
    match = re.search(r'filename="([^"]*)"', response.headers.get("Content-Disposition", ""))
    name = match.group(1) if match else unquote(urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^0-9a-zA-Z\-._]", "_", name)[-100:] or "file"  # file systems stop at 255 bytes


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: not where the server says that there is no such file for us."""
    if isinstance(error, _Refused):
        return error.passing
    response = getattr(error, "response", None)
    return response is None or response.status_code >= 500 or response.status_code in _PASSING


def _explain(error: Exception) -> str:
    """What went wrong, in a few words."""
    import requests

    if isinstance(error, _Refused):
        return str(error)
    kind, response = type(error).__name__, getattr(error, "response", None)
    if response is not None:
        return f"{kind}: {response.status_code} {response.reason}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"{kind}: the connection broke"
    host = (
        urlsplit(error.request.url).hostname if getattr(error, "request", None) is not None else "the server"
    )
    if isinstance(error, requests.ConnectionError):
        return f"{kind}: no connection to {host}"
    return " ".join(f"{kind}: {error}".split())


# ----------------------------------------------------------------------------------------
# Saying how far it is


class _Report:
    """One line for a download; below it, on a terminal, one that is rewritten. A log gets a few percentages
    of large files."""

    def __init__(self, url: str, verbose: bool):
        self.url, self.verbose = url, verbose
        self.terminal = sys.stdout.isatty()
        self.percent, self.drawn = 0, False
        self.start_size = self.start_time = self.shown_time = 0.0

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text, end="", flush=True)

    def attempt(self, number: int, size: int) -> None:
        """Before each request; `size`: bytes that are there already."""
        self._say("." if number else f"Downloading {self.url} ...")
        self._say(f" from {size / 1e6:.1f} MB on" if size and not number else "")
        self.start_size, self.start_time = size, time.monotonic()

    def progress(self, size: int, total: int | None) -> None:
        """During a request: bytes that are there, and that there will be, if known."""
        now = time.monotonic()
        if self.terminal and now - self.shown_time >= 0.2:
            line = self._line(size, total, max(now - self.start_time, 1e-9))
            self._say("\r" * self.drawn + "\n" * (not self.drawn) + f"{line:<60s}")
            self.shown_time, self.drawn = now, True
        if not self.terminal and (total or 0) >= _LARGE:
            quarter = size * 4 // total * 25
            if self.percent < quarter < 100:
                self._say(f" {quarter}%")
                self.percent = quarter

    def _line(self, size: int, total: int | None, seconds: float) -> str:
        rate = (size - self.start_size) / seconds
        if total is None:
            return f"      {size / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        left = f", eta {format_time((total - size) / rate)}" if rate > 0 else ""
        share = f"{100 * size // total:4d}%"
        return f"{share} {size / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s{left}"

    def end(self, word: str) -> None:
        """After the last request."""
        self._say(("\r" + f"{word:<60s}" if self.drawn else word) + "\n")
