"""scripts/fuzz [TARGET [SECONDS [SEED]]]: runs a fuzzer for some seconds, or all of them, a few at a time.

"400x" in place of seconds runs 400 cases, the same on every machine. CI does so; new cases are tried at night and by
hand.

Cases with findings are kept in build/fuzz/TARGET. One that is copied to a folder in tests/fuzz/corpus/TARGET becomes a
test. Each target runs in a process of its own, so that a crash is a finding too.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz.harness import cases, keep_case, try_case
from fuzz.targets import TARGETS

_OUT = Path(__file__).parents[2] / "build" / "fuzz"
_FOUND = 3  # the exit code of a target with findings; any other but 0 is a crash
_SPACE = 8 << 30  # bytes of address space, so that a huge allocation ends in a MemoryError


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 after a finding."""
    name, seconds, seed = (*arguments, *("all", "5", "0")[len(arguments) :])[:3]
    if name != "all" and name not in TARGETS:
        print(f"fuzz: expected all or one of {', '.join(TARGETS)}; got {name}", file=sys.stderr)
        return 2
    if name != "all" and len(arguments) == 4:
        return _run(name, seconds, int(seed))
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        names = TARGETS if name == "all" else [name]
        return int(any(list(pool.map(lambda one: _run_apart(one, seconds, seed), names))))


def _run_apart(name: str, length: str, seed: str) -> int:
    """Runs one target in a process; returns its exit code."""
    folder = _OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "stderr", "wb") as said:  # many Rust panics, all caught
        command = [sys.executable, "-m", "fuzz", name, length, seed, "here"]
        code = subprocess.run(command, stderr=said, check=False).returncode
    if code not in (0, _FOUND):
        said_last = (folder / "stderr").read_text(errors="replace")[-2000:]
        print(f"{name}: ended with {code} at {folder / 'case'}:\n{said_last}", flush=True)
    return code


def _run(name: str, length: str, seed: int) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_SPACE, resource.RLIM_INFINITY))
    target, folder = TARGETS[name], _OUT / name
    found: dict[tuple[str, str], int] = {}
    is_count = length.endswith("x")
    most = float(length.removesuffix("x"))
    start, count = time.monotonic(), 0
    for case in cases(target, seed):
        if (count if is_count else time.monotonic() - start) >= most:
            break
        # Ends the process if the signal that stops a hang does not get through.
        faulthandler.dump_traceback_later(10 * target.seconds, exit=True)
        finding = try_case(target, case, folder / "case")
        faulthandler.cancel_dump_traceback_later()
        count += 1
        if finding is None:
            continue
        key = finding.where, finding.what.split(":")[0]
        found[key] = found.get(key, 0) + 1
        if found[key] == 1:
            kept = keep_case(case, folder)
            print(f"{name}: {finding.what!r} at {finding.where}: {kept}", flush=True)
    print(f"{name}: {count} cases, {len(found)} findings", flush=True)
    return _FOUND if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
