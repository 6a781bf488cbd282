"""The file that keeps the state of a search, so that an interrupted search can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.errors import FormatError, quoted
from edgemoe.file.parse import parse_json
from edgemoe.file.whole import write_whole
from edgemoe.lab.bits.search import Standing
from edgemoe.lab.bits.units import Choice

__all__ = ["SearchFile"]

_VERSION = 2  # in version 1, rows of the embedding were looked up at its own bits


class SearchFile:
    """The measurements and the state of one search, in a file."""

    def __init__(self, path: Path, identity: dict[str, Any], *, is_new: bool) -> None:
        """Reads the file if it exists.

        Args:
            identity: everything that the search depends on, as JSON values.
            is_new: begin anew, whatever is there.

        Raises:
            FormatError: the file is not of a search, or is of another search.
        """
        self._path, self._identity = path, identity
        self._costs: dict[str, float] = {}
        self._state: dict[str, Any] | None = None
        self.start_loss = 0.0
        """The loss where the search began."""
        if is_new or not path.exists():
            return
        try:
            value = parse_json(path.read_bytes(), str(path))
            version = value["edgemoe_search"]
        except (FormatError, TypeError, KeyError):
            raise self._wrong() from None
        if version != _VERSION:
            raise FormatError(
                f"{path}: a search of version {quoted(version)}, not {_VERSION}; --overwrite begins anew"
            )
        try:
            other, self._state = dict(value["of"]), value["state"]
            self._costs = {str(name): float(loss) for name, loss in dict(value["costs"]).items()}
            self.start_loss = float(value["start_loss"])
        except (FormatError, ValueError, TypeError, KeyError):
            raise self._wrong() from None
        for name, mine in identity.items():
            if other.get(name) != mine:
                raise FormatError(
                    f"{path}: a search with other settings: {name} is {quoted(other.get(name))}, not "
                    f"{quoted(mine)}; --overwrite begins anew"
                )

    def _wrong(self) -> FormatError:
        return FormatError(f"{self._path}: no search of edgemoe; --overwrite begins anew")

    @property
    def costs(self) -> Mapping[str, float]:
        """The losses that were measured, by name."""
        return self._costs

    def add(self, costs: Mapping[str, float]) -> None:
        """Adds losses by name, and writes the file."""
        self._costs.update(costs)
        self.keep()

    def standing(self, top: Choice) -> Standing | None:
        """Returns the state of the search; None if it has not begun.

        Args:
            top: the highest level that each unit may have.

        Raises:
            FormatError: the file has no valid state.
        """
        if self._state is None:
            return None
        try:
            found = Standing(
                int(self._state["generation"]), np.array(self._state["parent"], np.int64),
                float(self._state["loss"]), int(self._state["kept"]),
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, OverflowError):
            raise self._wrong() from None
        if found.parent.shape != top.shape or ((found.parent < 0) | (found.parent > top)).any():
            raise self._wrong()
        return found

    def begin(self, state: Standing) -> None:
        """Records the state in which the search begins, and writes the file."""
        self.start_loss = state.loss
        self.write(state)

    def write(self, state: Standing) -> None:
        """Records the state of the search, and writes the file."""
        self._state = {**asdict(state), "parent": state.parent.tolist()}
        self.keep()

    def keep(self) -> None:
        """Writes the file."""
        value = {
            "edgemoe_search": _VERSION, "of": self._identity, "costs": self._costs,
            "state": self._state, "start_loss": self.start_loss,
        }  # fmt: skip
        write_whole(self._path, json.dumps(value).encode() + b"\n", ours=True)
