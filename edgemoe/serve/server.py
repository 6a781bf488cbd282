"""The life of a server: it opens its port, runs until it is told to stop, and stops gracefully."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from edgemoe.runtime.opening import Opened
from edgemoe.serve.app import make_app
from edgemoe.serve.connections import connections
from edgemoe.serve.service import Service
from edgemoe.serve.settings import Settings, is_loopback
from edgemoe.text.sampler import SamplingParams

__all__ = ["listen", "serve"]

logger = logging.getLogger(__name__)

_FAILED = 1
_PER_ADDRESS = 64  # connections, where other machines may connect
_TOGETHER = 256  # or twice as many as requests may run and wait


def listen(settings: Settings) -> socket.socket:
    """Binds the port. This comes before loading a model, which would be in vain if the port is taken.

    Raises:
        OSError: the port is taken or not permitted; names another one that is free, if there is one.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except OSError as error:
        found.close()
        free = _free(settings, family)
        hint = f"; --port {free} is free" if free else ""
        raise OSError(
            error.errno, f"port {settings.port} of {settings.host}: {error.strerror}{hint}"
        ) from None
    found.set_inheritable(False)
    return found


def _free(settings: Settings, family: int) -> int:
    """Returns the next free port, 0 if none of the next ones is free."""
    for port in range(settings.port + 1, min(settings.port + 20, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as tried, contextlib.suppress(OSError):
            tried.bind((settings.host, port))
            return port
    return 0


class _Server(uvicorn.Server):
    """A uvicorn server that passes signals to the service, and does not raise them again when it has closed."""

    service: Service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.is_stopping = True
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def serve(
    opened: Opened,
    settings: Settings,
    door: socket.socket,
    *,
    name: str,
    sampling: SamplingParams,
    ready: Callable[[Service, int, Callable[[], None]], None],
) -> int:
    """Serves until SIGTERM or Ctrl-C; a second signal does not wait for replies to end.

    Args:
        opened: the model; closed at the end.
        settings: how the server is run.
        door: the socket that `listen` returned.
        name: the model's name.
        sampling: how replies are sampled by default.
        ready: is called when requests are taken, with the service, the port, and a function that stops the server as
            a signal does.

    Returns:
        The exit code: 0, or 1 if the model's thread has died.

    Raises:
        FormatError: the model has no tokenizer, or its chat template is broken.
        OSError: the profile or the trace cannot be written at the end.
    """
    servers: list[_Server] = []

    def lost(error: BaseException) -> None:
        for server in servers:
            server.should_exit = server.force_exit = True

    together = max(_TOGETHER, 2 * (opened.model.options.sequences + settings.queue))
    service = Service(opened, settings, name=name, sampling=sampling, on_death=lost)
    try:
        config = uvicorn.Config(
            make_app(service), log_config=None, access_log=False, lifespan="off", server_header=False,
            timeout_keep_alive=75, h11_max_incomplete_event_size=16 << 10, loop="asyncio",
            timeout_graceful_shutdown=int(settings.grace) + 2, ws="none",
            http=connections(0 if is_loopback(settings.host) else _PER_ADDRESS, together),
        )  # fmt: skip
        server = _Server(config)
        server.service = service
        servers.append(server)
        stop = functools.partial(server.handle_exit, signal.SIGTERM, None)
        door.listen(config.backlog)  # connections are accepted from now on
        ready(service, door.getsockname()[1], stop)
        server.run(sockets=[door])
    finally:
        for request in service.batcher.running():
            request.is_cancelled = True
        service.close()
    return _FAILED if service.worker.error is not None else 0
