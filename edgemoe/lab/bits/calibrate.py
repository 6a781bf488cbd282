"""Collects a calibration: runs a text through a model and sums what flows into every matrix.

Squares and everything small are collected in one pass over the text. Products (`full`, `layers`) take a pass for
every run of layers whose matrices fit in memory. Every pass saves where it is from time to time, and an interrupted
calibration goes on there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import hardware
from edgemoe.errors import FormatError
from edgemoe.file.columns import column_scales
from edgemoe.file.format import MoeFile, open_moe
from edgemoe.file.parse import parse_json
from edgemoe.file.summed import SummedFile
from edgemoe.lab.bits.moments import Moments, Products, product_shapes
from edgemoe.lab.bits.tapped import TappedModel
from edgemoe.quant import write_calibration
from edgemoe.quant.columns import ColumnScales
from edgemoe.runtime.budget import default_ram, parse_size
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["ENOUGH", "WINDOW", "calibrate", "default_text", "windows_of"]

Progress = Callable[[int, int], None]

WINDOW = 512
"""Tokens of each piece of text, as llama.cpp's imatrix takes them."""

ENOUGH, BALANCED = 128, 0.99
"""Tokens that say enough of an expert, and the share of all experts that must have seen as many."""

_COUNT = re.compile(r"experts\.[0-9]+\.count$")

_PART = "a part of a calibration"
_SAVE_SHARE = 20  # saving may take a twentieth of the time
_SAVE_SECONDS = 30.0


def default_text() -> str:
    """Returns the text that comes with the package; its licence is in convert/data/NOTICE.md."""
    path = files("edgemoe.convert") / "data" / "calibration.txt"
    return path.read_text(encoding="utf-8")


def windows_of(moe: MoeFile, text: str, *, window: int, count: int | None) -> NDArray[np.int32]:
    """Returns a text's tokens, cut into windows [N, window]; what is left over at the end is dropped.

    What the model expects before every text takes the place of each window's first token, as in llama.cpp.

    Args:
        count: most windows; None for all.

    Raises:
        ValueError: the text is shorter than a window, or the window longer than the model's context.
        FormatError: the file has no tokenizer.
    """
    if "tokenizer.json" not in moe.sections:
        raise FormatError(f"{moe.path}: has no tokenizer")
    if not 1 <= window <= moe.config.context_length:
        raise ValueError(
            f"window: expected 1 to {moe.config.context_length} (the model's), got {window}"
        )
    if count is not None and count < 1:
        raise ValueError(f"chunks: expected at least 1, got {count}")
    tokenizer = Tokenizer.from_files(moe.sections)
    ids = tokenizer.encode(text, add_special=False)
    n = len(ids) // window if count is None else min(count, len(ids) // window)
    if n < 1:
        raise ValueError(f"a text of {len(ids)} tokens; expected at least one window of {window}")
    windows = np.array(ids[: n * window], np.int32).reshape(n, window)
    first = tokenizer.encode("")
    if len(first) == 1:
        windows[:, 0] = first[0]
    return windows


def calibrate(
    path: str | os.PathLike[str],
    text: str,
    out: Path,
    *,
    full: bool = False,
    layers: bool = False,
    window: int = WINDOW,
    count: int | None = None,
    more: str | None = None,
    ram: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[int, int]]:
    """Writes a calibration of a model, at the highest precision of its file.

    The result depends on the model, the text and the arguments up to `more` alone; `full` ones on the numpy's
    matrix product too. An interrupted call leaves parts beside `out`, from which the same call goes on.

    Args:
        path: a `.moe` file.
        full: also collect x xᵀ.
        layers: the same, but for experts only what a layer's all take together: one matrix in place of two for each.
        window: tokens of each piece of text.
        count: most pieces; None for the whole text.
        more: what to go on with until most experts of each layer have seen enough tokens (`BALANCED` of them
            `ENOUGH`), or it ends: EAQuant's expert balance (arXiv 2506.13329).
        ram: memory for the whole process; None for what is free, less a margin.
        progress: called with the pieces that are done and their number, over all passes.

    Returns:
        The experts that saw fewer tokens than `ENOUGH`, as (layer, expert).

    Raises:
        ValueError: the text or an argument does not do.
        FormatError: the model is not sound.
        OutOfBudget: says the smallest budget that works.
        OSError: reading or writing failed.
    """
    if full and layers:
        raise ValueError("layers: not together with full, which has more")
    moe = open_moe(path)
    scales = column_scales(moe)
    pieces = windows_of(moe, text, window=window, count=count)
    needed = len(pieces)
    if more is not None:
        pieces = np.concatenate([pieces, windows_of(moe, more, window=window, count=None)])
    total_ram = default_ram() if ram is None else parse_size(ram)
    process = (
        hardware.process_bytes()
    )  # before there are sums, which take their memory as they fill
    passes: list[tuple[str, ...]] = [()]
    if full or layers:
        shapes = product_shapes(moe.config, layers=layers)
        _check_disk(out, shapes)
        room = (total_ram - process) // 2
        saved = _saved_passes(out.with_name(f"{out.name}.part0"), moe, pieces, shapes, room)
        passes = saved or [(), *_runs(shapes, room)]
    parts = [out.with_name(f"{out.name}.part{i}") for i in range(len(passes))]
    identity = _identity(moe, pieces, passes)
    for i, (names, part) in enumerate(zip(passes, parts, strict=True)):
        sums = Products(moe.config, names) if names else _moments(moe)
        state = _State(part, identity, json.dumps(passes), sums)
        if state.lacks(pieces, needed):
            with TappedModel(
                moe, state.sums, ram=total_ram, process=process, window=window, threads=threads
            ) as run:
                while state.lacks(pieces, needed):
                    run(pieces[state.done])
                    state.end_window()
                    if progress is not None:
                        progress(i * len(pieces) + state.done, len(passes) * len(pieces))
            state.save()
        if i == 0:
            starved = _starved(state.sums)
            needed, pieces = state.done, pieces[: state.done]  # other passes are of the same text
    write_calibration(out, _Joined(parts, scales), _meta(moe, pieces))
    for part in parts:
        part.unlink()
    return starved


def _meta(moe: MoeFile, pieces: NDArray[np.int32]) -> dict[str, str]:
    """Returns what a calibration says of itself."""
    return {
        "source": "edgemoe", "model": str(moe.source.get("name", moe.path.name)),
        "tokens": str(pieces.size), "window": str(pieces.shape[1]),
        "bits": " ".join(str(rung[0]) for rung in moe.ladder),
    }  # fmt: skip


def _starved(sums: Moments | Products) -> list[tuple[int, int]]:
    """Returns the experts that saw fewer tokens than `ENOUGH`; none of sums that do not count them."""
    counts = {int(name.split(".")[1]): n for name, n in sums.sums.items() if _COUNT.match(name)}
    return [(layer, e) for layer, n in counts.items() for e in np.flatnonzero(n < ENOUGH).tolist()]


def _is_balanced(sums: Moments | Products) -> bool:
    """Says whether enough experts have seen enough; of sums that do not count them it was seen to before."""
    total = sum(len(n) for name, n in sums.sums.items() if _COUNT.match(name))
    return len(_starved(sums)) <= (1 - BALANCED) * total


def _check_disk(out: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses what the disk cannot hold; the parts and the whole lie beside each other at the end."""
    wanted = 2 * sum(4 * math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(out.parent).free
    if free < wanted:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {free / 1e6:.0f} MB free; products take {wanted / 1e6:.0f} MB",
            str(out),
        )


def _moments(moe: MoeFile) -> Moments:
    return Moments(moe.config, level_bits=[rung[0] for rung in moe.ladder])


def _runs(shapes: Mapping[str, tuple[int, ...]], room: int) -> list[tuple[str, ...]]:
    """Divides products into runs that fit in `room` bytes, each of at least one."""
    runs: list[tuple[str, ...]] = []
    current: list[str] = []
    used = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if current and used + size > room:
            runs.append(tuple(current))
            current, used = [], 0
        current.append(name)
        used += size
    return [*runs, tuple(current)]


def _saved_passes(
    part: Path,
    moe: MoeFile,
    pieces: NDArray[np.int32],
    shapes: Mapping[str, tuple[int, ...]],
    room: int,
) -> list[tuple[str, ...]] | None:
    """Returns the passes that an interrupted call has begun; None if there are none, or they are too large by now.

    What is free differs from call to call, so that other passes would throw away what was saved.
    """
    try:
        meta = SummedFile(part, _PART).meta
        passes = [tuple(names) for names in parse_json(meta["passes"], "passes")]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    if meta.get("identity") != _identity(moe, pieces, passes):
        return None
    if sorted(name for names in passes for name in names) != sorted(shapes):  # not of these
        return None
    largest = max(sum(4 * math.prod(shapes[name]) for name in names) for names in passes)
    single = max(4 * math.prod(shape) for shape in shapes.values())
    return passes if largest <= max(1.5 * room, single) else None


def _identity(moe: MoeFile, pieces: NDArray[np.int32], passes: list[tuple[str, ...]]) -> str:
    """Returns a sum of what the result depends on."""
    digest = hashlib.sha256(repr((moe.config, moe.ladder, pieces.shape, passes)).encode())
    for array in (moe.experts.crcs, pieces):
        digest.update(array.tobytes())
    digest.update(repr([t.crcs for t in moe.tensors.values()]).encode())
    return digest.hexdigest()


@dataclass(slots=True)
class _State:
    """Is one pass's sums and how many windows they are of, saved under a name of its own."""

    path: Path
    identity: str
    passes: str
    sums: Moments | Products
    done: int = 0
    saved_at: float = field(default_factory=time.monotonic)
    pause_s: float = field(default_factory=lambda: _SAVE_SECONDS)

    def __post_init__(self) -> None:
        try:
            file = SummedFile(self.path, _PART)
            if file.meta.get("identity") != self.identity or not file.is_summed:
                return
            file.verify()
        except (OSError, FormatError):  # there is none, or not a sound one
            return
        for name, array in self.sums.sums.items():
            array[...] = file.tensor(name)
        self.done = int(file.meta["windows"])

    def lacks(self, pieces: NDArray[np.int32], needed: int) -> bool:
        """Says whether there is more to run: the first `needed` pieces, and of the others as many as balance takes."""
        return self.done < min(needed, len(pieces)) or (
            self.done < len(pieces) and not _is_balanced(self.sums)
        )

    def end_window(self) -> None:
        self.sums.end_window()
        self.done += 1
        if time.monotonic() - self.saved_at > self.pause_s:
            self.save()

    def save(self) -> None:
        start = time.monotonic()
        write_calibration(
            self.path, self.sums.sums,
            {"identity": self.identity, "windows": str(self.done), "passes": self.passes},
        )  # fmt: skip
        self.saved_at = time.monotonic()
        self.pause_s = max(_SAVE_SECONDS, _SAVE_SHARE * (self.saved_at - start))


class _Joined(Mapping[str, NDArray[Any]]):
    """Reads the tensors of several parts, one at a time, as a calibration has them: over the checkpoint's inputs."""

    def __init__(self, parts: list[Path], scales: ColumnScales | None) -> None:
        self._scales = scales
        self._files: dict[str, SummedFile] = {}
        for part in parts:
            file = SummedFile(part, _PART)
            self._files |= dict.fromkeys(file.shapes, file)

    def __getitem__(self, name: str) -> NDArray[Any]:
        array = self._files[name].tensor(name)
        if self._scales is not None:
            self._scales.restore(name, array)
        return array.astype(np.float32) if name.endswith(".squares") else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
