"""A Hub on 127.0.0.1, for tests: one repository, its commits, and several ways to misbehave."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

DEFAULT = "vit_small_patch16_224.augreg_in21k_ft_in1k"  # the checkpoint that the tests put on it
COMMIT = "1b" * 20


@dataclass(frozen=True)
class Request:
    """One line of the log."""

    method: str
    revision: str
    file: str
    start: int | None  # of the Range header, where there was one


@dataclass
class HubServer:
    """Answers `/{organization}/{name}/resolve/{revision}/{file}` as the Hub does.

    Used as a context manager. The knobs may be turned while it runs.
    """

    repo: str
    commits: dict[str, dict[str, bytes]]  # hash -> file -> content
    refs: dict[str, str]  # branch or tag -> hash

    instead: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent for it under unchanged headers
    cuts: int = 0  # the next so many downloads of weights break off half-way
    answer: tuple[int, dict[str, str]] | None = None  # a status and headers, for every request
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._running = True
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Connections are refused from here on."""
        if self._running:
            self._running = False
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def downloads(self, file: str) -> list[Request]:
        """Every request for a file's content."""
        return [request for request in self.log if request.method == "GET" and request.file == file]


def git_hash(content: bytes) -> str:
    """What git, and with it the Hub, calls a file that is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, so that each connection ends with its answer, and none outlives the server."""

    server_hub: HubServer

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def log_message(self, *_: Any) -> None:
        """Silence: the log is `HubServer.log`."""

    def _respond(self) -> None:
        hub = self.server_hub
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/?]+)", self.path)
        if match is None:
            return self._refuse(404, {})
        repo, revision, file = (unquote(part) for part in match.groups())
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        hub.log.append(Request(self.command, revision, file, int(start[1]) if start else None))

        commit = hub.refs.get(revision, revision)
        if hub.answer is not None:
            self._refuse(*hub.answer)
        elif repo != hub.repo:  # what the Hub tells strangers, whether it exists or not
            self._refuse(401, {"X-Error-Message": "Invalid username or password."})
        elif commit not in hub.commits:
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        elif file not in hub.commits[commit]:
            self._refuse(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self._send(commit, file, int(start[1]) if start else 0)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, commit: str, file: str, start: int) -> None:
        hub = self.server_hub
        content = hub.commits[commit][file]
        body = hub.instead.get(file, content)
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if file.endswith((".safetensors", ".bin")):  # in LFS: a file of its own behind a pointer that git knows
            self.send_header("ETag", '"pointer"')
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
        else:
            self.send_header("ETag", f'"{git_hash(content)}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[start:]
        if file.endswith(".safetensors") and hub.cuts:
            hub.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
