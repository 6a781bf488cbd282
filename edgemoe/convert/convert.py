"""Converts a checkpoint to a `.moe` file, a few tensors at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.arguments import number, path_of, whole, wholes
from edgemoe.config import dense_tensors
from edgemoe.convert.checkpoint import Checkpoint, sections
from edgemoe.convert.columns import ScaledModel, choose_scales
from edgemoe.convert.prune import PrunedCalibration, PrunedModel
from edgemoe.convert.ranks import check_rank, choose_ranks, same_ranks
from edgemoe.convert.source import SourceModel
from edgemoe.convert.text import check_text
from edgemoe.file.writer import Writer
from edgemoe.quant import SCHEMES, Allocation, Calibration, Scheme
from edgemoe.quant.columns import COLUMN_SCALES

__all__ = [
    "Arrivals",
    "Progress",
    "convert",
    "expert_of",
    "opened_model",
    "read_ahead",
    "read_record",
    "records",
]

Progress = Callable[[int, int], None]
"""A callback that receives how much is done and the total, in bytes unless said otherwise."""

Arrivals = Callable[[SourceModel, Writer, Sequence[str]], Iterator[str]]
"""A generator for weights that are still arriving. It gets the names of the records that are not written yet, and
yields each name once its weights can be read. When it is asked for the next name, the writer has the last record."""

_LONGEST = 1000  # characters of a config value that is kept as provenance
_WHOLE = 1000  # steps in which the reading of a calibration is reported
_READINGS = 3  # to check it, for column scales, for the directions of corrections
_PROVENANCE = ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version")


def convert(
    source: Checkpoint,
    out: str | os.PathLike[str],
    *,
    bits: int | None = None,
    scheme: Scheme = SCHEMES["nested"],
    calibration: Calibration | None = None,
    allocation: Allocation | None = None,
    favour: int | None = None,
    down_bits: Sequence[int] | None = None,
    correction: int | None = None,
    scale_columns: bool = True,
    prune: float | None = None,
    progress: Progress | None = None,
    reading: Progress | None = None,
    say: Callable[[str], None] | None = None,
    arrivals: Arrivals | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Converts `source` to `out`, which appears under its name only when it is complete.

    An interrupted conversion leaves `out` with `.part` appended, and the next one continues there.
    An existing `out` is replaced.

    Args:
        source: the checkpoint; read one expert or one resident tensor at a time.
        out: the `.moe` file to make.
        bits: the highest level stored, from one of the scheme's ladders; None for the whole first ladder.
        scheme: how weights are encoded, as for `Writer`.
        calibration: a calibration of this model, made by `edgemoe calibrate`; without one all inputs count alike.
        allocation: an allocation for this model, found by `edgemoe allocate`: how many bits of each expert to store.
        favour: bits of the level whose error matters most. None weighs all levels alike; but with an allocation, it
            favours the highest level stored of each expert.
        down_bits: bits of the experts' w_down at each level; None for those of w_gate and w_up.
        correction: rank of the low-rank corrections at 2, 3 and 4 bits, 0 for none; None chooses those worth their
            bytes. Corrections take a calibration with input products.
        scale_columns: scale down strong columns of norm outputs, and scale up the matrices that take them, wherever
            this lowers the quantisation error. Needs a calibration with input products; otherwise ignored.
        prune: share of each expert's neurons to leave out, see `edgemoe.convert.prune`; takes a calibration.
        progress: called after every tensor and expert with the bytes written and the total.
        reading: called with how far the calibration has been read, in steps, and the number of steps. It is read before
            the first weights are written: to check it, for the column scales, and for the directions of corrections.
        say: called with a line for each part of the checkpoint that is not used.
        arrivals: waits for weights that are still arriving; None if all can be read now.
        origin: JSON values that identify the checkpoint, such as its source and the hashes of its files. They are
            kept in the file. They also replace the fingerprint of file names, times and some weights by which an
            interrupted conversion recognises its checkpoint. None to use that fingerprint.

    Raises:
        FormatError: the checkpoint is broken or not supported; or the calibration or allocation is for another
            model, or the allocation exceeds `bits`.
        ValueError: `bits` or `favour` is not a level, `down_bits` do not ascend, `correction` is impossible, or
            `prune` comes without a calibration or with an allocation.
        OSError: the disk is too small, or reading or writing failed.
    """
    out = path_of("out", out)
    bits, favour, correction = (
        None if value is None else whole(name, value)
        for name, value in (("bits", bits), ("favour", favour), ("correction", correction))
    )
    down_bits = None if down_bits is None else wholes("down_bits", down_bits, 0)
    codes = _Codes(scheme, bits, calibration, allocation, favour, down_bits, prune)
    codes.check(correction)
    model, calibration = opened_model(source, prune, calibration, are_there=arrivals is None)
    codes = replace(codes, calibration=calibration)
    _check(source, model, calibration, reading, say or (lambda text: None))
    added = sections(source)
    model, codes, scales = _fitted(model, codes, correction, reading, scale_columns=scale_columns)
    provenance = _provenance(model, source, origin, codes)
    with codes.writer(out, model, {**added, **scales}, provenance, _part(reading, 2)) as writer:
        if reading is not None and calibration is not None:
            reading(_WHOLE, _WHOLE)
        _write(writer, model, arrivals, progress or (lambda done, total: None))


@dataclass(frozen=True, slots=True)
class _Codes:
    """How weights are encoded; see `convert`."""

    scheme: Scheme
    bits: int | None
    calibration: Calibration | None
    allocation: Allocation | None
    favour: int | None
    down_bits: tuple[int, ...] | None
    prune: float | None

    def check(self, correction: int | None) -> None:
        """Raises the errors that can be found before the slow work starts."""
        self.scheme.favoured(self.bits, self.favour)
        if correction is not None:
            check_rank(correction, self.scheme, self.calibration)
        if self.prune is not None and self.allocation is not None:
            raise ValueError("prune: takes no allocation, which is of whole experts")

    def writer(
        self,
        out: Path,
        model: SourceModel,
        added: Mapping[str, bytes],
        provenance: dict[str, Any],
        reading: Progress | None,
    ) -> Writer:
        """Returns a writer for the file. Opening it reads the calibration for the directions of corrections."""
        return Writer(
            out, model.config, bits=self.bits, scheme=self.scheme, sections=added, source=provenance,
            calibration=self.calibration, allocation=self.allocation, favour=self.favour,
            down_bits=self.down_bits, reading=reading,
        )  # fmt: skip


def _check(
    source: Checkpoint,
    model: SourceModel,
    calibration: Calibration | None,
    reading: Progress | None,
    say: Callable[[str], None],
) -> None:
    """Checks the tokenizer files and the calibration, and passes notes on them and the model to `say`."""
    for line in model.notes:
        say(line)
    check_text(source, model.config.vocab_size)
    if calibration is not None:
        calibration.check(model.config)
        calibration.verify(_part(reading, 0))
        if calibration.note:
            say(calibration.note)


def _fitted(
    model: SourceModel,
    codes: _Codes,
    correction: int | None,
    reading: Progress | None,
    *,
    scale_columns: bool,
) -> tuple[SourceModel, _Codes, dict[str, bytes]]:
    """Returns the model and its codes with column scales and corrections fitted to the calibration, and the section
    that holds the scales; all unchanged without input products or in a scheme other than nested."""
    calibration, scheme = codes.calibration, codes.scheme
    added: dict[str, bytes] = {}
    if calibration is None or not calibration.is_full or scheme.name != "nested":
        return model, codes, added
    if scale_columns:
        favour = scheme.favoured(codes.bits, codes.favour)
        scales = choose_scales(
            model, calibration, bits=codes.bits, favour=favour, progress=_part(reading, 1)
        )
        model, calibration = ScaledModel(model, scales), calibration.with_scales(scales)
        added[COLUMN_SCALES] = scales.section()
    if not scheme.correction:
        found = (
            choose_ranks(
                model,
                calibration,
                bits=codes.bits,
                allocation=codes.allocation,
                favour=codes.favour,
            )
            if correction is None
            else same_ranks(model.config, calibration, correction)
        )
        scheme = replace(scheme, correction=found)
    return model, replace(codes, calibration=calibration, scheme=scheme), added


def _part(reading: Progress | None, index: int) -> Progress | None:
    """Returns a callback that maps the progress of one of the readings of a calibration to that of all."""
    if reading is None:
        return None
    return lambda done, total: reading(
        (index * total + done) * _WHOLE // (_READINGS * total), _WHOLE
    )


def opened_model(
    source: Checkpoint, prune: float | None, calibration: Calibration | None, *, are_there: bool
) -> tuple[SourceModel, Calibration | None]:
    """Returns the model of a checkpoint and its calibration, both pruned if `prune` is given.

    Raises:
        ValueError: `prune` comes without a calibration, or is not a share that can be left out.
    """
    if prune is None:
        return SourceModel(source, are_there=are_there), calibration
    if calibration is None:
        raise ValueError("prune: takes a calibration; edgemoe calibrate makes it")
    model = PrunedModel(source, number("prune", prune, 0, 1), calibration, are_there=are_there)
    return model, PrunedCalibration(calibration, model)


def _provenance(
    model: SourceModel,
    source: Checkpoint,
    origin: Mapping[str, Any] | None,
    codes: _Codes,
) -> dict[str, Any]:
    """Returns the index's `source`: where the weights come from, and what their codes depend on."""
    out: dict[str, Any] = {
        "name": source.name,
        "family": model.config.family,
        "config": {key: source.config[key] for key in _PROVENANCE if _is_short(source.config, key)},
        "fingerprint": _fingerprint(model, source.identity) if origin is None else _sum(origin),
    }
    if origin is not None:
        out["origin"] = dict(origin)
    if codes.calibration is not None:
        out["calibration"] = {**codes.calibration.meta, "checksum": codes.calibration.digest()}
    if codes.allocation is not None:
        out["allocation"] = {"method": codes.allocation.method, **codes.allocation.settings}
    if codes.favour is not None:
        out["favour"] = codes.favour
    if codes.prune is not None:
        out["pruned"] = codes.prune
    if codes.scheme.is_thorough:
        out["thorough"] = True
    return out


def _write(
    writer: Writer, model: SourceModel, arrivals: Arrivals | None, progress: Progress
) -> None:
    """Writes the records that the partial file lacks, and completes the file."""
    progress(writer.written_bytes, writer.total_bytes)
    missing = [name for name in records(model) if not writer.is_done(name)]
    ready = (
        read_ahead(model, missing)
        if arrivals is None
        else (
            (name, partial(read_record, model, name)) for name in arrivals(model, writer, missing)
        )
    )
    for name, read in ready:
        if (expert := expert_of(name)) is not None:
            writer.add_expert(*expert, *read())
        else:
            writer.add(name, *read())
        progress(writer.written_bytes, writer.total_bytes)
    writer.finish()
    progress(writer.total_bytes, writer.total_bytes)


def records(model: SourceModel) -> Iterator[str]:
    """Yields the names of all records of a model's file, in file order."""
    config = model.config
    yield from dense_tensors(config)
    for layer in config.moe_layers:
        yield from (f"experts.{layer}.{index}" for index in range(config.num_experts))


def expert_of(name: str) -> tuple[int, int] | None:
    """Returns the layer and index of an expert's record; None for any other record."""
    kind, *place = name.split(".")
    return (int(place[0]), int(place[1])) if kind == "experts" else None


def read_record(model: SourceModel, name: str) -> tuple[NDArray[np.float32], ...]:
    """Returns the three matrices of an expert, or the one tensor of any other record."""
    expert = expert_of(name)
    return (model.tensor(name),) if expert is None else model.expert(*expert)


def read_ahead(
    model: SourceModel, names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], tuple[NDArray[np.float32], ...]]]]:
    """Yields names of records and functions that return their values.

    Each expert is read while the one before it is quantised. Other records are not read ahead, as two embeddings in
    float32 may not fit in memory.
    """
    with ThreadPoolExecutor(1, "read") as reader:
        coming = None
        for name, after in pairwise([*names, ""]):
            if expert_of(name) is None:
                yield name, partial(read_record, model, name)
                continue
            this = coming or reader.submit(read_record, model, name)
            coming = None if expert_of(after) is None else reader.submit(read_record, model, after)
            yield name, this.result


def _is_short(config: Mapping[str, Any], key: str) -> bool:
    """Returns whether a key exists, with a value no longer than real ones are."""
    return key in config and len(json.dumps(config[key])) <= _LONGEST


def _sum(origin: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(origin), sort_keys=True).encode()).hexdigest()


def _fingerprint(model: SourceModel, identity: str) -> str:
    """Hashes the identity of the files and a sample of the weights: the last layer with experts, and its last expert.

    Without it, a conversion could be continued with the weights of another fine-tune of the same model.
    """
    config = model.config
    layer = config.moe_layers[-1]
    digest = hashlib.sha256(identity.encode())
    for name in dense_tensors(config):
        if name == "norm" or name.startswith(("rope", f"layers.{layer}.")):
            digest.update(model.tensor(name).data)
    for values in model.expert(layer, config.num_experts - 1):
        digest.update(values.data)
    return digest.hexdigest()
