"""The split of experts that a device lacks: which are copied to it, and which the CPU runs, so as to finish soonest.

Where an expert runs never changes the result. So the split may depend on measured rates, even if other programs disturb
the measurements.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rates"]

_DEVICE_PRODUCTS = 1e12
"""Products of a weight and an activation per second that any device is assumed to do.

It is the rate of a small device without tensor cores; the estimate need not be better."""
_SHARE = 0.2  # weight of a new measurement in the moving average
_FEW = 2  # up to so many tokens per expert, reading its bytes decides how long it takes
_MANY = 16  # from so many tokens per expert on, its products decide
# After so many splits in a row in which every expert went to the device, one is left to the CPU to measure it again: it
# may have been busy when it was last measured.
_AGAIN = 32


class Rates:
    """Measured rates of the link to a device and of the CPU, and the split they suggest. One thread at a time."""

    def __init__(self, link: float, weights: int) -> None:
        """Args:
        link: bytes per second of copies of experts to the device.
        weights: the number of weights of an expert.
        """
        self.link = link
        self._weights = weights
        self.read = 0.0
        """Bytes of experts per second when the CPU runs them for few tokens; 0 until measured."""
        self.products = 0.0
        """Products per second when the CPU runs experts for many tokens; 0 until measured."""
        self._unmeasured = 0

    def note(self, size: int, tokens: int, experts: int, seconds: float) -> None:
        """Updates the CPU's rates after it has run some experts.

        Args:
            size: bytes of all of them together.
            tokens: pairs of a token and an expert.
            experts: their number.
            seconds: the time that all of them took.
        """
        if experts == 0 or seconds <= 0:
            return
        if tokens <= _FEW * experts:
            self.read = _mixed(self.read, size / seconds)
        elif tokens >= _MANY * experts:
            self.products = _mixed(self.products, tokens * self._weights / seconds)

    def split(self, sizes: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which experts to copy to the device, so that link and CPU both finish as early as possible.

        Until the CPU has been measured with a similar number of tokens, no expert is copied.

        Args:
            sizes: [n], the bytes of each expert.
            tokens: [n], the tokens of each expert.

        Returns:
            [n], True for the experts to copy.
        """
        goes = np.zeros(len(sizes), np.bool_)
        products = tokens * float(self._weights)
        known = self.products if tokens.sum() > _FEW * len(sizes) else self.read
        if not known or not self.link:
            return goes
        here = np.zeros(len(sizes))
        for work, rate in ((sizes, self.read), (products, self.products)):
            if rate:
                here = np.maximum(here, work / rate)
        there = np.maximum(sizes / self.link, products / _DEVICE_PRODUCTS)
        order = np.argsort(-here / there, kind="stable")
        # [n + 1]: the seconds of link and CPU if the first 0, 1, … of them are copied.
        link = np.concatenate([[0.0], np.cumsum(there[order])])
        left = here.sum() - np.concatenate([[0.0], np.cumsum(here[order])])
        count = int(np.maximum(link, left).argmin())
        self._unmeasured = self._unmeasured + 1 if count == len(sizes) else 0
        if self._unmeasured > _AGAIN:
            count, self._unmeasured = count - 1, 0
        goes[order[:count]] = True
        return goes


def _mixed(before: float, now: float) -> float:
    return now if not before else before + _SHARE * (now - before)
