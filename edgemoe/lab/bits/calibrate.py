"""Collects a calibration: runs a text through a model and sums statistics of the input of every matrix.

The whole text goes through one layer before it goes through the next. So each expert is read once, only the sums of one
layer are in memory, and a finished layer is written and not needed again. The input of the next layer is saved in a
file of its own, from which an interrupted calibration goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgemoe import hardware
from edgemoe.errors import FormatError, size_text
from edgemoe.file.columns import column_scales
from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.file.summed import write_summed
from edgemoe.file.summing import SummedWriter
from edgemoe.file.whole import meant
from edgemoe.lab.bits.balanced import ENOUGH, Machine, balanced, saved
from edgemoe.lab.bits.moments import (
    Form,
    LayerSums,
    Products,
    SumForm,
    sum_bytes,
    sum_forms,
)
from edgemoe.lab.bits.tapped import TappedModel
from edgemoe.quant import Calibration
from edgemoe.quant.calibration import calibration_meta
from edgemoe.runtime.budget import default_ram, parse_size
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["ENOUGH", "WINDOW", "calibrate", "default_text", "is_begun", "windows_of"]

Progress = Callable[[int, int], None]

WINDOW = 512
"""Tokens of each piece of text, as in llama.cpp's imatrix."""

Array = NDArray[np.float32]

_HEADER = 8192  # bytes of a small file's header, with the rest of its last block


def default_text() -> str:
    """Returns the text that comes with the package; its licence is in convert/data/NOTICE.md."""
    path = files("edgemoe.convert") / "data" / "calibration.txt"
    return path.read_text(encoding="utf-8")


def windows_of(
    moe: MoeFile, text: str, *, window: int, count: int | None, name: str = "text"
) -> NDArray[np.int32]:
    """Returns a text's tokens, cut into windows [N, window]; a shorter rest at the end is dropped.

    If the model expects a token at the start of every text, it replaces each window's first token, as in llama.cpp.

    Args:
        window: tokens of each window.
        count: the most windows to return; None for all.

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
        raise ValueError(f"{name}: expected at least one window of {window} tokens, got {len(ids)}")
    windows = np.array(ids[: n * window], np.int32).reshape(n, window)
    first = tokenizer.encode("")
    if len(first) == 1:
        windows[:, 0] = first[0]
    return windows


def is_begun(out: Path) -> bool:
    """Returns whether an interrupted call has left files from which the same call goes on."""
    out = Path(os.path.realpath(out))
    return _state(out).exists() or _counts(out).exists()


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
    counting: Progress | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[tuple[int, int]]:
    """Writes a calibration of a model, run at the highest precision of its file.

    The result depends only on the model, the text and the arguments up to `more`; with products, also on numpy's matrix
    product. An interrupted call leaves files next to `out`, from which the same call goes on after the last finished
    layer.

    Args:
        path: a `.moe` file.
        text: the text to run through the model.
        out: the file to write. An existing file is replaced; if it is a link, the file that it leads to.
        full: also collect products x xᵀ.
        layers: the same, but for the gates and ups of all experts of a layer together, not for each, and not for their
            downs: one matrix per layer in place of two per expert.
        window: tokens of each piece of text.
        count: the most pieces; None for the whole text.
        more: a second text to go on with, until 99% of all experts have seen `ENOUGH` tokens, or it ends. This is
            EAQuant's expert balance (arXiv 2506.13329). How much of it is needed is found first.
        ram: memory for the whole process; None for what is free, less a margin.
        threads: None for the machine's number.
        counting: called with the pieces that were counted for `more`, each in every layer, and the most there may be.
        progress: called with the pieces that went through a layer, over all layers, and how many there are.
        say: called with a line that describes the work, before it begins.

    Returns:
        The experts that saw fewer tokens than `ENOUGH`, as (layer, expert).

    Raises:
        ValueError: the text or an argument is not usable.
        FormatError: the model is damaged.
        OutOfBudget: `ram` is too small; the message says the smallest budget that works.
        OSError: the disk is too small, reading or writing failed, another process makes the same file, or `out` exists
            and is not a regular file.
    """
    out = meant(out)
    if out.exists() and not out.is_file():
        raise FileExistsError(f"{out}: is no regular file; expected one to write, or none")
    if full and layers:
        raise ValueError("layers: not together with full, which has more")
    moe = open_moe(path)
    pieces = windows_of(moe, text, window=window, count=count)
    total = default_ram() if ram is None else parse_size(ram)
    # The process is measured before there are sums, whose memory is taken only as they fill.
    machine = Machine(moe, total, hardware.process_bytes(), threads)
    products: Products = "full" if full else "layers" if layers else "none"
    if more is not None:
        others = windows_of(moe, more, window=window, count=None, name="more")
        pieces = balanced(machine, pieces, others, _counts(out), counting or _nobody)
    _Calibration(machine, pieces, products, out).run(
        say or (lambda line: None), progress or _nobody
    )
    for kept in (_state(out), _counts(out)):
        kept.unlink(missing_ok=True)
    made = Calibration(out)
    return [
        (i, int(e)) for i in made.layers for e in np.flatnonzero(made.layer(i, "count") < ENOUGH)
    ]


def _state(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.state")


def _counts(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.counts")


def _nobody(done: int, total: int) -> None:
    """Ignores progress."""


class _Calibration:
    """A calibration in progress."""

    def __init__(
        self, machine: Machine, pieces: NDArray[np.int32], products: Products, out: Path
    ) -> None:
        moe = machine.moe
        self._machine, self._pieces, self._out = machine, pieces, out
        self._form = SumForm([rung[0] for rung in moe.ladder], pieces.size, products)
        self._identity = machine.identity(pieces, products)
        self._forms = [
            sum_forms(moe.config, layer, self._form) for layer in range(moe.config.num_layers)
        ]
        self._scales = column_scales(moe)
        self._x = machine.activations(pieces)
        rows = sum(shape[0] if len(shape) > 1 else 1 for _, shape in self._all_forms().values())
        self._state_bytes = self._x.nbytes + 8 * rows + 4 * len(pieces) + _HEADER
        """The most bytes of disk that the saved state takes: `x`, checksums of the sums, and checksums of `x`."""

    def run(self, say: Callable[[str], None], progress: Progress) -> None:
        """Makes the calibration, or goes on with one that was interrupted."""
        pieces, x, config = self._pieces, self._x, self._machine.moe.config
        taken = (
            sum_bytes(sum_forms(config, i, self._form, is_filed=False))
            for i in range(config.num_layers)
        )
        with SummedWriter(self._out, self._all_forms(), self._meta()) as file:
            begin = self._resume(file)
            self._require_room(file)
            say(self._plan(file, begin))
            # Checksums count three times: they are saved as integers of twice their size.
            beside = x.nbytes + max(taken) + 3 * file.sums_bytes
            with self._machine.tapped(beside, pieces.shape[1]) as model:
                if begin == 0:
                    for ids, to in zip(pieces, x, strict=True):
                        model.embed(ids, to)
                for layer in range(begin, config.num_layers):
                    self._add(file, layer, self._run_layer(model, layer, progress))
                    file.sync()
                    if layer + 1 < config.num_layers:
                        self._save(file, layer + 1)
            file.finish()

    def _run_layer(self, model: TappedModel, layer: int, progress: Progress) -> LayerSums:
        """Runs the whole text through a layer and returns its sums."""
        pieces, config = self._pieces, self._machine.moe.config
        window = pieces.shape[1]
        sums = LayerSums(config, layer, self._form)
        for n, ids in enumerate(pieces):
            model.run_layer(layer, ids, self._x[n], sums, first=n * window)
            sums.end_window()
            progress(layer * len(pieces) + n + 1, config.num_layers * len(pieces))
        sums.finish()
        return sums

    def _add(self, file: SummedWriter, layer: int, sums: LayerSums) -> None:
        """Writes the sums of a layer, converted to the checkpoint's inputs (see `ColumnScales`)."""
        for name, (kind, _) in self._forms[layer].items():
            array = sums.sums.pop(name)
            if self._scales is not None:
                self._scales.restore(name, array)
            file.add(name, array.astype(kind, copy=False))

    def _resume(self, file: SummedWriter) -> int:
        """Returns the layer to begin with, and restores `x`, its input."""
        found = saved(_state(self._out), self._identity)
        if found is None or not file.resume(found.tensor("sums")):
            return 0
        at = 0
        for some in found.rows("x"):
            self._x[at : at + len(some)] = some
            at += len(some)
        return int(found.meta["layers"])

    def _save(self, file: SummedWriter, layers: int) -> None:
        meta = {"identity": self._identity, "layers": str(layers)}
        sums = file.sums.astype(np.int64)
        write_summed(_state(self._out), {"x": self._x, "sums": sums}, meta, ours=True)

    def _require_room(self, file: SummedWriter) -> None:
        """Raises an OSError if the disk is too small. For a moment it holds the state twice."""
        wanted = file.total_bytes + 2 * self._state_bytes - file.kept_bytes
        with contextlib.suppress(FileNotFoundError):  # one copy of the state may exist already
            wanted -= min(os.lstat(_state(self._out)).st_blocks * 512, self._state_bytes)
        free = shutil.disk_usage(self._out.parent).free
        if free < wanted:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {size_text(free)} free; this takes {size_text(wanted)}",
                str(self._out),
            )

    def _plan(self, file: SummedWriter, begin: int) -> str:
        """Returns a line that describes the work."""
        count, window = self._pieces.shape
        layers = len(self._forms)
        goes_on = f", from layer {begin} on" if begin else ""
        return (
            f"{count} windows of {window} tokens through {layers} layers{goes_on}; {self._out.name} takes "
            f"{size_text(file.total_bytes)} of the disk, and {size_text(2 * self._state_bytes)} meanwhile"
        )

    def _all_forms(self) -> dict[str, Form]:
        return {name: form for forms in self._forms for name, form in forms.items()}

    def _meta(self) -> dict[str, str]:
        """Returns the calibration's metadata."""
        moe, pieces = self._machine.moe, self._pieces
        return calibration_meta(
            {
                "source": "edgemoe", "model": str(moe.source.get("name", moe.path.name)),
                "tokens": str(pieces.size), "window": str(pieces.shape[1]),
                "bits": " ".join(str(rung[0]) for rung in moe.ladder),
            }
        )  # fmt: skip
