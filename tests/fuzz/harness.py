"""Runs cases of a target, and reports what no case may cause: an undocumented error, a warning, a hang, much memory."""

from __future__ import annotations

import hashlib
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from fuzz.target import Case, Target

_MOST_BYTES = 8 << 20  # of a case; with larger files the memory a reader takes would prove nothing

CORPUS = Path(__file__).parent / "corpus"
"""TARGET/CASE/FILE: files that once caused a finding."""


class Hang(BaseException):
    """Raised when a case takes too long. It is no Exception, so that no reader blames the file for it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a case did that it must not, and where in the code."""

    what: str
    where: str


def corpus(target: Target) -> list[Case]:
    """Returns the kept cases of a target: the first sound case, with the files that once caused a finding."""
    folders = sorted((CORPUS / target.name).glob("*"))
    sound = target.seeds()[0] if folders else {}
    return [sound | {f.name: f.read_bytes() for f in sorted(d.iterdir())} for d in folders]


def cases(target: Target, seed: int) -> Iterator[Case]:
    """Yields the sound cases, the kept ones, and then endless random changes of them."""
    known = [*target.seeds(), *corpus(target)]
    yield from known
    number = 0
    while True:
        rng = Random(f"{target.name} {seed} {number}")
        case = rng.choice(known)
        # A case that was changed once may be too broken to be changed again.
        with suppress(Exception):
            for _ in range(rng.choice((1, 1, 1, 2))):
                case = target.change(rng, case)
        if sum(map(len, case.values())) <= _MOST_BYTES:
            yield case
        number += 1


def try_case(target: Target, case: Case, folder: Path) -> Finding | None:
    """Writes a case to a folder, runs the target on it, and returns what went wrong, if anything. The files stay."""
    write_case(case, folder)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    finding = None
    try:
        with warnings.catch_warnings(), _limit(target.seconds):
            warnings.simplefilter("error")
            target.run(folder)
    except target.documented:
        pass
    except Hang as error:
        finding = Finding(f"takes more than {target.seconds:g} s", _place(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Rust panics are no Exceptions
        finding = Finding(f"{type(error).__name__}: {error}"[:300], _place(error))
    grown = _memory("VmHWM") - before
    if finding is None and grown > target.memory:
        finding = Finding(f"takes {grown >> 20} MiB", "")
    return finding


def write_case(case: Case, folder: Path) -> None:
    """Makes a folder hold exactly the files of a case."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.items():
        (folder / name).write_bytes(content)


def keep_case(case: Case, folder: Path) -> Path:
    """Writes a case to a subfolder named by the hash of its files; returns the subfolder."""
    digest = hashlib.sha256(b"\0".join(n.encode() + b"\0" + c for n, c in sorted(case.items())))
    write_case(case, folder / digest.hexdigest()[:12])
    return folder / digest.hexdigest()[:12]


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _place(error: BaseException) -> str:
    """Returns the innermost line of edgemoe in the traceback, as "file:line"."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/edgemoe/" in f.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
