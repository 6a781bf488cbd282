"""Measures what a viewer of the page costs: tokens per second with one viewer and without, in turns.

    python benchmarks/page.py MODEL.moe [--ram 300MiB] [-n 128] [-r 10] [--browser]

The viewer reads the stream of figures as the page does. With --browser it is the page itself, in Chromium on the same
cores, so that the cost of drawing is included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browsers import browser, seen
from served import started

READER = """
import sys, urllib.request
for i, _ in enumerate(urllib.request.urlopen(sys.argv[1])):
    if i == 1:
        print("there", flush=True)
"""


def rate(url: str, tokens: int) -> float:
    """Returns the tokens per second of one reply."""
    body = {
        "messages": [{"role": "user", "content": "Write about the sea, in many words."}], "seed": 1,
        "max_tokens": tokens, "ignore_eos": True, "temperature": 1,
    }  # fmt: skip
    done = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    return float(done.json()["timings"]["predicted_per_second"])


def cpu_s(pid: int) -> float:
    """Returns the processor time of the thread that answers, in seconds; the engine has another thread."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextlib.contextmanager
def viewer(url: str, chrome: object) -> Iterator[None]:
    """A context in which somebody looks: a reader of the stream, or the page in a browser."""
    if chrome is None:
        process = subprocess.Popen(
            [sys.executable, "-c", READER, f"{url}/events"], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it is there
            yield
        finally:
            process.kill()
            process.wait()
        return
    with seen(chrome, url) as page:
        page.wait_for_function("() => document.querySelector('#model').textContent !== ''")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram", default="300MiB")
    parser.add_argument("-n", type=int, default=128)
    parser.add_argument("-r", type=int, default=10)
    parser.add_argument("--browser", action="store_true")
    args = parser.parse_args()
    process, port = started(
        str(args.model), "--port", "0", "--ram", args.ram, "-np", "2", "-c", "1024",
        "-t", str(os.cpu_count()),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(process.terminate)
        chrome = stack.enter_context(browser()) if args.browser else None
        rate(url, args.n)  # warms
        alone, watched = [], []
        loop: dict[bool, list[float]] = {True: [], False: []}
        for i in range(args.r):
            for with_viewer in (i % 2 == 0, i % 2 == 1):
                with viewer(url, chrome) if with_viewer else contextlib.nullcontext():
                    start, before = time.perf_counter(), cpu_s(process.pid)
                    (watched if with_viewer else alone).append(rate(url, args.n))
                    spent = cpu_s(process.pid) - before
                    loop[with_viewer].append(spent / (time.perf_counter() - start))
    cpu = {who: 1000 * statistics.median(times) for who, times in loop.items()}
    print(f"the thread that answers: {cpu[False]:.1f} ms a second alone, {cpu[True]:.1f} watched")
    ratios = [w / a for w, a in zip(watched, alone, strict=True)]
    print(
        f"alone {statistics.median(alone):.2f} tokens/s, watched {statistics.median(watched):.2f}"
    )
    print(
        f"watched / alone: median {statistics.median(ratios):.4f}, {min(ratios):.4f} to {max(ratios):.4f}"
    )


if __name__ == "__main__":
    main()
