"""The offline choice of bits for each routed expert, by rules from papers applied to a calibration or to measured loss.

error       least sum, over all layers at once, of the squared change of a layer's output by each expert's level
pmq         MC-MoE's integer programme, with cost phi^a * w^b * eps^c, solved exactly
expertwise  EdgeMoE's search: measures each expert's loss at the low level, then lowers as many experts as allowed
frequency   QuantMoE-Bench: experts that are often chosen get the higher level
first-blocks, outlier    its other rules: early layers, or matrices with outliers, get the higher level
random      a control
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.format import MoeFile
from edgemoe.file.reader import open_moe
from edgemoe.lab.bits import rules
from edgemoe.lab.quality.loss import Loss
from edgemoe.quant import Allocation, Calibration
from edgemoe.store import ExpertStore, expert_bytes

__all__ = ["METHODS", "Settings", "allocate"]

Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of an allocation."""

    average_bits: float | None = None
    """The most bits of an expert on average; all methods need it, except expertwise with `max_loss`."""
    max_loss: float | None = None
    """Only for expertwise, in place of `average_bits`: the most mean KL divergence from the file's highest level, in
    nats."""
    levels: tuple[int, ...] | None = None
    """Bits to choose from, ascending; None for the method's own default (see `allocate`)."""
    exponents: tuple[float, float, float] = (1, 1, 2)
    """For pmq: the exponents of frequency, gate and error."""
    per_layer: bool = False
    """Every layer gets the same average, as published for pmq; otherwise the model as a whole."""
    protect: bool = True
    """Super Experts get the highest of `levels`, within the same average."""
    seed: int = 0
    """For random."""


def allocate(
    path: str | os.PathLike[str],
    method: str,
    settings: Settings,
    *,
    calibration: Calibration | None = None,
    windows: NDArray[np.int32] | None = None,
    progress: Progress | None = None,
) -> Allocation:
    """Returns bits for every routed expert of a model.

    By default the levels are all of the file's for error, its lowest three for pmq, as published, and the two next to
    the average for the others; for expertwise these are among 2, 4 and 8, as published.

    Args:
        path: a `.moe` file.
        method: a name in METHODS.
        calibration: of this model; error, pmq and frequency need it, and so does finding Super Experts.
        windows: int32 [N, T], tokens on which expertwise measures loss.
        progress: called with the number of experts measured and of all experts.

    Raises:
        ValueError: a setting is wrong, or something that the method needs is missing.
        FormatError: the model or the calibration is damaged, or they do not belong together.
    """
    moe = open_moe(path)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method}")
    model = _Model(moe, settings, calibration, windows, progress)
    levels, choice = METHODS[method](model)
    bits = np.array(levels, np.int8)[choice]
    used: dict[str, Any] = {"levels": list(levels), "per_layer": settings.per_layer}
    if settings.average_bits is not None:
        used["average_bits"] = settings.average_bits
    if method == "pmq":
        used["exponents"] = list(settings.exponents)
    if method == "random":
        used["seed"] = settings.seed
    if settings.max_loss is not None:
        used["max_loss"] = settings.max_loss
    layers = moe.config.moe_layers
    lacking = np.argwhere(bits > moe.expert_bits)
    if len(lacking):
        i, e = lacking[0].tolist()
        raise ValueError(
            f"{method}: wants {bits[i, e]} bits of expert {e} of layer {layers[i]}, of which the file has "
            f"{moe.expert_bits[i, e]}; allocate on a file that has all bits of all experts"
        )
    protected = tuple((layers[i], e) for i, e in model.protected)
    return Allocation(method=method, settings=used, layers=layers, bits=bits, protected=protected)


class _Model:
    """The model, calibration and settings as the methods need them; raises a ValueError for what is missing."""

    def __init__(
        self,
        moe: MoeFile,
        settings: Settings,
        calibration: Calibration | None,
        windows: NDArray[np.int32] | None,
        progress: Progress | None,
    ) -> None:
        self.moe, self.settings, self.windows, self.progress = moe, settings, windows, progress
        self.shape = (len(moe.config.moe_layers), moe.config.num_experts)
        self._calibration = calibration
        if calibration is not None:
            calibration.check(moe.config)
        self.protected: list[tuple[int, int]] = []
        if settings.protect and calibration is not None and calibration.has("output_max"):
            self.protected = rules.super_experts(self.known("output_max"))

    @property
    def average(self) -> float:
        if self.settings.average_bits is None:
            raise ValueError("average bits: missing")
        if not 1 <= self.settings.average_bits < math.inf:
            raise ValueError(
                f"average bits: expected at least 1, got {self.settings.average_bits:g}"
            )
        return self.settings.average_bits

    def known(self, what: str) -> Floats:
        """Returns a statistic of the calibration, [L, E, …]."""
        if self._calibration is None:
            raise ValueError("calibration: this method needs one; edgemoe calibrate makes it")
        return np.stack(
            [self._calibration.layer(i, what) for i in self._calibration.layers]
        ).astype(np.float64)

    def errors(self, what: str, levels: Sequence[int]) -> Floats:
        """Returns the calibration's errors at some levels, [L, E, B]."""
        table = self.known(what)
        assert self._calibration is not None
        have = self._calibration.bits
        missing = sorted(set(levels) - set(have))
        if missing:
            raise ValueError(
                f"calibration: has no errors at {missing[0]} bits; edgemoe calibrate measures them"
            )
        return table[:, :, [have.index(b) for b in levels]]

    def levels(self, default: Sequence[int], *, count: int | None = None) -> tuple[int, ...]:
        """Returns the levels to choose from: those of the settings, or the default; `count` of them if given."""
        have = tuple(rung[0] for rung in self.moe.ladder)
        levels = tuple(default) if self.settings.levels is None else self.settings.levels
        if list(levels) != sorted(set(levels)) or not set(levels) <= set(have):
            raise ValueError(
                f"levels: expected some of {', '.join(map(str, have))}, ascending, got {levels}"
            )
        if count is not None and len(levels) != count:
            raise ValueError(f"levels: expected {count}, got {len(levels)}")
        return levels

    def pair(self, among: Sequence[int] = ()) -> tuple[int, int]:
        """Returns the two levels of the settings, or the two next to the average, of those in `among` if it has any."""
        have = [rung[0] for rung in self.moe.ladder]
        if self.settings.levels is None:
            have = [b for b in have if not among or b in among]
        low = max([b for b in have if b <= self.average], default=have[0])
        high = min([b for b in have if b > low], default=low)
        first, second = self.levels((low, high), count=2)
        return first, second

    def cheapest(
        self, cost: Floats, levels: Sequence[int], one: Sequence[int] = ()
    ) -> rules.Levels:
        """Returns the cheapest allocation for all layers at once, or for each layer with `per_layer`.

        Args:
            cost: [L, E, B]; it is changed.
            levels: [B], bits.
            one: with `per_layer`, levels (indices) that at least one expert of every layer must have.
        """
        lacks = np.array(levels) > self.moe.expert_bits[:, :, None]
        for layer, expert in self.protected:
            cost[layer, expert, : max((~lacks[layer, expert]).sum() - 1, 0)] = np.inf
        cost = np.where(lacks, np.inf, cost)
        L, E = self.shape
        if self.average < levels[0]:
            raise ValueError(f"average bits: expected at least {levels[0]}, got {self.average:g}")
        try:
            if not self.settings.per_layer:
                total = int(self.average * L * E + 1e-9)
                return rules.cheapest(cost.reshape(L * E, -1), levels, total).reshape(L, E)
            total = int(self.average * E + 1e-9)
            return np.stack([rules.cheapest(c, levels, total, at_least_one=one) for c in cost])
        except ValueError:
            raise ValueError(
                f"average bits: {self.average:g} are too few for the experts that must have more"
            ) from None

    def ranked(self, scores: Floats, levels: Sequence[int]) -> rules.Levels:
        """Returns the allocation that gives the highest scores [L, E] the higher of two levels; `scores` is changed."""
        for layer, expert in self.protected:
            scores[layer, expert] = np.inf
        return rules.by_rank(scores, levels, self.average, per_layer=self.settings.per_layer)


_Answer = tuple[Sequence[int], rules.Levels]


def _error(model: _Model) -> _Answer:
    levels = model.levels([rung[0] for rung in model.moe.ladder])
    return levels, model.cheapest(model.errors("error2", levels), levels)


def _pmq(model: _Model) -> _Answer:
    levels = model.levels([rung[0] for rung in model.moe.ladder][:3])
    errors, counts, gates = (
        model.errors("error", levels),
        model.known("count"),
        model.known("gates"),
    )
    cost = np.stack(
        [
            rules.pmq_cost(c, g, e, model.settings.exponents)
            for c, g, e in zip(counts, gates, errors, strict=True)
        ]
    )
    # As published: every layer has at least one expert at each level but the lowest.
    return levels, model.cheapest(cost, levels, one=range(1, len(levels)))


def _frequency(model: _Model) -> _Answer:
    levels = model.pair()
    return levels, model.ranked(model.known("count"), levels)


def _first_blocks(model: _Model) -> _Answer:
    if model.settings.per_layer:
        raise ValueError("per layer: not for first-blocks, which gives layers different averages")
    levels = model.pair()
    return levels, model.ranked(
        -np.arange(np.prod(model.shape), dtype=float).reshape(model.shape), levels
    )


def _random(model: _Model) -> _Answer:
    levels = model.pair()
    scores = np.random.default_rng(model.settings.seed).random(model.shape)
    return levels, model.ranked(scores, levels)


def _outlier(model: _Model) -> _Answer:
    moe, levels = model.moe, model.pair()
    top = moe.ladder[-1][0]
    store = ExpertStore.open(
        moe, bits=top, budget_bytes=2 * expert_bytes(moe, len(moe.ladder)), verify=True
    )
    scores = np.empty(model.shape)
    for i in range(scores.size):
        matrices = store.host.decode(i, len(moe.ladder))
        scores.flat[i] = max(rules.outlier_score(w) for w in matrices)
        if model.progress is not None:
            model.progress(i + 1, scores.size)
    return levels, model.ranked(scores, levels)


def _expertwise(model: _Model) -> _Answer:
    """EdgeMoE III-B, steps 1 to 3, with our quantiser, and with the KL divergence in place of its accuracy loss."""
    if model.windows is None:
        raise ValueError("expertwise: expected a text to measure loss on")
    have = [rung[0] for rung in model.moe.ladder]
    n = model.shape[0] * model.shape[1]
    most = model.settings.max_loss
    if most is not None and model.settings.per_layer:
        raise ValueError("per layer: expected without a max loss, which is that of the whole model")
    with Loss(model.moe.path, model.windows, reference=have[-1]) as loss:
        levels = model.pair(among=(2, 4, 8)) if most is None else _bracket(model, loss, most)
        low, high = levels
        scores = np.empty(n)
        bits = np.full(model.shape, high, np.int8)
        for i in range(n):
            bits.flat[i] = low
            scores[i] = loss(bits)
            bits.flat[i] = high
            if model.progress is not None:
                model.progress(i + 1, n)
        table = scores.reshape(model.shape)
        if most is None:
            return levels, model.ranked(table, levels)
        for layer, expert in model.protected:
            table[layer, expert] = np.inf
        order = np.argsort(table.reshape(-1), kind="stable")

        def mix(count: int) -> rules.Levels:
            choice = np.ones(n, np.int64)
            choice[order[:count]] = 0
            return choice.reshape(model.shape)

        few, many = (
            0,
            n - len(model.protected),
        )  # the largest count whose loss is small enough lies in [few, many]
        while few < many:
            middle = (few + many + 1) // 2
            if loss(np.array(levels, np.int8)[mix(middle)]) <= most:
                few = middle
            else:
                many = middle - 1
        return levels, mix(few)


def _bracket(model: _Model, loss: Loss, most: float) -> tuple[int, int]:
    """Step 2: returns the two levels, used for all experts, whose losses enclose the one that is allowed."""
    if model.settings.levels is not None:
        first, second = model.levels((), count=2)
        return first, second
    have = [rung[0] for rung in model.moe.ladder]
    levels = [b for b in (2, 4, 8) if b in have] or have
    for low, high in itertools.pairwise(levels):
        if loss(np.full(model.shape, high, np.int8)) <= most:
            return low, high
    raise ValueError(f"max loss: even {levels[-1]} bits lose more than {most:g}")


METHODS: Mapping[str, Callable[[_Model], _Answer]] = {
    "error": _error,
    "pmq": _pmq,
    "expertwise": _expertwise,
    "frequency": _frequency,
    "first-blocks": _first_blocks,
    "outlier": _outlier,
    "random": _random,
}
"""All methods, by the name that `edgemoe allocate --method` takes."""
