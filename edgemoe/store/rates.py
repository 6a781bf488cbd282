"""Which of the experts that a device lacks go to it, and which the processor runs: whatever is done sooner.

Where an expert runs never changes what comes out, so rates that are measured while others use the machine may decide.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rates"]

_DEVICE_PRODUCTS = 1e12
"""Of a weight and an activation, per second, of a small device without tensor cores; what it has more is not needed."""
_SHARE = 0.2  # of a new measurement in an average
_FEW = 2  # tokens of an expert up to which its bytes decide how long it takes
_MANY = 16  # and from which its products do
_AGAIN = (
    32  # times that all go, after which the processor is measured again: it may have been busy then
)


class Rates:
    """Knows how fast a link and the processor are. One thread at a time."""

    def __init__(self, link: float, weights: int) -> None:
        """Args:
        link: bytes per second of copies of experts to the device.
        weights: of an expert.
        """
        self.link = link
        self._weights = weights
        self.read = 0.0
        """Bytes per second of experts that the processor runs for few tokens; 0 until it was measured."""
        self.products = 0.0
        """Products per second of experts that it runs for many; likewise."""
        self._unmeasured = 0

    def note(self, size: int, tokens: int, experts: int, seconds: float) -> None:
        """The processor has run some experts.

        Args:
            size: bytes of all.
            tokens: of all.
        """
        if experts == 0 or seconds <= 0:
            return
        if tokens <= _FEW * experts:
            self.read = _mixed(self.read, size / seconds)
        elif tokens >= _MANY * experts:
            self.products = _mixed(self.products, tokens * self._weights / seconds)

    def split(self, sizes: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which experts go over the link, so that link and processor are done together as soon as can be.

        None as long as the processor was not measured with about as many tokens.

        Args:
            sizes: [n] bytes.
            tokens: [n]
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
        # [n + 1], when the first 0, 1, … of them go
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
