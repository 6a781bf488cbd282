"""The server while the model is loading: every request gets 503, with the time after which to try again."""

from __future__ import annotations

import contextlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import msgspec

from edgemoe.serve.problems import Problem
from edgemoe.serve.settings import Settings

__all__ = ["Loading"]

_AGAIN = 2  # seconds
_MOST_READ = 1 << 20  # bytes of a body, so that a client has sent it before it is answered


class Loading:
    """A small server that answers 503 until it is closed. Also a context manager."""

    def __init__(self, door: socket.socket, settings: Settings) -> None:
        """Starts to answer, on a thread of its own.

        Args:
            door: the socket that `listen` returned; it stays open at the end.
            settings: the server's; they say which host names are served.
        """
        handler: type[_Handler] = type("Handler", (_Handler,), {"settings": settings})
        self._handler = handler
        address = door.getsockname()[:2]
        self._server = ThreadingHTTPServer(address, handler, bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.socket.close()  # the server's own socket, which was not bound
        self._server.socket = door
        door.listen()
        self._thread: threading.Thread | None = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="edgemoe-loading", daemon=True
        )
        self._thread.start()

    def tell(self, share: float) -> None:
        """Sets the share of the weights that has been read, 0 to 1, which /health reports."""
        self._handler.share = share

    def close(self) -> None:
        """Stops answering. New connections wait in the socket's queue until the real server takes it over."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Loading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5
    settings: Settings
    share: float | None = None  # None while the model is fetched or converted

    def _answer(self) -> None:
        if not self.settings.takes_host(self.headers.get("Host", "")):
            self._say(Problem(403, "Host: this server is not for that name"))
        elif self.path in ("/health", "/v1/health"):
            self._say(Problem(503, ""), self._health())
        else:
            self._say(Problem(503, "the model is loading"))

    do_GET = do_HEAD = do_POST = do_OPTIONS = _answer  # noqa: N815 (names of the library)

    def _health(self) -> dict[str, Any]:
        """Returns what llama.cpp's server says, in its present and its earlier words, and the progress of reading."""
        error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
        told = {} if self.share is None else {"progress": round(self.share, 3)}
        return {"status": "loading model", **told, "error": error}

    def _say(self, problem: Problem, body: dict[str, Any] | None = None) -> None:
        if body is None:
            body = problem.body(is_messages=self.path.startswith("/v1/messages"))
        text = msgspec.json.encode(body)
        length = self.headers.get("Content-Length", "0")
        with contextlib.suppress(OSError):
            if length.isdecimal():
                self.rfile.read(min(int(length), _MOST_READ))
            self.send_response_only(problem.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Retry-After", str(_AGAIN))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""
