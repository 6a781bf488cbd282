"""Compares four clients with one, for `edgemoe serve` and llama-server on the same shapes, in memory and under caps.

    python benchmarks/servers.py --llama-server PATH --pair MODEL.gguf MODEL.moe BITS [--caps 1 0.5 0.25] \\
        [--sides edgemoe llama.cpp] [-n 32] [--repetitions 3] [--read-ahead 128]

Each server is started once per cap, and asked by one client and by four in turns; figures are medians. A cap is a share
of the GGUF file's size: it is the limit of the control group in which the server runs, with an empty page cache at
first; 1 is no cap. llama.cpp maps the file, as in `llama_cpp.py`. Prompts are a few tokens, different each time;
replies have the same length. Caps need root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import limits
import numpy as np
from llama_cpp import _read_ahead
from serve import Server

COUNTS = (1, 4)


def edgemoe(args: argparse.Namespace, limit: int) -> list[str]:
    """Returns the command of our server."""
    _, moe, bits = args.pair
    return [
        sys.executable, "-c", "from edgemoe.cli.entry import edgemoe as e; raise SystemExit(e())", "serve", moe,
        "--bits", bits, "--dense-bits", bits, "--metrics", "--no-grammar", "--no-page", "-c", str(args.context),
        "-np", "4", "-t", str(args.threads), *(["--ram", str(limit)] if limit else []),
    ]  # fmt: skip


def llama(args: argparse.Namespace, limit: int) -> list[str]:
    """Returns the command of llama.cpp's server, whose clients share one context."""
    gguf, _, _ = args.pair
    return [
        args.llama_server, "-m", gguf, "-t", str(args.threads), "-c", str(4 * args.context), "-np", "4",
        "--no-webui", "--cache-ram", "0", *(["--no-repack"] if limit else []),
    ]  # fmt: skip


def ask(server: Server, ids: list[int], tokens: int) -> None:
    """Asks for a reply of `tokens` tokens to the prompt `ids`."""
    body = {
        "prompt": ids, "max_tokens": tokens, "n_predict": tokens, "temperature": 1, "seed": ids[0], "ignore_eos": True,
        "cache_prompt": False,
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=3600) as done:
        made = json.load(done)["usage"]["completion_tokens"]
    assert made == tokens, made


def counters(server: Server, side: str) -> tuple[float, float]:
    """Returns the bytes read and the experts computed so far; 0 for llama.cpp, which does not tell them."""
    if side != "edgemoe":
        return 0.0, 0.0
    uses = (server.metric(f"edgemoe_expert_{kind}_total") for kind in ("hits", "misses"))
    return server.metric("edgemoe_read_bytes_total"), sum(uses)


def measure(args: argparse.Namespace, side: str, cap: float) -> dict[int, tuple[float, ...]]:
    """Returns tokens per second, bytes read and experts computed per token, by the number of clients."""
    gguf = args.pair[0]
    limit = int(cap * Path(gguf).stat().st_size) if cap < 1 else 0
    command = (edgemoe if side == "edgemoe" else llama)(args, limit)
    rng = np.random.default_rng(1)
    found: dict[int, list[tuple[float, ...]]] = {count: [] for count in COUNTS}
    with _read_ahead(gguf, None if side == "edgemoe" else args.read_ahead):
        if limit:
            limits.drop_caches()
        with Server(command, limit=limit) as server, ThreadPoolExecutor(max(COUNTS)) as pool:

            def all_of(count: int, tokens: int) -> None:
                prompts = rng.integers(1000, 50000, (count, 8)).tolist()
                list(pool.map(lambda ids: ask(server, ids, tokens), prompts))

            all_of(4, args.n)  # warms
            for _ in range(args.repetitions):
                for count in COUNTS:
                    before, start = counters(server, side), time.perf_counter()
                    all_of(count, args.n)
                    seconds, made = time.perf_counter() - start, count * args.n
                    change = zip(before, counters(server, side), strict=True)
                    found[count].append((made / seconds, *((b - a) / made for a, b in change)))
    return {c: tuple(map(statistics.median, zip(*rows, strict=True))) for c, rows in found.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--pair", nargs=3, required=True, metavar=("GGUF", "MOE", "BITS"))
    parser.add_argument("--caps", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--sides", nargs="+", default=["edgemoe", "llama.cpp"])
    parser.add_argument("-n", type=int, default=32, metavar="N", help="tokens of a reply")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--read-ahead", type=int, default=128, metavar="KIB")
    args = parser.parse_args()
    print(
        "| cap | server | 1 client, t/s | 4 clients, t/s | ratio | read per token, 1 and 4 | "
        "experts per token, 4 : 1 |\n|---|---|---|---|---|---|---|"
    )
    for cap in args.caps:
        for side in args.sides:
            found = measure(args, side, cap)
            (one, read, uses), (four, read4, uses4) = found[1], found[4]
            own = (
                f"{read / 1e6:.0f}, {read4 / 1e6:.0f} MB | {uses4 / uses:.2f}" if uses else "– | –"
            )
            print(
                f"| {cap:.0%} | {side} | {one:.2f} | {four:.2f} | {four / one:.2f}× | {own} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
