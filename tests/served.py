"""A real server on a loopback port, and clients of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import httpx2 as httpx
import numpy as np

from edgemoe.file.append import add_sections
from edgemoe.quant import Allocation
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.serve.server import listen, serve
from edgemoe.serve.settings import Settings


class Running:
    """A server on a thread of this process."""

    def __init__(self, path, *, options=None, sampling=None, **settings):
        self.settings = Settings(
            port=0, **{"ping": 0.2, "grace": 1.0, "has_metrics": True, **settings}
        )
        self.opened = open_model(path, EngineOptions(**{"sequences": 4, **(options or {})}))
        self.door = listen(self.settings)
        self.is_ready = threading.Event()
        self.code = None
        self.sampling = sampling or self.opened.text.sampling
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.is_ready.wait(20)

    def _run(self):
        self.code = serve(
            self.opened,
            self.settings,
            self.door,
            name="tiny",
            sampling=self.sampling,
            ready=self._ready,
        )

    def _ready(self, service, port, stop):
        self.service, self.stop = service, stop
        self.url = f"http://127.0.0.1:{port}"
        self.is_ready.set()

    def close(self):
        self.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.door.close()

    def post(self, path, body, **more):
        return httpx.post(self.url + path, json=body, timeout=60, **more)

    def get(self, path, **more):
        return httpx.get(self.url + path, timeout=60, **more)

    def settle(self):
        """Waits until no request is running."""
        end = time.monotonic() + 20
        while self.service.batcher.running() or self.service.batcher.waiting:
            assert time.monotonic() < end
            time.sleep(0.005)


@contextlib.contextmanager
def running(path, **how):
    server = Running(path, **how)
    try:
        yield server
    finally:
        server.close()


def started(*flags, said=None):
    """Starts `edgemoe serve` in a process; returns the process and its port, once it listens.

    The lines before that are added to the list `said`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", "from edgemoe.cli.entry import edgemoe as e; raise SystemExit(e())", "serve", *flags],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "EDGEMOE_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if " at http://" in line:
            return process, int(line.rpartition("/v1")[0].rpartition(":")[2])
        if said is not None:
            said.append(line)
    raise AssertionError(process.wait())


def measured_file(model, path):
    """Copies a model of 2 layers of 8 experts, and adds measured losses of its levels, and an allocation."""
    shutil.copy(model, path)
    bits = np.full((2, 8), 2, np.int8)
    bits[:, ::2] = 4
    rows = [
        _row(8, None), _row(4, 0.01), _row(2, 0.5), _row(4, 0.3, dense_bits=4), _row(4, 0.2, options={"x": 1}),
        _row(6, 0.1, cache_types=["q8_0", "f16"]),
    ]  # fmt: skip
    report = {"measured_on": "text: a novel", "tokens": "0", "reference": [8, 8], "rows": rows}
    allocation = Allocation(method="test", layers=(0, 1), bits=bits).to_json()
    add_sections(path, {"quality": json.dumps(report).encode(), "allocation": allocation})
    return path


def _row(bits, change, **more):
    """Returns what `edgemoe quality --store` stores for one level."""
    return {
        "bits": bits, "dense_bits": 8, "scheduler": "on-demand", "options": {}, "cache_types": ["f16", "f16"],
        "kl": None if change is None else 0.1, "loss_change": change, "loss_error": 0.001, "same_top": 0.9,
        "slots_bytes": 0, "read_per_token": None, "sections": None, "chunks": 30, **more,
    }  # fmt: skip
