# SPDX-License-Identifier: Apache-2.0
"""Downloading files into a cache: what dnnlib.util.open_url does when the file is not local."""

import hashlib
import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from dnnlib.util import open_atomic

_TIMEOUT = (15, 120)  # seconds: to connect, and between two packets
_PAGE_LIMIT = 8192  # a body below this may be a web page that Google Drive sends in place of the file


def fetch(url: str, folder: Path | None, num_attempts: int = 10, verbose: bool = True) -> tuple:
    """Downloads a URL; returns (path in the cache or None, bytes or None).

    With a folder, a file fetched before is returned as (path, None), and a new one is stored there. Raises
    IOError, in one line that names the URL, after `num_attempts` failures.
    """
    key = hashlib.md5(url.encode("utf-8")).hexdigest()
    hits = [] if folder is None else list(folder.glob(f"{key}_*"))
    if len(hits) == 1:
        return hits[0], None
    name, data = _download(url, num_attempts, verbose)
    if folder is None:
        return None, data
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}_{name}"
    with open_atomic(path) as file:
        file.write(data)
    return path, data


def _download(url: str, num_attempts: int, verbose: bool) -> tuple:
    """Tries up to `num_attempts` times; returns (sanitised file name, bytes)."""
    import requests  # only here: most runs never download

    say = (lambda text, end="": print(text, end=end, flush=True)) if verbose else (lambda *_: None)
    say(f"Downloading {url} ...")
    address, reason, cause = url, "it only leads to confirmation pages", None
    with requests.Session() as session:
        for attempt in range(num_attempts):
            say("." if attempt else "")
            try:
                response = session.get(address, timeout=_TIMEOUT)
                response.raise_for_status()
                link = _confirmation_link(response)
                if link is None:
                    _reject_empty_and_pages(response)
                    say(" done", "\n")
                    return _file_name(response, url), response.content
                address = link
            except OSError as error:  # requests' exceptions are OSErrors, too
                reason, cause = " ".join(f"{type(error).__name__}: {error}".split()), error
    say(" failed", "\n")
    raise OSError(f"Cannot download {url}: a local path to the file works in its place ({reason})") from cause


def _page_text(response: Any) -> str:
    """The body of a small response as text, '' for a large one. Bytes that are not text do no harm."""
    return response.content.decode("utf-8", errors="replace") if len(response.content) < _PAGE_LIMIT else ""


def _confirmation_link(response: Any) -> str | None:
    """The 'download anyway' link of a Google Drive warning page, else None."""
    if "download_warning" not in response.headers.get("Set-Cookie", ""):
        return None
    links = re.findall(r'href="([^"]*export=download[^"]*)"', _page_text(response))
    return urljoin(response.url, html.unescape(links[0])) if len(links) == 1 else None


def _reject_empty_and_pages(response: Any) -> None:
    """Raises OSError for a body that cannot be the file: nothing, or a page of Google Drive's."""
    if not response.content:
        raise OSError("the server sent an empty file")
    text = _page_text(response)
    if "Google Drive - Quota exceeded" in text:
        raise OSError("Google Drive's download quota for this file is exceeded, try again later")
    host = urlsplit(response.url).hostname or ""
    if host.endswith(".google.com") and text.lstrip()[:9].lower() in ("<!doctype", "<html><he"):
        raise OSError("Google Drive sent a web page, download the file with a browser")


def _file_name(response: Any, url: str) -> str:
    """The name that the server gives the file, else the last part of the URL; only [0-9a-zA-Z-._] remain."""
    match = re.search(r'filename="([^"]*)"', response.headers.get("Content-Disposition", ""))
    name = match.group(1) if match else unquote(urlsplit(url).path.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^0-9a-zA-Z\-._]", "_", name) or "file"
