"""Tasks made from a seed, for damage that perplexity does not show: sums, copies, and looking up in a context.

What a model knows and what it finds in its context are damaged at different bits (LLM-KICK, arXiv 2310.01382), and the
mean loss over a text hardly changes with either. The items need no download, and no model was trained on them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from edgemoe.lab.quality.tasks import Item

__all__ = ["MADE", "made"]

_WORDS = [
    "apple", "river", "stone", "lamp", "cloud", "horse", "paper", "glass", "bridge", "garden", "winter",
    "silver", "engine", "letter", "window", "forest", "market", "button", "candle", "feather", "island",
    "kettle", "ladder", "mirror", "needle", "orange", "pencil", "rabbit", "saddle", "ticket", "violin",
    "wagon", "anchor", "basket", "copper", "desert",
]  # fmt: skip
_NAMES = [
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "James", "Karen", "Louis",
    "Maria", "Nora", "Oscar", "Paula", "Quinn", "Ruth", "Simon", "Tom",
]  # fmt: skip

_SHOWN, _COPIED, _LINES = 4, 8, 20


class _Dice:
    """Random numbers that are the same in every version of Python, which promises that only for `random()`."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """Returns a number from 0 to n - 1."""
        return int(self._random.random() * n)

    def some(self, words: list[str], count: int) -> list[str]:
        """Returns `count` different words."""
        left = list(words)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def _sum(dice: _Dice) -> Item:
    def pair() -> tuple[int, int]:
        return 10 + dice.below(90), 10 + dice.below(90)

    shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in (pair() for _ in range(_SHOWN)))
    a, b = pair()
    return Item("arithmetic", f"{shown}{a} + {b} =", answer=f" {a + b}\n")


def _copy(dice: _Dice) -> Item:
    lists = [" ".join(dice.some(_WORDS, _COPIED)) for _ in range(2)]
    shown = f"List: {lists[0]}\nCopy: {lists[0]}\n\n"
    return Item("copying", f"{shown}List: {lists[1]}\nCopy:", answer=f" {lists[1]}\n")


def _needle(dice: _Dice) -> Item:
    names = dice.some(_NAMES, _LINES)
    codes = [str(1000 + dice.below(9000)) for _ in names]
    lines = "".join(f"The number of {n} is {c}.\n" for n, c in zip(names, codes, strict=True))
    asked = dice.below(len(names))
    return Item("needle", f"{lines}\nThe number of {names[asked]} is", answer=f" {codes[asked]}.\n")


MADE: Mapping[str, Callable[[_Dice], Item]] = {
    "arithmetic": _sum,
    "copying": _copy,
    "needle": _needle,
}
"""The function that makes an item of each kind."""


def made(kinds: list[str], count: int, seed: int) -> list[Item]:
    """Returns `count` items of each kind. The items of a kind depend only on the seed, not on the other kinds."""
    return [MADE[kind](_Dice(f"{kind} {seed} {i}")) for kind in kinds for i in range(count)]
