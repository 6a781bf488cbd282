"""One search over experts, matrices, and keys and values, under one number of bytes (after EvoPress, arXiv 2410.14649).

It begins at the exact programme's answer, as if losses added: those of each matrix, key and value alone are measured,
those of experts are what a calibration knows, weighed by one measurement for each layer. Losses do not quite add, so
an evolution goes on from there: offspring are the parent with a few units lowered and others raised; all are measured
on a few tokens, the best of them on more, and the last with the parent on all. Offspring take its place only if they
are better.
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
"""Returns the loss of each of some choices on the first so many windows."""

MOST_CHANGES = 10
"""Of one offspring, as published."""
DRAWS = 4
"""Changes of which one of the offspring is the best by the sum of costs, which takes no measuring; published: 1."""
_TRIES = 10  # for each of the offspring
_HALVINGS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Says how much is tried."""

    generations: int = 40
    offspring: int = 16
    survivors: int = 4
    """Of them, those that are measured on more."""
    alone: int = 8
    """Windows that each unit's own cost is measured on."""
    windows: tuple[int, int, int] = (2, 4, 16)
    """How many each stage measures on: all offspring, the survivors, the last with its parent."""
    seed: int = 0

    @property
    def measured(self) -> int:
        """Windows that a generation measures."""
        few, more, every = self.windows
        return few * self.offspring + (more - few) * self.survivors + every - more


@dataclass(slots=True)
class Standing:
    """Is where a search stands."""

    generation: int
    parent: Choice
    loss: float
    """On all windows."""
    kept: int = 0
    """Generations whose best offspring took the parent's place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Is what is chosen from: U units, each at one of B levels."""

    cost: Floats
    """[U, B]: what each costs, if losses add."""
    sizes: NDArray[np.int64]
    """[U, B] bytes, ascending."""
    lowest: Choice
    highest: Choice
    total: int
    """Bytes that may be taken."""

    def takes(self, choice: Choice) -> int:
        """Returns the bytes of a choice."""
        return int(self.sizes[np.arange(len(choice)), choice].sum())

    def adds(self, choice: Choice) -> float:
        """Returns the sum of a choice's costs."""
        return float(self.cost[np.arange(len(choice)), choice].sum())

    def least_sum(self) -> Choice:
        """Chooses levels whose costs add up to little.

        By a price of a byte, found by halving, that makes the sum of cost and price least; what is left then goes to
        whoever gains most for a byte. Exact for the bytes that it takes but for this last step.

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
        )  # at `high` a byte is dearer than any loss
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = at(middle)
            if self.takes(found) <= self.total:
                choice, high = found, middle
            else:
                low = middle
        return self._filled(choice, cost)

    def _filled(self, choice: Choice, cost: Floats) -> Choice:
        """Raises units by the level that gains most for a byte, as long as one fits."""
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
        """Returns a parent with min(rand 1..3, rand 1..3) units raised by a level, and others lowered until all fits.

        What room is left then goes to others that are raised. Units are of many sizes, so that one is paid for by
        several.

        Returns:
            None where it took more than MOST_CHANGES, or came back to the parent.
        """
        every, child = np.arange(len(parent)), parent.copy()
        touched = np.zeros(len(parent), bool)
        room = self.total - self.takes(parent)

        def step(direction: int, most: int) -> bool:
            """Moves a unit that was not moved yet, if there is one whose step is small enough."""
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
        """Returns up to `count` changed choices, each the best of DRAWS by the sum of costs."""
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
    """Goes on from a state until its last generation; each generation's chances depend on its number alone.

    Args:
        done: called after every generation.
        is_over: whether to stop before the next one.
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
