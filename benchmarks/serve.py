"""What a server costs and gains: one client beside `edgemoe bench`, four clients beside one, and a long soak.

    python benchmarks/serve.py cost MODEL.moe [-n 128]
    python benchmarks/serve.py clients MODEL.moe [--shares 1 0.5 0.25] [-n 64]
    python benchmarks/serve.py soak MODEL.moe --ram 2GiB [--seconds 600] [--requests 1000] [--limit]

`cost`: the same model and length, the tokens per second of one reply after another. `clients`: tokens per second and
bytes read per token of all together, with so much of the experts in memory. `soak`: eight clients at a time, of whom
four in ten leave at random; every reply that ends must be the one of that seed alone, and nothing may be left over.
With --limit the server runs in a control group of exactly --ram, without swap: that needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import limits
import psutil

TOPICS = ("the sea", "a bridge", "tea", "clocks", "the moon", "rain", "bread", "maps")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def body(seed: int, tokens: int) -> dict[str, Any]:
    content = f"Write about {TOPICS[seed % len(TOPICS)]}, part {seed}, in many words."
    return {
        "messages": [{"role": "user", "content": content}], "seed": seed, "max_tokens": tokens,
        "ignore_eos": True, "temperature": 1,
    }  # fmt: skip


def serving(model: Path, *flags: str) -> list[str]:
    """Returns the command of a server."""
    return [
        sys.executable, "-c", "from edgemoe.cli.entry import edgemoe as e; raise SystemExit(e())", "serve", str(model),
        "--metrics", "-c", "1024", *flags,
    ]  # fmt: skip


class Server:
    """Is a server in a process of its own. Also a context manager."""

    def __init__(self, command: Sequence[str], limit: int = 0) -> None:
        self.port = free_port()
        known = {child.pid for child in psutil.Process().children()}
        self.outcome: limits.Outcome | None = None
        command = [*command, "--port", str(self.port)]
        self._thread = threading.Thread(target=self._run, args=(command, limit))
        self._thread.start()
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                break
            if time.monotonic() > end or not self._thread.is_alive():
                raise SystemExit(self.outcome.err if self.outcome else "the server does not answer")
            time.sleep(0.05)
        self.pid = next(c.pid for c in psutil.Process().children() if c.pid not in known)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.outcome is None:
            self.close()

    def _run(self, command: Sequence[str], limit: int) -> None:
        self.outcome = limits.run(command, limit=limit, timeout=100_000)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=600) as done:
            return str(done.read().decode())

    def ask(self, ask: dict[str, Any], patience: float = 600) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(ask).encode()
        )
        with urllib.request.urlopen(request, timeout=patience) as done:
            found: dict[str, Any] = json.load(done)
        return found

    def metric(self, name: str) -> float:
        line = next(x for x in self.get("/metrics").splitlines() if x.startswith(f"{name} "))
        return float(line.split()[1])

    def close(self) -> limits.Outcome:
        os.kill(self.pid, signal.SIGTERM)
        self._thread.join()
        assert self.outcome is not None
        return self.outcome


def cost(args: argparse.Namespace) -> None:
    """One client beside the engine alone, in turns."""
    alone, served = [], []
    for _ in range(args.pairs):
        done = subprocess.run(
            [sys.executable, "-c", "from edgemoe.cli.entry import edgemoe as e; raise SystemExit(e())", "bench",
             str(args.model), "-p", "0", "-n", str(args.n), "-r", "3", "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        alone.append(_rate(json.loads(done.stdout)))
        with Server(serving(args.model, "-np", "1")) as server:
            server.ask(body(0, 8))
            rates = [
                server.ask(body(i, args.n))["timings"]["predicted_per_second"] for i in range(3)
            ]
        served.append(statistics.median(rates))
    a, s = statistics.median(alone), statistics.median(served)
    print(f"alone {a:.2f} tok/s, served {s:.2f} tok/s: {100 * (a / s - 1):+.1f}% a token")


def _rate(found: dict[str, Any]) -> float:
    """Returns the tokens per second of a bench's one test."""
    (test,) = found["results"]
    return statistics.median(test["rates"])


def clients(args: argparse.Namespace) -> None:
    """Four clients beside one."""
    print("| experts in memory | clients | tokens/s | bytes read per token |")
    print("|---|---|---|---|")
    import edgemoe

    with edgemoe.load(args.model, context=256) as engine:
        experts = engine.budget.experts
    for share in args.shares:
        for count in (1, 4):
            command = [
                sys.executable,
                __file__,
                "run",
                str(args.model),
                "--slots",
                str(int(share * experts)),
            ]
            with Server(command) as server:
                server.ask(body(99, 16))
                read, start = server.metric("edgemoe_read_bytes_total"), time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    list(pool.map(lambda i: server.ask(body(i, args.n)), range(count)))
                seconds = time.perf_counter() - start
                read = server.metric("edgemoe_read_bytes_total") - read
            made = count * args.n
            print(
                f"| {share:.0%} | {count} | {made / seconds:.2f} | {read / made / 2**20:.2f} MiB |",
                flush=True,
            )


def run(args: argparse.Namespace) -> None:
    """What `clients` measures: a server whose experts have so many bytes, whatever else takes room."""
    from edgemoe.runtime.opening import open_model
    from edgemoe.runtime.options import EngineOptions
    from edgemoe.serve.server import listen, serve
    from edgemoe.serve.settings import Settings

    settings = Settings(port=args.port, has_metrics=True, has_grammar=False)
    options = EngineOptions(sequences=4, context=1024, slots=args.slots)
    opened = open_model(args.model, options)
    with listen(settings) as door:
        serve(
            opened,
            settings,
            door,
            name="model",
            sampling=opened.text.sampling,
            ready=lambda *_: None,
        )


def soak(args: argparse.Namespace) -> None:
    """Eight clients at a time, some of whom leave."""
    from edgemoe.runtime.budget import parse_size

    ram = parse_size(args.ram)
    if args.limit and (why := limits.missing()):
        raise SystemExit(why)
    rng, kinds = random.Random(0), 16
    asks = [body(i, 8 + 3 * i) for i in range(kinds)]
    command = serving(args.model, "-np", "4", "--ram", str(ram))
    with Server(command, limit=ram if args.limit else 0) as server:
        texts = [server.ask(ask)["choices"][0]["message"]["content"] for ask in asks]
        before = psutil.Process(server.pid)
        threads, memory = before.num_threads(), before.memory_info().rss
        end, counts = time.monotonic() + args.seconds, {"right": 0, "left": 0}
        lock = threading.Lock()

        def one(i: int) -> None:
            if time.monotonic() > end:
                return
            with lock:
                kind = rng.randrange(kinds)
                patience = rng.random() * 2 if rng.random() < 0.4 else 600.0
            try:
                text = server.ask(asks[kind], patience)["choices"][0]["message"]["content"]
            except (TimeoutError, urllib.error.URLError):
                with lock:
                    counts["left"] += 1
                return
            if text != texts[kind]:
                raise SystemExit(
                    f"another reply to {asks[kind]}: {text!r}, expected {texts[kind]!r}"
                )
            with lock:
                counts["right"] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(args.requests)))
        while any(slot["is_processing"] for slot in json.loads(server.get("/slots"))):
            time.sleep(0.1)
        after = psutil.Process(server.pid)
        grown = after.memory_info().rss - memory
        print(f"{counts['right']} replies, all right; {counts['left']} left")
        print(f"threads {threads} to {after.num_threads()}, memory {grown / 2**20:+.1f} MiB")
        outcome = server.close()
    print(
        f"exit {outcome.code}; peak {outcome.group_peak / 2**20 if args.limit else outcome.peak / 2**20:.0f} of "
        f"{ram / 2**20:.0f} MiB, swapped {outcome.swapped}, refusals {outcome.refusals}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for function in (cost, clients, soak, run):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument("model", type=Path)
        command.add_argument("-n", type=int, default=64, metavar="N", help="tokens of a reply")
        if function is cost:
            command.add_argument("--pairs", type=int, default=3, metavar="N")
        elif function is clients:
            command.add_argument(
                "--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25], metavar="X"
            )
        elif function is run:
            command.add_argument("--port", type=int, required=True, metavar="N")
            command.add_argument("--slots", type=int, required=True, metavar="BYTES")
        else:
            command.add_argument("--ram", required=True, metavar="SIZE")
            command.add_argument("--seconds", type=float, default=600, metavar="N")
            command.add_argument("--requests", type=int, default=1000, metavar="N")
            command.add_argument("--limit", action="store_true")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
