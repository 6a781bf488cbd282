"""A hub on a loopback port: serves folders as Hugging Face's hub does, with range requests, and fails on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LFS = (".safetensors", ".gguf")


class Hub:
    """A hub that serves the folders `root`/user/repo. Attributes that a test changes act on the next request."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answer: Callable[[str], tuple[int, dict[str, str]] | None] = lambda path: None
        """For a path, returns a status and headers to refuse the request with, or None to serve it."""
        self.cut: dict[str, int] = {}
        """By file name, the bytes after which the connection is closed, each time."""
        self.without_size: Callable[[str], bool] = lambda name: False
        """Whether the list of files lacks the size of a file."""
        self.swap: dict[str, bytes] = {}
        """By file name, bytes to send in place of the file's first ones."""
        self.rate: float | None = None
        """Bytes per second; None for no limit."""
        self.token = ""
        """The token that requests must send; "" accepts any."""
        self.requests: list[tuple[str, str, str]] = []
        """The method, path and range of every request."""
        self.sent: dict[str, int] = {}
        """By file, the bytes sent."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a killed client is no error
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, repo: str) -> str:
        """Returns the commit of a repository: a hash of its files' names, sizes and times."""
        files = sorted(p for p in (self.root / repo).rglob("*") if p.is_file())
        text = " ".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
        return hashlib.sha1(text.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """The handler of one connection to `server.hub`."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(is_head=True)

    def do_GET(self) -> None:
        self.respond(is_head=False)

    def respond(self, *, is_head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        refused = self.hub.answer(path)
        if refused is not None:
            return self.finish_with(*refused)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.finish_with(401, {"X-Error-Code": "GatedRepo"})
        if found := _API.fullmatch(path):
            return self.info(found[1], found[2])
        if found := _RESOLVE.fullmatch(path):
            return self.file(found[1], found[2], found[3], is_head)
        return self.finish_with(404, {})

    def finish_with(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def info(self, repo: str, revision: str | None) -> None:
        folder = self.hub.root / repo
        if not folder.is_dir():
            return self.finish_with(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", self.hub.commit(repo)):
            return self.finish_with(404, {"X-Error-Code": "RevisionNotFound"})
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        body = {
            "id": repo,
            "modelId": repo,
            "sha": self.hub.commit(repo),
            "siblings": [_sibling(folder, p) for p in files],
        }
        for one in body["siblings"]:
            if self.hub.without_size(one["rfilename"]):
                del one["size"]
        return self.finish_with(
            200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        )

    def file(self, repo: str, revision: str, name: str, is_head: bool) -> None:
        path = self.hub.root / repo / name
        if revision != self.hub.commit(repo) or not path.is_file():
            return self.finish_with(404, {"X-Error-Code": "EntryNotFound"})
        size = path.stat().st_size
        start, stop = 0, size
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", "")):
            start, stop = int(asked[1]), min(int(asked[2] or stop) + 1, stop)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("X-Repo-Commit", revision)
        self.end_headers()
        if is_head:
            return None
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(stop - start)
        swapped = self.hub.swap.get(path.name, b"")[start:stop]
        return self.send(path.name, swapped + content[len(swapped) :])

    def send(self, name: str, content: bytes) -> None:
        cut = self.hub.cut.get(name)
        content = content if cut is None else content[:cut]
        step = 1 << 16 if self.hub.rate is None else max(1, int(self.hub.rate / 100))
        for at in range(0, len(content), step):
            try:
                self.wfile.write(content[at : at + step])
            except OSError:  # the client is gone
                self.close_connection = True
                return
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content[at : at + step])
            if self.hub.rate is not None:
                time.sleep(0.01)
        if cut is not None:
            self.close_connection = True


def _sibling(folder: Path, path: Path) -> dict[str, object]:
    content = path.read_bytes()
    values: dict[str, object] = {
        "rfilename": path.relative_to(folder).as_posix(),
        "size": len(content),
        "blobId": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest(),
    }
    if path.suffix in _LFS:
        values["lfs"] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "pointerSize": 135,
        }
    return values


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    try:
        yield hub
    finally:
        hub.close()
