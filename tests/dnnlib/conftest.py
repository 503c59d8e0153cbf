# SPDX-License-Identifier: Apache-2.0
"""A web server on this machine that answers as it is told."""

import http.server
import re
import threading

import pytest

from dnnlib import download


class Server:
    """Gives the answers of `script`, path -> list of answers, one by one, the last one again and again.

    An answer is (status, headers, body), or a function from the request's headers to that.
    """

    def __init__(self):
        self.script: dict = {}
        self.requests: list = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                answers = outer.script[self.path]
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                status, headers, body = answer(self.headers) if callable(answer) else answer
                self.send_response(status)
                for name, value in {"Content-Length": len(body), "Connection": "close", **headers}.items():
                    if value is not None:
                        self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01))
        self.thread.start()

    def close(self):
        """Stops it."""
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class RangeFile:
    """A file that can be had in parts, as RFC 9110 says. `asked`: the Range of every request.

    cut: send no more than so many bytes of it, then drop the connection. blind: ignore If-Range.
    """

    def __init__(self, body, cut=None, blind=False, **headers):
        self.body, self.cut, self.blind = body, cut, blind
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.asked = []

    def __call__(self, request):
        self.asked.append(request["Range"])
        same = self.blind or request["If-Range"] in (None, *self.headers.values())
        match = re.fullmatch(r"bytes=(\d+)-", request["Range"] or "")
        start, status, headers = 0, 200, dict(self.headers, Accept_Ranges="bytes")
        if match and same:
            start, status = int(match[1]), 206
            if start >= len(self.body):
                return 416, {"Content-Range": f"bytes */{len(self.body)}"}, b""
            headers["Content-Range"] = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        headers["Content-Length"] = str(len(self.body) - start)
        return status, headers, self.body[start : None if self.cut is None else start + self.cut]


@pytest.fixture
def server(monkeypatch):
    """A running Server; no pauses between attempts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_PAUSE", 0)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def range_file():
    """The class of a file that can be had in parts."""
    return RangeFile
