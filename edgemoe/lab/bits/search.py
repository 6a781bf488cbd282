"""One search over experts, matrices, and keys and values, within a budget of bytes (after EvoPress, arXiv 2410.14649).

It begins at the choice with the least sum of losses, as if losses added up (`Field.least_sum`). The losses of each
matrix and of each layer's keys and values alone are measured. Those of experts are the calibration's errors, scaled by
one measurement per layer and level. Losses do not quite add up, so an evolutionary search goes on from there. Offspring
are the parent with a few units lowered and others raised. All offspring are measured on a few tokens, the best of them
on more, and the best of those on all. It replaces the parent only if it is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.lab.bits.units import Choice

__all__ = ["Field", "Rounds", "Standing", "evolve"]

Floats = NDArray[np.float64]
Measure = Callable[[Sequence[Choice], int], Sequence[float]]
"""Returns the loss of each of some choices, measured on the first so many windows."""

MOST_CHANGES = 10
"""The most units that an offspring changes, as published."""
DRAWS = 4
"""How many random changes are drawn for each offspring. The one with the least sum of costs is taken, which needs no
measuring; published: 1."""
_TRIES = 10  # for each offspring
_HALVINGS = 200  # of the interval for the price


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How much a search tries: generations, offspring, and windows of text to measure on."""

    generations: int = 40
    offspring: int = 16
    survivors: int = 4
    """How many of the offspring are measured on more windows."""
    alone: int = 8
    """Windows on which each unit's own cost is measured."""
    windows: tuple[int, int, int] = (2, 4, 16)
    """Windows that each stage measures on: all offspring, the survivors, and the last one for comparison with its
    parent."""
    seed: int = 0

    @property
    def measured(self) -> int:
        """How many windows a generation measures in all."""
        few, more, every = self.windows
        return few * self.offspring + (more - few) * self.survivors + every - more


@dataclass(slots=True)
class Standing:
    """The state of a search."""

    generation: int
    """How many generations are done."""
    parent: Choice
    loss: float
    """The parent's, on all windows."""
    kept: int = 0
    """How many generations had an offspring that replaced the parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """The space of choices: U units, each at one of B levels."""

    cost: Floats
    """[U, B]: the loss that each level of each unit costs, if losses add up."""
    sizes: NDArray[np.int64]
    """[U, B]: bytes, ascending."""
    lowest: Choice
    """The lowest level that each unit may have."""
    highest: Choice
    """The highest level that each unit may have."""
    total: int
    """The most bytes that a choice may take."""

    def takes(self, choice: Choice) -> int:
        """Returns the bytes of a choice."""
        return int(self.sizes[np.arange(len(choice)), choice].sum())

    def adds(self, choice: Choice) -> float:
        """Returns the sum of a choice's costs."""
        return float(self.cost[np.arange(len(choice)), choice].sum())

    def least_sum(self) -> Choice:
        """Returns a choice with a low sum of costs that fits the budget.

        It is a Lagrangian relaxation. Given a price per byte, every unit takes the level with the least cost plus
        price; bisection finds a price at which the choice just fits. No choice of as many bytes or fewer has a lower
        sum. Then a greedy step spends the bytes that are left on the levels that gain most per byte.

        Raises:
            ValueError: the lowest levels do not fit.
        """
        if (least := self.takes(self.lowest)) > self.total:
            raise ValueError(f"{self.total} bytes; the lowest levels take {least}")
        levels = np.arange(self.cost.shape[1])
        allowed = (levels >= self.lowest[:, None]) & (levels <= self.highest[:, None])
        cost = np.where(allowed, self.cost, np.inf)

        def at(price: float) -> Choice:
            found: Choice = np.argmin(cost + price * self.sizes, axis=1)
            return found

        if self.takes(at(0.0)) <= self.total:
            return at(0.0)
        low, high, choice = (
            0.0,
            float(self.cost.max()) + 1,
            self.lowest,
        )  # at the price `high` a byte costs more than any loss
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = at(middle)
            if self.takes(found) <= self.total:
                choice, high = found, middle
            else:
                low = middle
        return self._filled(choice, cost)

    def _filled(self, choice: Choice, cost: Floats) -> Choice:
        """Raises units greedily, each time to the level that gains most per byte, as long as one fits."""
        choice, every = choice.copy(), np.arange(len(choice))
        room = self.total - self.takes(choice)
        while True:
            more = self.sizes - self.sizes[every, choice][:, None]
            gain = cost[every, choice][:, None] - cost
            fits = (more > 0) & (more <= room) & (gain > 0)
            rate = np.where(fits, gain / np.maximum(more, 1), 0.0)
            unit, level = np.unravel_index(np.argmax(rate), rate.shape)
            if rate[unit, level] <= 0:
                return choice
            room -= int(more[unit, level])
            choice[unit] = level

    def changed(self, parent: Choice, rng: np.random.Generator) -> Choice | None:
        """Returns a random change of a parent that fits the budget.

        First min(rand 1..3, rand 1..3) units are raised by one level. Then others are lowered by one level until the
        choice fits, and the bytes that are left are spent on raising further units. Units have different sizes, so one
        that is raised may need several that are lowered.

        Returns:
            The changed choice; None if that took more than MOST_CHANGES units, or if nothing could be changed.
        """
        every, child = np.arange(len(parent)), parent.copy()
        touched = np.zeros(len(parent), bool)
        room = self.total - self.takes(parent)

        def step(direction: int, most: int) -> bool:
            """Moves a random unit by one level: one that was not moved yet and then takes at most `most` more bytes.

            Returns whether there was one.
            """
            nonlocal room
            to = child + direction
            may = ~touched & (to >= self.lowest) & (to <= self.highest)
            more = self.sizes[every, np.where(may, to, child)] - self.sizes[every, child]
            may &= more <= most
            if not may.any():
                return False
            unit = int(rng.choice(np.flatnonzero(may)))
            child[unit], touched[unit] = to[unit], True
            room -= int(more[unit])
            return True

        for _ in range(int(rng.integers(1, 4, 2).min())):
            if not step(1, self.total):
                return None
        while room < 0:
            if not step(-1, 0) or touched.sum() > MOST_CHANGES:
                return None
        while touched.sum() < MOST_CHANGES and step(1, room):
            pass
        return None if (child == parent).all() else child

    def offspring(self, parent: Choice, count: int, rng: np.random.Generator) -> list[Choice]:
        """Returns up to `count` changed choices, each the best of DRAWS draws by the sum of costs."""
        out: list[Choice] = []
        for _ in range(_TRIES * count):
            if len(out) == count:
                break
            drawn = [self.changed(parent, rng) for _ in range(DRAWS)]
            sound = [child for child in drawn if child is not None]
            if sound:
                out.append(min(sound, key=self.adds))
        return out


def evolve(
    state: Standing,
    measure: Measure,
    field: Field,
    rounds: Rounds,
    *,
    done: Callable[[Standing], Any] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Standing:
    """Goes on from a state until the last generation, and returns it.

    The random numbers of a generation depend only on the seed and its number, so an interrupted search continues as it
    would have.

    Args:
        state: where to go on from; it is changed.
        measure: measures choices.
        done: called after every generation.
        is_over: returns whether to stop before the next generation.
    """
    few, more, every = rounds.windows
    while state.generation < rounds.generations and not is_over():
        rng = np.random.default_rng((rounds.seed, state.generation))
        children = field.offspring(state.parent, rounds.offspring, rng)
        for count, left in ((few, rounds.survivors), (more, 1)):
            losses = measure(children, count)
            children = [children[i] for i in np.argsort(losses, kind="stable")[:left]]
        loss = measure(children, every)[0] if children else np.inf
        state.generation += 1
        if loss < state.loss:
            state.parent, state.loss, state.kept = children[0], loss, state.kept + 1
        if done is not None:
            done(state)
    return state
