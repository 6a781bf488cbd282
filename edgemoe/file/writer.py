"""Writes `.moe` files: streaming, resumable, under a temporary name until complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core, hardware
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.errors import FormatError
from edgemoe.file.format import (
    ALIGNMENT,
    align,
    expert_rung_bytes,
    pack_preamble,
    tensor_bytes,
)  # fmt: skip
from edgemoe.quant import (
    LEVEL_WEIGHTS,
    ROUNDING_WEIGHTS,
    SCHEMES,
    Allocation,
    Calibration,
    Scheme,
)

__all__ = ["Writer"]

_LOOKED_UP = 0.3  # of a tied embedding's error; 0.1 to 0.6 made no difference that could be told
_SYNC_BYTES = 64 << 20  # what an interruption may cost


class Writer:
    """Streams a model into `path`.part and renames it when it is complete.

    The layout is known before the first byte: tensors may come in any order, and a second writer with the same
    arguments goes on where an interrupted one stopped (`path`.part.log says how far it came). One tensor is held
    in memory at a time. Use as a context manager; leaving without `finish` keeps the partial file.
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
    ) -> None:
        """Plans the file and opens or resumes `path`.part.

        Args:
            bits: the last rung that is stored, a level of one of the scheme's ladders; None for all of the first.
            scheme: what the planes mean; one of `edgemoe.quant.SCHEMES`, or with a quantiser of its own.
            sections: the tokenizer's files and the like, by name; empty ones are left out.
            source: JSON values that say where the weights and the calibration came from; a change starts over.
            calibration: what flows into the matrices; the quantiser then minimises the error of what comes out.
            allocation: of each expert only so many bits are stored; None stores `bits` of all.
            favour: bits of the level whose error matters most. None: all levels alike, but with an allocation the last
                of each expert, as it will mostly run at that.
            down_bits: bits of experts' w_down at each level; None for those of the other two.

        Raises:
            ValueError: bits are on no ladder of the scheme, `favour` is not one of the levels or the scheme cannot, or
                `down_bits` do not climb.
            FormatError: the allocation is of another model, or asks for more than `bits`.
            OSError: the disk is too small (ENOSPC) or not writable.
        """
        self._path = Path(path)
        self._part = self._path.with_name(self._path.name + ".part")
        self._log_path = self._path.with_name(self._path.name + ".part.log")
        self._config = config
        self._scheme = scheme
        self._ladder = scheme.ladder(bits)
        if favour is not None and not scheme.can_favour:
            raise ValueError(f"favour: not for the scheme {scheme.name}")
        if favour not in (None, *self._ladder):
            raise ValueError(
                f"favour: expected one of {', '.join(map(str, self._ladder))}, got {favour}"
            )
        down = tuple(self._ladder if down_bits is None else down_bits)
        if (
            len(down) != len(self._ladder)
            or not all(a < b <= 8 for a, b in pairwise((0, *down)))
            or not scheme.is_ladder(down)
        ):
            raise ValueError(
                f"down bits: expected {len(self._ladder)} that climb to at most 8, got {down}"
            )
        self._rungs = np.full(len(config.moe_layers) * config.num_experts, len(self._ladder))
        if allocation is not None:
            allocation.check(config, self._ladder, "allocation")
            self._rungs = np.searchsorted(self._ladder, allocation.bits.reshape(-1)) + 1
        levels = int(self._rungs.max())
        self._expert_ladder = list(zip(self._ladder, self._ladder, down, strict=True))[:levels]
        self._favoured = None if favour is None else self._ladder.index(favour) + 1
        self._favours_own = allocation is not None and favour is None and scheme.can_favour
        self._calibration = calibration
        self._threads = threads or hardware.num_threads()
        self._specs = dense_tensors(config)
        self._source = dict(source)
        self._sections = {k: v for k, v in sections.items() if v}
        self._crcs: dict[str, list[int]] = {}
        self._unlogged: list[str] = []
        self._unsynced = 0
        self.written_bytes = 0
        self._plan()
        self._open()

    # ------------------------------------------------------------ layout

    def _plan(self) -> None:
        config, scheme, at = self._config, self._scheme, ALIGNMENT
        self._places: dict[str, tuple[int, list[int]]] = {}
        for name, spec in self._specs.items():
            sizes = tensor_bytes(spec, scheme, self._ladder)
            self._places[name] = (at, sizes)
            at = align(at + sum(sizes))
        all_sizes = expert_rung_bytes(config, scheme, self._expert_ladder)
        rungs = iter(self._rungs.tolist())
        for layer in config.moe_layers:
            for index in range(config.num_experts):
                sizes = all_sizes[: next(rungs)]
                self._places[f"experts.{layer}.{index}"] = (at, sizes)
                at = align(at + sum(sizes))
        self._tail = at
        table = len(self._rungs) * (8 + 8 * len(self._expert_ladder))
        self.total_bytes = at + sum(align(len(v)) for v in self._sections.values()) + align(table)

    def _fingerprint(self) -> str:
        sections = {k: _core.crc32c(v) for k, v in self._sections.items()}
        plan = [
            self._config.to_json(),
            self._ladder,
            self._rungs.tolist(),
            self._expert_ladder,
            [self._favoured, self._favours_own],
            self._source,
            sections,
            LEVEL_WEIGHTS.tolist(),
            ROUNDING_WEIGHTS.tolist(),
            self._scheme.name,
        ]
        return f"{_core.crc32c(json.dumps(plan, sort_keys=True).encode()):08x}"

    # ------------------------------------------------------------ the partial file

    def _open(self) -> None:
        done = self._read_log()
        kept = self._part.stat().st_size if self._part.exists() else 0
        free = shutil.disk_usage(self._path.parent or ".").free + (kept if done else 0)
        # Sparse parts of a resumed file count as free here; the margin covers index and log.
        wanted = self.total_bytes + (1 << 20)
        if free < wanted:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {free / 1e6:.1f} MB free; the file takes {wanted / 1e6:.1f} MB",
                str(self._path),
            )
        self._file: IO[bytes] = open(self._part, "r+b" if self._part.exists() else "w+b")  # noqa: SIM115
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BlockingIOError(
                    errno.EAGAIN, "another conversion is writing it", str(self._part)
                ) from None
            if done:
                self._verify(done)
            else:
                self._file.truncate(0)
                self._log_path.write_text(self._fingerprint() + "\n")
            self._log: IO[str] = open(self._log_path, "a")  # noqa: SIM115
        except BaseException:
            self._file.close()
            raise

    def _read_log(self) -> dict[str, list[int]]:
        """Returns what an interrupted conversion of the same thing finished."""
        try:
            lines = self._log_path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        if not lines or lines[0] != self._fingerprint() or not self._part.exists():
            return {}
        done: dict[str, list[int]] = {}
        for line in lines[1:]:
            with contextlib.suppress(ValueError, KeyError):  # the last line may be half written
                name, *crcs = line.split(" ")
                if len(crcs) == len(self._places[name][1]):
                    done[name] = [int(c, 16) for c in crcs]
        return done

    def _verify(self, done: Mapping[str, list[int]]) -> None:
        """Keeps of the log what the partial file really holds."""
        for name, crcs in done.items():
            offset, sizes = self._places[name]
            self._file.seek(offset)
            if all(
                _core.crc32c(self._file.read(size)) == crc
                for size, crc in zip(sizes, crcs, strict=True)
            ):
                self._crcs[name] = crcs
                self.written_bytes += align(sum(sizes))

    def is_done(self, name: str) -> bool:
        """Says whether a tensor, or "experts.LAYER.INDEX", is in the file already."""
        return name in self._crcs

    # ------------------------------------------------------------ adding

    def add(self, name: str, array: NDArray[np.float32]) -> None:
        """Writes a dense tensor; matrices are quantised.

        Raises:
            FormatError: the model has no such tensor, its shape differs, or a weight is not finite.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise FormatError(f"{name}: not a tensor of this model")
        if array.shape != spec.shape:
            raise FormatError(f"{name}: expected shape {spec.shape}, got {array.shape}")
        if spec.kind == "nested":
            self._write(name, self._quantize(name, array, self._ladder, self._favoured))
        else:
            if not np.isfinite(array).all():
                raise FormatError(f"{name}: a value is not finite")
            flat = np.ascontiguousarray(array, np.float32).reshape(-1)
            self._write(name, [flat.view(np.uint8)])

    def add_expert(
        self,
        layer: int,
        index: int,
        gate: NDArray[np.float32],
        up: NDArray[np.float32],
        down: NDArray[np.float32],
    ) -> None:
        """Writes one routed expert: gate and up [H, D], down [D, H].

        Raises:
            FormatError: there is no such expert, a shape differs, or a weight is not finite.
        """
        name = f"experts.{layer}.{index}"
        d, h = self._config.hidden_size, self._config.expert_hidden
        if name not in self._places:
            raise FormatError(f"{name}: not an expert of this model")
        rungs = []
        levels = len(self._places[name][1])
        favour = levels if self._favours_own else self._favoured and min(self._favoured, levels)
        matrices = (("gate", gate, (h, d)), ("up", up, (h, d)), ("down", down, (d, h)))
        for (part, w, shape), ladder in zip(
            matrices, zip(*self._expert_ladder, strict=True), strict=True
        ):
            if w.shape != shape:
                raise FormatError(f"{name}.{part}: expected shape {shape}, got {w.shape}")
            rungs.append(self._quantize(f"{name}.{part}", w, ladder[:levels], favour))
        self._write(name, [np.concatenate(parts) for parts in zip(*rungs, strict=True)])

    def _quantize(
        self, name: str, w: NDArray[np.float32], ladder: Sequence[int], favour: int | None
    ) -> list[NDArray[np.uint8]]:
        try:
            return self._scheme.quantize(
                np.ascontiguousarray(w, np.float32),
                ladder,
                second_moments=self._second_moments(name),
                favour=favour,
                threads=self._threads,
            )
        except ValueError as e:
            raise FormatError(f"{name}: {e}") from None

    def _second_moments(self, name: str) -> NDArray[np.float32] | None:
        if self._calibration is None:
            return None
        moments = self._calibration.matrix(name)
        if moments is None:
            moments = self._calibration.diagonal(name)
        if moments is None or name != "embed":
            return moments
        # The tied embedding is the head, which was calibrated, and is looked up, where every column counts alike.
        diagonal = np.diagonal(moments) if moments.ndim == 2 else moments
        alike = _LOOKED_UP / (1 - _LOOKED_UP) * diagonal.mean()
        spread = np.eye(len(moments)) if moments.ndim == 2 else np.ones(len(moments))
        return np.asarray(moments + alike * spread, np.float32)

    def _write(self, name: str, rungs: Sequence[NDArray[np.uint8]]) -> None:
        offset, sizes = self._places[name]
        assert [len(r) for r in rungs] == sizes
        with self._named():
            self._file.seek(offset)
            for rung in rungs:
                self._file.write(rung.data)
        if name not in self._crcs:
            self.written_bytes += align(sum(sizes))
        self._crcs[name] = [_core.crc32c(r.data) for r in rungs]
        self._unlogged.append(name)
        self._unsynced += sum(sizes)
        if self._unsynced >= _SYNC_BYTES:
            with self._named():
                self._sync()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Gives an error of the disk the file's name."""
        try:
            yield
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._part)) from None

    def _sync(self) -> None:
        """Logs what is safely on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        for name in self._unlogged:
            crcs = " ".join(f"{c:x}" for c in self._crcs[name])
            self._log.write(f"{name} {crcs}\n")
        self._log.flush()
        self._unlogged.clear()
        self._unsynced = 0

    # ------------------------------------------------------------ the end

    def finish(self) -> None:
        """Writes index and preamble, and gives the file its name.

        Raises:
            FormatError: a tensor or expert was not added.
            OSError: the disk is full.
        """
        with self._named():
            self._finish()

    def _finish(self) -> None:
        missing = sorted(set(self._places) - set(self._crcs))
        if missing:
            raise FormatError(f"{missing[0]}: not written ({len(missing)} in all)")
        sections, at = {}, self._tail
        for name, data in [*self._sections.items(), ("experts", self._expert_table())]:
            self._file.seek(at)
            self._file.write(data)
            sections[name] = [at, len(data), _core.crc32c(data)]
            at = align(at + len(data))
        tensors = {}
        for name, spec in self._specs.items():
            offset, sizes = self._places[name]
            rungs = list(zip(sizes, self._crcs[name], strict=True))
            tensors[name] = [spec.kind, list(spec.shape), offset, rungs]
        name = self._scheme.name
        index = json.dumps(
            {
                "config": self._config.to_json(),
                "ladder": self._expert_ladder,
                "dense_ladder": list(self._ladder),
                "group": self._scheme.group,
                "tensors": tensors,
                "sections": sections,
                "source": self._source,
                **({} if name == "nested" else {"scheme": name}),  # as before there were two
            }
        ).encode()
        self._file.seek(at)
        self._file.write(index)
        self._file.truncate(at + len(index))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        self._file.write(pack_preamble(at + len(index), at, index))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._close()
        os.replace(self._part, self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(directory)
        os.close(directory)
        self._log_path.unlink(missing_ok=True)

    def _expert_table(self) -> bytes:
        out = bytearray()
        for layer in self._config.moe_layers:
            for index in range(self._config.num_experts):
                name = f"experts.{layer}.{index}"
                offset, sizes = self._places[name]
                pairs = list(zip(np.cumsum(sizes).tolist(), self._crcs[name], strict=True))
                lacks = len(self._expert_ladder) - len(pairs)
                pairs += [(sum(sizes), 0)] * lacks
                out += offset.to_bytes(8, "little") + np.array(pairs, "<u4").tobytes()
        return bytes(out)

    def _close(self) -> None:
        self._file.close()
        self._log.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            self._sync()
        with contextlib.suppress(OSError):
            self._close()
