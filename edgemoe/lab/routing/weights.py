"""Fits the four weights of HOBBIT's cache priority to a trace, by replays (arXiv 2411.01433, section 3.4).

The paper says that its weights were fitted, and prints none. Here they minimise the bytes read on the first half of a
trace, and are judged on the second half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgemoe.lab.routing.replay import Replay, Tape, make_scheduler, replay

__all__ = ["NAMES", "Fitted", "Weights", "fit_weights"]

NAMES = ("w_recency", "w_frequency", "w_high", "w_distance")
"""The scheduler options that set the weights; every scheduler takes them."""

Weights = tuple[float, float, float, float]
"""The four weights in the order of `NAMES`; they sum to 1."""

_OTHERS = ("lru", "lfu", "next-use")  # evictions to compare with
_QUARTERS = 4  # steps of the first grid
_FINEST = 1 / 32  # the smallest share that is moved between weights


@dataclass(frozen=True, slots=True)
class Fitted:
    """The fitted weights, and how they compare."""

    weights: Weights
    rows: tuple[tuple[str, Replay, Replay], ...]
    """For each eviction its name and its replays of the first and of the second half; the fitted weights come last."""
    replays: int
    """How many sets of weights were tried, each by one replay."""


def fit_weights(
    tape: Tape,
    *,
    budget_bytes: int,
    scheduler: str = "on-demand",
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Fitted:
    """Searches for the weights under which a scheduler reads the fewest bytes.

    First all weights that are multiples of 1/4 are tried. Then a local search moves a share of 1/8 from one weight to
    another as long as that helps, then shares of 1/16, then of 1/32.

    Args:
        budget_bytes: memory for experts.
        scheduler: the name of the scheduler that plans.
        options: of the scheduler.
        progress: called with the number of replays done.

    Raises:
        ValueError: there are too few single tokens to halve, or an option is wrong.
        OutOfBudget: not even one expert fits.
    """
    first, second = tape.halves()
    known: dict[Weights, Replay] = {}

    def ran(half: Tape, eviction: str, **more: float) -> Replay:
        every = {**(options or {}), "eviction": eviction, **more}
        made = make_scheduler(half, scheduler, budget_bytes=budget_bytes, options=every)
        return replay(half, made, budget_bytes=budget_bytes)

    def mixed(half: Tape, weights: Weights) -> Replay:
        return ran(half, "hobbit", **dict(zip(NAMES, weights, strict=True)))

    def cost(weights: Weights) -> int:
        if weights not in known:
            known[weights] = mixed(first, weights)
            progress(len(known))
        return known[weights].bytes_read

    best = min(_grid(), key=cost)
    share = 1 / (2 * _QUARTERS)
    while share >= _FINEST:
        better = min(_neighbours(best, share), key=cost)
        if cost(better) < cost(best):
            best = better
        else:
            share /= 2
    equal: Weights = (0.25, 0.25, 0.25, 0.25)
    rows = [(name, ran(first, name), ran(second, name)) for name in _OTHERS]
    rows.append(("hobbit, equal weights", known[equal], mixed(second, equal)))
    rows.append(("hobbit, fitted", known[best], mixed(second, best)))
    return Fitted(best, tuple(rows), len(known))


def _grid() -> Iterator[Weights]:
    for parts in itertools.product(range(_QUARTERS + 1), repeat=3):
        rest = _QUARTERS - sum(parts)
        if rest >= 0:
            a, b, c = (part / _QUARTERS for part in parts)
            yield a, b, c, rest / _QUARTERS


def _neighbours(weights: Weights, share: float) -> Iterator[Weights]:
    yield weights
    for giver, taker in itertools.permutations(range(len(weights)), 2):
        if weights[giver] >= share:
            moved = list(weights)
            moved[giver] -= share
            moved[taker] += share
            yield moved[0], moved[1], moved[2], moved[3]
