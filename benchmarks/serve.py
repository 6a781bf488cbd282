"""Measures a server: one client against the engine alone, four clients against one, and a long soak test.

    python benchmarks/serve.py cost MODEL.moe [-n 128]
    python benchmarks/serve.py clients MODEL.moe [--shares 1 0.5 0.25] [-n 64]
    python benchmarks/serve.py soak MODEL.moe --ram 2GiB [--seconds 600] [--requests 1000] [--limit]
        [-c 1024] [--repeats 0]

`cost` prints the time per token of the model alone, of the batcher, and of a client's reply, whole and streamed.
`clients` prints tokens per second and bytes read per token over all clients, with a share of the experts in memory.
`soak` runs several clients at a time, and four in ten requests are dropped at a random moment. Every reply that ends
must be the one that its seed gives alone, and the server must keep neither threads nor memory. With --limit the server
runs in a control group of exactly --ram, without swap, which needs root. --repeats makes prompts longer, to fill the
contexts, and every fourth reply is constrained to JSON: so the memory that is reserved for both is really used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
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
        "--metrics", *flags,
    ]  # fmt: skip


class Server:
    """A server in a process of its own. Also a context manager."""

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
    """Compares one client with the engine alone, in turns in one process; greedy, as is `edgemoe bench`."""
    from edgemoe.runtime.opening import open_model
    from edgemoe.runtime.options import EngineOptions
    from edgemoe.serve.server import listen, serve
    from edgemoe.serve.settings import Settings

    opened = open_model(args.model, EngineOptions(sequences=1, context=1024))
    settings = Settings(port=free_port(), has_grammar=False)
    url = f"http://127.0.0.1:{settings.port}/v1/chat/completions"
    ready: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with listen(settings) as door:
        server = threading.Thread(
            target=lambda: serve(
                opened, settings, door, name="model", sampling=opened.text.sampling,
                ready=lambda service, _, stop: ready.put((service, stop)),
            )
        )  # fmt: skip
        server.start()
        service, stop = ready.get()
        ask = {**body(0, args.n), "temperature": 0}
        ids = service.tokenizer.encode_chat(body(0, 1)["messages"])
        state = opened.model.decoder.make_state()
        kinds = {
            "alone": lambda: _alone(opened.model, state, ids, args.n),
            "batched": lambda: _batched(service, ids, args.n),
            "whole": lambda: _asked(url, ask),
            "streamed": lambda: _asked(url, {**ask, "stream": True}),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(args.pairs + 1):
            for kind, run in kinds.items():
                seconds = run()
                if i:  # the first ones warm
                    times[kind].append(seconds)
        stop()
        server.join()
    for kind, seconds in times.items():
        pairs = [100 * (s / a - 1) for a, s in zip(times["alone"], seconds, strict=True)]
        quarters = statistics.quantiles(pairs, n=4)
        print(
            f"{kind}: {1000 * statistics.median(seconds):.3f} ms a token, {statistics.median(pairs):+.1f}% "
            f"({quarters[0]:+.1f} to {quarters[2]:+.1f}), best {1000 * min(seconds):.3f} ms"
        )


def _alone(model: Any, state: Any, ids: list[int], count: int) -> float:
    """Returns the seconds per token of the model alone, greedy, while no client asks."""
    import numpy as np

    from edgemoe.model import Batch

    row = np.empty((1, model.config.vocab_size), np.float32)
    state.rewind(0)
    token = np.array(ids, np.int32)
    for i in range(count + 1):
        if i == 1:
            start = time.perf_counter()
        model.logits(model.forward(Batch.of((state, token)))[-1:], row, state)
        token = np.array([row[0].argmax()], np.int32)
    return (time.perf_counter() - start) / count


def _batched(service: Any, ids: list[int], count: int) -> float:
    """Returns the seconds per token of a request to the batcher that comes from no client."""
    from edgemoe.runtime.requests import Outcome, Request
    from edgemoe.text.sampler import SamplingParams

    ended: queue.Queue[Outcome] = queue.Queue()
    params = SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True)
    service.batcher.submit(Request(ids=ids, params=params, take=lambda *_: True, end=ended.put))
    return ended.get().figures.decode_s / count


_CLIENT = """
import sys, urllib.request
said = b""
with urllib.request.urlopen(urllib.request.Request(sys.argv[1], sys.argv[2].encode())) as done:
    while part := done.read1():
        said += part
print(next(line for line in said.decode().splitlines() if '"timings"' in line).removeprefix("data: "))
"""
"""Only reads: the work of a real client is not the server's cost, though it may run on the same machine."""


def _asked(url: str, ask: dict[str, Any]) -> float:
    """Returns the seconds per token of a client in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, url, json.dumps(ask)], capture_output=True, text=True, check=True
    )  # fmt: skip
    return 1 / float(json.loads(done.stdout)["timings"]["predicted_per_second"])


def clients(args: argparse.Namespace) -> None:
    """Compares four clients with one."""
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
    """Runs the server that `clients` measures: its experts have exactly --slots bytes, whatever else takes memory."""
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
    """Runs several clients at a time, some of which leave, and checks replies, threads and memory."""
    from edgemoe.runtime.budget import parse_size

    ram = parse_size(args.ram)
    if args.limit and (why := limits.missing()):
        raise SystemExit(why)
    rng, kinds = random.Random(0), 16
    asks = [body(i, 8 + 3 * i) for i in range(kinds)]
    for i, ask in enumerate(asks):
        ask["messages"][0]["content"] += f" {TOPICS[i % len(TOPICS)]}." * args.repeats
        if i % 4 == 3:
            ask["response_format"] = {"type": "json_object"}
    command = serving(args.model, "-np", "4", "--ram", str(ram), "-c", str(args.context))
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

        with ThreadPoolExecutor(args.clients) as pool:
            list(pool.map(one, range(args.requests)))
        while any(slot["is_processing"] for slot in json.loads(server.get("/slots"))):
            time.sleep(0.1)
        after = psutil.Process(server.pid)
        grown = after.memory_info().rss - memory
        known = {
            name: server.metric(f"edgemoe_{name}_total")
            for name in ("expert_hits", "expert_misses", "evictions")
        }
        print(f"{counts['right']} replies, all right; {counts['left']} left; {known}")
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
            command.add_argument("--pairs", type=int, default=20, metavar="N")
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
            command.add_argument("--clients", type=int, default=8, metavar="N")
            command.add_argument("--limit", action="store_true")
            command.add_argument("-c", "--context", type=int, default=1024, metavar="N")
            command.add_argument("--repeats", type=int, default=0, metavar="N")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
