"""Makes an adapter from a fine-tune: the converted records that are not bit-identical to those of the base's file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.arguments import path_of, switch
from edgemoe.convert.checkpoint import Checkpoint, sections
from edgemoe.convert.columns import ScaledModel
from edgemoe.convert.convert import (
    Progress,
    expert_of,
    opened_model,
    read_ahead,
    read_record,
    records,
)
from edgemoe.convert.patched import PatchedCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError, quoted, shortened
from edgemoe.file.adapter import differing_field, turning_tensors
from edgemoe.file.adapter_writer import adapter_writer
from edgemoe.file.coder import Coder, sums_of
from edgemoe.file.columns import column_scales
from edgemoe.file.format import MoeFile
from edgemoe.file.layout import Layout
from edgemoe.quant import SCHEMES, Calibration

__all__ = ["Differences", "convert_adapter"]

Arrays = tuple[NDArray[np.float32], ...]

_UNUSED = ("config.json", "LICENSE")
"""Files whose differences are not reported. What config.json means for the model is compared separately."""
_SAMPLED = 4  # experts that are converted to verify `original`
_LONGEST = 100  # characters of a value in an error


@dataclass(frozen=True, slots=True)
class Differences:
    """How much of a model an adapter replaces."""

    experts: int
    of_experts: int
    tensors: int
    """Tensors outside the experts."""
    of_tensors: int

    def __str__(self) -> str:
        return (
            f"{self.experts} of {self.of_experts} experts and {self.tensors} of {self.of_tensors} other tensors "
            "differ from the base's"
        )


def convert_adapter(
    source: Checkpoint,
    out: str | os.PathLike[str],
    base: MoeFile,
    *,
    original: Checkpoint | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Differences:
    """Writes the records in which `source` differs from `base` to `out`, which appears only when it is complete.

    Every record is made with the settings that the base was made with. So the base with the adapter equals a conversion
    of `source` with these settings.

    Args:
        source: the fine-tune; read one expert or one resident tensor at a time.
        out: the `.moea` file to make.
        base: the model's file, with its sections.
        original: the checkpoint that the base was converted from. It saves time: records that are equal in both
            checkpoints are not converted. If `source` is a `PatchedCheckpoint`, it must be a patch of this one.
        calibration: the calibration that the base was made with; None if there was none.
        progress: called after every tensor and expert.
        say: called with a line for each part of the checkpoint that is not used.

    Raises:
        FormatError: a checkpoint is broken or of another architecture; the base was made with other settings or by
            another version; or nothing differs.
        OSError: reading or writing failed.
    """
    out = path_of("out", out)
    say, progress = say or (lambda text: None), progress or (lambda done, total: None)
    _check_calibration(base, calibration)
    model, fitted = _opened(source, base, calibration)
    _check_config(source, model, base)
    for line in (*model.notes, *_text_notes(source, base)):
        say(line)
    if fitted is not None:
        fitted.check(model.config)
        fitted.verify()
    coder, made = _coder(base, fitted), _Made.of(base)
    is_same = _comparison(source, model, original, base, calibration, coder, made)
    total, done = sum(made.sizes.values()), 0
    config, every = model.config, list(records(model))
    provenance = {"name": source.name, "family": config.family}
    with adapter_writer(Path(out), base, config, provenance) as writer:
        names = []
        for name in every:
            if is_same(name):
                done += made.sizes[name]
                progress(done, total)
            else:
                names.append(name)
        for name, read in read_ahead(model, names):
            rungs = _coded(coder, name, read())
            if sums_of(rungs) != made.sums[name]:
                if name in turning_tensors(config):
                    raise FormatError(
                        f"{source.name}: turns positions otherwise than {base.path}, which no adapter can"
                    )
                writer.add(name, rungs)
            done += made.sizes[name]
            progress(done, total)
        experts, tensors = writer.counts
    of_experts = len(config.moe_layers) * config.num_experts
    return Differences(experts, of_experts, tensors, len(every) - of_experts)


@dataclass(frozen=True, slots=True)
class _Made:
    """The sizes in bytes and the rung checksums of a file's records, by name."""

    sizes: dict[str, int]
    sums: dict[str, list[int]]

    @classmethod
    def of(cls, base: MoeFile) -> _Made:
        sums = {name: list(t.crcs) for name, t in base.tensors.items()}
        sizes = {name: sum(t.lengths) for name, t in base.tensors.items()}
        table, every = base.experts, base.experts.sizes(len(base.ladder)).tolist()
        for row, size in enumerate(every):
            name = "experts.{}.{}".format(*base.expert_at(row))
            sizes[name], sums[name] = size, table.crcs[row, : table.rungs[row]].tolist()
        return cls(sizes, sums)


def _opened(
    source: Checkpoint, base: MoeFile, calibration: Calibration | None
) -> tuple[SourceModel, Calibration | None]:
    """Returns a checkpoint's model, pruned and column-scaled as the base was, and the calibration to match."""
    with _source_of(base):
        model, fitted = opened_model(source, base.source.get("pruned"), calibration, are_there=True)
    scales = column_scales(base)
    if scales is None:
        return model, fitted
    return ScaledModel(model, scales), None if fitted is None else fitted.with_scales(scales)


def _coded(coder: Coder, name: str, values: Arrays) -> list[NDArray[np.uint8]]:
    expert = expert_of(name)
    return coder.tensor(name, *values) if expert is None else coder.expert(*expert, *values)


def _coder(base: MoeFile, calibration: Calibration | None) -> Coder:
    """Returns a coder that encodes records as those of the base were encoded."""
    source, scheme = base.source, SCHEMES[base.scheme.name]
    favour = source.get("favour")
    if favour is not None and (favour not in base.dense_ladder or not scheme.can_favour):
        raise FormatError(
            f"{base.path}: favours {quoted(favour)} bits, which "
            + ("are not among its levels" if scheme.can_favour else f"{scheme.name} cannot")
        )
    with _source_of(base):
        if switch("thorough", source.get("thorough", False)):
            scheme = scheme.thorough()
    if calibration is not None and calibration.is_full:
        scheme = scheme.fitted()
    scheme = replace(scheme, correction=base.scheme.correction)
    layout = Layout(
        base.config, scheme, base.dense_ladder, base.ladder, tuple(base.experts.rungs.tolist())
    )
    if base.scheme.correction and (calibration is None or not calibration.is_full):
        raise _made_otherwise(base)
    coder = Coder(
        layout, scheme, calibration=calibration,
        favoured=None if favour is None else base.dense_ladder.index(favour) + 1,
        favours_own="allocation" in source and favour is None and scheme.can_favour,
    )  # fmt: skip
    sizes = _Made.of(base).sizes
    if any(sum(place.sizes) != sizes[name] for name, place in layout.places.items()):
        raise _made_otherwise(base)
    if coder.basis != base.sections.get("basis", b""):
        raise _made_otherwise(base)
    return coder


@contextlib.contextmanager
def _source_of(base: MoeFile) -> Iterator[None]:
    """Makes an error about a setting that the base says it was made with name the base."""
    try:
        yield
    except FormatError:  # about a checkpoint or the calibration
        raise
    except ValueError as error:
        raise FormatError(f"{base.path}: its source says {error}") from None


def _made_otherwise(base: MoeFile) -> FormatError:
    return FormatError(
        f"{base.path}: was not made as this edgemoe makes files; convert its checkpoint again"
    )


def _comparison(
    source: Checkpoint,
    model: SourceModel,
    original: Checkpoint | None,
    base: MoeFile,
    calibration: Calibration | None,
    coder: Coder,
    made: _Made,
) -> Callable[[str], bool]:
    """Returns a function that says whether a record equals the base's, without converting it.

    Raises:
        FormatError: the base was not made from `original`.
    """
    if original is None:
        return lambda name: False
    before, _ = _opened(original, base, calibration)
    found = differing_field(before.config, base.config)
    if found is not None:
        raise FormatError(f"{original.name}: is not what {base.path} was made of: {_words(found)}")
    for name in _samples(made):
        rungs = _coded(coder, name, read_record(before, name))
        if sums_of(rungs) != made.sums[name]:
            raise FormatError(
                f"{original.name}: is not what {base.path} was made of, or not by this edgemoe: {name} differs"
            )

    def is_same(name: str) -> bool:
        if isinstance(source, PatchedCheckpoint):
            return source.patches.keys().isdisjoint(model.needs(name))
        theirs = read_record(before, name)
        return all(map(np.array_equal, read_record(model, name), theirs))

    return is_same


def _samples(made: _Made) -> list[str]:
    """Returns a sample of records that reveals a wrong checkpoint: a few experts spread over all, the last dense
    matrix, and all tensors that are not quantised."""
    experts = [name for name in made.sums if expert_of(name) is not None]
    matrices = [n for n, sums in made.sums.items() if len(sums) > 1 and expert_of(n) is None]
    plain = [n for n, sums in made.sums.items() if len(sums) == 1 and expert_of(n) is None]
    return [*experts[len(experts) - 1 :: -max(1, len(experts) // _SAMPLED)], *matrices[-1:], *plain]


def _check_calibration(base: MoeFile, calibration: Calibration | None) -> None:
    """Raises FormatError unless the calibration is the one that the base was made with, or both are absent."""
    said = base.source.get("calibration")
    wanted = said.get("checksum") if isinstance(said, dict) else None
    if calibration is None and said is not None:
        raise FormatError(
            f"{base.path}: was made with a calibration; --calibration takes the same one"
        )
    if calibration is not None and (said is None or calibration.digest() != wanted):
        what = "without a calibration" if said is None else "with another one"
        raise FormatError(f"{calibration.path}: {base.path} was made {what}")


def _check_config(source: Checkpoint, model: SourceModel, base: MoeFile) -> None:
    found = differing_field(model.config, base.config)
    if found is not None:
        raise FormatError(
            f"{source.name}: is not of the architecture of {base.path}: {_words(found)}"
        )


def _words(found: tuple[str, Any, Any]) -> str:
    name, mine, theirs = found
    return f"{name} is {shortened(str(mine), _LONGEST)}, the base's is {shortened(str(theirs), _LONGEST)}"


def _text_notes(source: Checkpoint, base: MoeFile) -> Iterator[str]:
    """Yields a line on the fine-tune's files that are not used, if any: an adapter holds only weights."""
    mine = sections(source)
    other = [n for n, data in mine.items() if n not in _UNUSED and base.sections.get(n) != data]
    if other:
        yield f"the base's {', '.join(sorted(other))} will be used, from which its own differ"
