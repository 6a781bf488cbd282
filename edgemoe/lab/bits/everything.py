"""A search for the bits of every part of a model within one budget of bytes; `edgemoe.lab.bits.search` explains how."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits import rules
from edgemoe.lab.bits.measuring import Clock, Measured, Progress, Work, measure_alone
from edgemoe.lab.bits.search import Field, Rounds, Standing, evolve
from edgemoe.lab.bits.search_file import SearchFile
from edgemoe.lab.bits.units import Choice, Units
from edgemoe.lab.quality.loss import standard_error
from edgemoe.lab.quality.mixed_loss import MixedLoss
from edgemoe.model import KvTable
from edgemoe.quant import Allocation, Calibration

__all__ = ["Found", "search_everything"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search: the choice, and its cost."""

    allocation: Allocation
    """The bits of experts and of all other matrices."""
    table: KvTable | None
    """The types of keys and values; None if the model has none."""
    bytes: int
    """What the choice takes."""
    start_loss: float
    """The loss where the search began: mean KL divergence, in nats, from the highest level with float16 keys and
    values."""
    loss: float
    """The loss of the choice, on the text that was searched on."""
    held_out: tuple[float, float, float] | None
    """On another text: the loss where the search began, the loss of the choice, and the standard error of the
    difference over pairs of the same tokens (`standard_error`). None without such a text, or if Ctrl-C came before."""
    kept: int
    """How many generations were better than the best before them."""
    generation: int
    """How many generations were done; fewer than asked for if the time was over or Ctrl-C came."""
    is_interrupted: bool
    """Whether Ctrl-C came."""


def search_everything(
    path: str | os.PathLike[str],
    calibration: Calibration,
    windows: NDArray[np.int32],
    total: int,
    keep: Path,
    *,
    context: int,
    rounds: Rounds,
    held_out: NDArray[np.int32] | None = None,
    protect: bool = True,
    is_new: bool = False,
    seconds: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Found:
    """Searches for the bits of all experts and matrices and the types of keys and values, in at most `total` bytes.

    Results so far are kept in the file `keep`, and the same call goes on from there. Once there is a choice, Ctrl-C
    returns the best so far.

    Args:
        path: a `.moe` file.
        calibration: of this model, with the errors of its levels.
        windows: int32 [N, T], tokens to measure on; N is at least the windows of the last stage of `rounds`.
        total: the most bytes that experts, resident matrices, and keys and values may take together.
        keep: the file for results so far.
        context: for how many tokens keys and values count.
        rounds: how much is tried.
        held_out: int32 [M, T], other tokens, on which only the result is measured.
        protect: Super Experts have the most bits that the file has of them.
        is_new: begin anew, whatever is in `keep`.
        seconds: no round of measurements begins that would end later than this if it took as long as the one before;
            None for no limit. Held-out text is measured after that.
        progress: called with the work done and all the work, in windows that go through a layer.
        options: of `MixedLoss`: ram, threads.

    Raises:
        ValueError: the bytes do not suffice, there are too few windows, or the calibration lacks errors.
        TimeIsOver: `seconds` were over before there was a choice. What was measured is in `keep`.
        FormatError: the model, its calibration or `keep` is damaged, or they do not belong together.
    """
    moe = open_moe(path)
    calibration.check(moe.config)
    units, last = Units(moe, context=context), rounds.windows[-1]
    errors, spared = _errors(calibration, units), _super_experts(calibration) if protect else []
    lowest = _lowest(units, spared)
    _check(len(windows), last, units.bytes(lowest), total)
    identity = {"bytes": total, "context": context, "protected": len(spared)}
    identity |= _identity(moe, rounds, windows, errors)
    saved = SearchFile(keep, identity, is_new=is_new)
    steps, clock, depth = _steps(units, lowest), Clock(seconds), moe.config.num_layers
    efforts = {name: rounds.alone * (depth - units.first_layer(of)) for name, of in steps.items()}
    judges, each = 0 if held_out is None else len(held_out), depth * rounds.measured
    effort = sum(efforts.values()) + depth * (last + 3 * judges) + rounds.generations * each
    work = Work(effort, progress)
    with MixedLoss(path, windows[:last], most=judges, told=work.count, **options) as loss:
        measured = Measured(loss, units)
        measure_alone(steps, efforts, saved, measured, rounds.alone, work, clock)
        costs = _costs(saved.costs, units, errors)
        field = Field(cost=costs, sizes=units.sizes, lowest=lowest, highest=units.top, total=total)
        first = field.least_sum()
        work.begin(depth * last)
        if (state := saved.standing(units.top)) is None:
            saved.begin(state := Standing(0, first, measured([first], last)[0]))
        work.begin(state.generation * each)
        judged, is_interrupted = None, False
        try:
            _evolve(state, measured, field, rounds, saved, clock, partial(work.begin, each))
            judged = _judged(loss, held_out, units, first, state.parent)
            work.begin(0)
        except KeyboardInterrupt:
            is_interrupted, state = True, saved.standing(units.top) or state
    settings = {"bytes": total, "context": context, "seed": rounds.seed, "loss": state.loss}
    allocation, table = _files(units, state.parent, settings, spared)
    return Found(
        allocation=allocation, table=table, bytes=units.bytes(state.parent),
        start_loss=saved.start_loss, loss=state.loss, held_out=judged, kept=state.kept,
        generation=state.generation, is_interrupted=is_interrupted,
    )  # fmt: skip


def _check(windows: int, wanted: int, least: int, total: int) -> None:
    if windows < wanted:
        raise ValueError(f"the text has {windows} windows; expected {wanted}")
    if least > total:
        raise ValueError(
            f"bytes: expected at least {least}, which the fewest bits take, got {total}"
        )


def _evolve(
    state: Standing,
    measured: Measured,
    field: Field,
    rounds: Rounds,
    saved: SearchFile,
    clock: Clock,
    begin: Callable[[], object],
) -> None:
    """Runs the generations, and saves the state after each."""

    def after(state: Standing) -> None:
        saved.write(state)
        measured.forget()
        clock.lap()
        begin()

    clock.lap(is_first=True)
    begin()
    evolve(state, measured, field, rounds, done=after, is_over=clock.is_over)


def _identity(
    moe: MoeFile, rounds: Rounds, windows: NDArray[np.int32], errors: Floats
) -> dict[str, Any]:
    """Returns the model and what determines what a search measures, as JSON values: not the number of generations."""
    settings = json.loads(json.dumps(asdict(rounds) | {"generations": None}))
    tokens = windows[: rounds.windows[-1]]
    return {
        **KvTable.identity(moe), "weights": _weights(moe), "rounds": settings,
        "tokens": zlib.crc32(tokens.tobytes()), "errors": zlib.crc32(errors.tobytes()),
    }  # fmt: skip


def _weights(moe: MoeFile) -> int:
    """Returns a checksum of the codes, which differ if a checkpoint is converted anew; the fingerprint does not."""
    dense = repr([tensor.crcs for tensor in moe.tensors.values()])
    return zlib.crc32(moe.experts.crcs.tobytes(), zlib.crc32(dense.encode()))


def _lowest(units: Units, spared: list[tuple[int, int]]) -> Choice:
    """Returns the lowest levels that units may have: for spared experts, their highest."""
    lowest = np.zeros(len(units), np.int64)
    for layer, expert in spared:
        unit = layer * units.moe.config.num_experts + expert
        lowest[unit] = units.top[unit]
    return lowest


def _files(
    units: Units, choice: Choice, settings: dict[str, Any], spared: list[tuple[int, int]]
) -> tuple[Allocation, KvTable | None]:
    """Returns a choice as an allocation and a table of key and value types."""
    moe = units.moe
    layers = moe.config.moe_layers
    allocation = Allocation(
        method="search", settings=settings, layers=layers, bits=units.expert_bits(choice),
        protected=tuple((layers[i], e) for i, e in spared), dense=units.dense_bits(choice),
    )  # fmt: skip
    if not units.cells:
        return allocation, None
    rows = units.kv_rows(choice)
    return allocation, KvTable(of=KvTable.identity(moe), layers=rows, settings=settings)


def _judged(
    loss: MixedLoss,
    held_out: NDArray[np.int32] | None,
    units: Units,
    first: Choice,
    found: Choice,
) -> tuple[float, float, float] | None:
    """Returns the losses of two choices on a held-out text, and the standard error of the difference."""
    if held_out is None:
        return None
    loss.take(held_out)
    before, now = (of.reshape(-1) for of in loss([units.mix(first), units.mix(found)]))
    return float(before.mean()), float(now.mean()), standard_error(now - before, len(loss.windows))


def _known(calibration: Calibration, what: str) -> Floats:
    """Returns a calibration's statistic of all layers, [L, E, …]."""
    return np.stack([calibration.layer(i, what) for i in calibration.layers]).astype(np.float64)


def _super_experts(calibration: Calibration) -> list[tuple[int, int]]:
    if not calibration.has("output_max"):
        return []
    return rules.super_experts(_known(calibration, "output_max"))


def _errors(calibration: Calibration, units: Units) -> Floats:
    """Returns the squared error of each expert at each of the file's levels, [L, E, B]."""
    ladder = [rung[0] for rung in units.moe.ladder]
    missing = [bits for bits in ladder if bits not in calibration.bits]
    if missing:
        raise ValueError(
            f"calibration: has no errors at {missing[0]} bits; edgemoe calibrate measures them"
        )
    return _known(calibration, "error2")[:, :, [calibration.bits.index(bits) for bits in ladder]]


def _steps(units: Units, lowest: Choice) -> dict[str, Choice]:
    """Returns the choices that are measured before the search, by name.

    In each, either all experts of one layer, or one matrix, or one layer's keys or values are at one of their lower
    levels; everything else is at its highest.
    """
    out, E = {}, units.moe.config.num_experts
    for layer in range(units.num_experts // E):
        of = slice(layer * E, (layer + 1) * E)
        for level in range(len(units.moe.ladder) - 1):
            choice = units.top
            choice[of] = np.clip(level, lowest[of], choice[of])
            out[f"layer {layer}, {level}"] = choice
    for unit in range(units.num_experts, len(units)):
        for level in range(units.counts[unit] - 1):
            choice = units.top
            choice[unit] = level
            out[f"{unit}, {level}"] = choice
    # In order of the first layer that differs: choices that differ late have most in common.
    return dict(sorted(out.items(), key=lambda step: units.first_layer(step[1])))


def _costs(losses: Mapping[str, float], units: Units, errors: Floats) -> Floats:
    """Returns the cost of each level of each unit, [U, B], as if losses added up.

    An expert's share of its layer's loss at a level is its share of the layer's squared error.
    """
    cost = np.zeros(units.sizes.shape)
    L, E, B = errors.shape
    for layer in range(L):
        for level in range(B - 1):
            total = errors[layer, :, level].sum()
            scale = losses[f"layer {layer}, {level}"] / total if total > 0 else 0.0
            cost[layer * E : (layer + 1) * E, level] = scale * errors[layer, :, level]
    for unit in range(units.num_experts, len(units)):
        for level in range(units.counts[unit] - 1):
            cost[unit, level] = losses[f"{unit}, {level}"]
    return cost
