"""Writes `.moe` files from float weights: quantises them and streams them into a `PartialFile`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.config import ModelConfig
from edgemoe.errors import FormatError
from edgemoe.file.coder import Coder
from edgemoe.file.format import MAX_SECTIONS
from edgemoe.file.layout import Layout, expert_ladder
from edgemoe.file.partial import PartialFile
from edgemoe.quant import (
    LEVEL_WEIGHTS,
    ROUNDING_WEIGHTS,
    SCHEMES,
    Allocation,
    Calibration,
    Scheme,
)

__all__ = ["Writer"]


class Writer:
    """A writer that streams a model into `path`.part and renames it when it is complete.

    The layout is known before the first byte is written, so tensors may come in any order. A second writer with the
    same arguments continues where an interrupted one stopped; `path`.part.log lists the finished records. Each record
    is written while the next one is quantised, so two are held in memory. A write error is raised when the next record
    is added, or by `sync` or `finish`. Use as a context manager; leaving without `finish` keeps the partial file.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        *,
        bits: int | None = None,
        scheme: Scheme = SCHEMES["nested"],
        sections: Mapping[str, bytes],
        source: Mapping[str, Any],
        calibration: Calibration | None = None,
        allocation: Allocation | None = None,
        favour: int | None = None,
        down_bits: Sequence[int] | None = None,
        threads: int = 0,
        reading: Callable[[int, int], None] | None = None,
    ) -> None:
        """Plans the file and opens or resumes `path`.part.

        Args:
            bits: the highest level stored, from one of the scheme's ladders; None for the whole first ladder.
            scheme: how weights are encoded: one of `edgemoe.quant.SCHEMES`, or one with a quantiser of its own.
            sections: content by name, such as the tokenizer's files; empty ones are left out.
            source: JSON values that say where the weights and the calibration came from; if they change, a partial file
                is started over.
            calibration: statistics of the matrices' inputs; the quantiser then minimises the error of their outputs.
            allocation: how many bits of each expert to store; None stores `bits` of all.
            favour: bits of the level whose error matters most. None weighs all levels alike; but with an allocation, it
                favours the last level of each expert, which the expert will mostly run at.
            down_bits: bits of the experts' w_down at each level; None for those of w_gate and w_up.
            threads: CPU threads; 0 for the default of `edgemoe.hardware`.
            reading: called with how many layers' input products have been read for the corrections, and the total.

        Raises:
            ValueError: `bits` is on no ladder of the scheme; `favour` is not one of the levels, or the scheme cannot
                favour one; or `down_bits` do not ascend.
            FormatError: the allocation is for another model or exceeds `bits`, or the sections are too large.
            FileExistsError: another process has just written `path`, or something that is not a regular file has the
                name of the partial file or the log.
            OSError: the disk is too small (ENOSPC) or not writable, or another process is writing the file.
        """
        self._config = config
        if calibration is not None and calibration.is_full:
            scheme = scheme.fitted()
        self._scheme = scheme
        ladder = scheme.ladder(bits)
        self._favoured = scheme.favoured(bits, favour)
        levels = scheme.levels_of_experts(ladder)
        experts = expert_ladder(scheme, levels, down_bits)
        rungs = np.full(len(config.moe_layers) * config.num_experts, len(levels))
        if allocation is not None:
            allocation.check(config, levels, "allocation")
            rungs = np.searchsorted(levels, allocation.bits.reshape(-1)) + 1
        self._layout = Layout(
            config, scheme, ladder, tuple(experts[: int(rungs.max())]), tuple(rungs.tolist())
        )
        self._favours_own = allocation is not None and favour is None and scheme.can_favour
        self._coder = Coder(
            self._layout, scheme, favoured=self._favoured, favours_own=self._favours_own,
            calibration=calibration, threads=threads, reading=reading,
        )  # fmt: skip
        self._source = dict(source)
        self._sections = {k: v for k, v in sections.items() if v}
        if basis := self._coder.basis:
            self._sections = {**self._sections, "basis": basis}
        taken = self._layout.section_bytes(self._sections)
        if taken > MAX_SECTIONS:  # which no reader takes
            raise FormatError(f"sections of {taken} bytes; expected at most {MAX_SECTIONS}")
        self.total_bytes = self._layout.total_bytes(self._sections)
        self._part = PartialFile(
            Path(path), self._fingerprint(), self._layout.places, self.total_bytes
        )
        self.written_bytes = self._part.written_bytes
        """How much of `total_bytes` was found in the partial file or has been added."""
        self._behind = ThreadPoolExecutor(1, "write")
        self._last: Future[None] | None = None

    def _fingerprint(self) -> str:
        """Returns a CRC-32C of all that the records depend on."""
        layout = self._layout
        plan = [
            self._config.to_json(),
            layout.ladder,
            layout.rungs,
            layout.expert_ladder,
            [self._favoured, self._favours_own],
            self._source,
            {k: _core.crc32c(v) for k, v in self._sections.items()},
            LEVEL_WEIGHTS.tolist(),
            ROUNDING_WEIGHTS.tolist(),
            [self._scheme.name, self._scheme.row_scales, layout.scheme.correction],
            "thorough" if self._scheme.is_thorough else "quick",
        ]
        return f"{_core.crc32c(json.dumps(plan, sort_keys=True).encode()):08x}"

    def sync(self) -> None:
        """Syncs to disk what was added, so that no interruption can lose it."""
        self._wait()
        self._part.sync()

    def is_done(self, name: str) -> bool:
        """Returns whether a tensor, or the expert "experts.LAYER.INDEX", is in the file already."""
        return name in self._part.sums

    # ------------------------------------------------------------ adding

    def add(self, name: str, array: NDArray[np.float32]) -> None:
        """Writes a dense tensor; matrices are quantised.

        Raises:
            FormatError: the model has no such tensor, its shape differs, or a weight is not finite.
        """
        self._write(name, self._coder.tensor(name, array))

    def add_expert(
        self,
        layer: int,
        index: int,
        gate: NDArray[np.float32],
        up: NDArray[np.float32],
        down: NDArray[np.float32],
    ) -> None:
        """Writes one routed expert: gate and up [H, D], down [D, H]; gate [0, D] if experts have no gate.

        Raises:
            FormatError: there is no such expert, a shape differs, or a weight is not finite.
        """
        rungs = self._coder.expert(layer, index, gate, up, down)
        self._write(f"experts.{layer}.{index}", rungs)

    def _write(self, name: str, rungs: Sequence[NDArray[np.uint8]]) -> None:
        self._wait()
        self._last = self._behind.submit(self._part.write, name, rungs)
        self.written_bytes += self._layout.places[name].padded_bytes

    def _wait(self) -> None:
        """Waits for the record that is being written, and raises its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def finish(self) -> None:
        """Writes the sections, the index and the preamble, and renames the file to `path`.

        Raises:
            FormatError: a tensor or expert was not added.
            FileExistsError: another process has written `path` meanwhile.
            OSError: the disk is full.
        """
        self._wait()
        missing = sorted(set(self._layout.places) - set(self._part.sums))
        if missing:
            raise FormatError(f"{missing[0]}: not written ({len(missing)} in all)")
        ending = self._layout.ending(self._part.sums, self._sections, self._source)
        self._part.finish(ending)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._behind.shutdown()
        self._part.close()
