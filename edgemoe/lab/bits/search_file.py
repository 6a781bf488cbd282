"""The file that a search lies in while it is under way, so that it can go on."""

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

_VERSION = 2  # 1: rows of the embedding were looked up at its own bits


class SearchFile:
    """Keeps what was measured, which belongs to one search."""

    def __init__(self, path: Path, identity: dict[str, Any], *, is_new: bool) -> None:
        """Reads what is there.

        Args:
            identity: what all depends on, as JSON has it.
            is_new: begin anew, whatever is there.

        Raises:
            FormatError: the file is none of a search, or of another.
        """
        self._path, self._identity = path, identity
        self._costs: dict[str, float] = {}
        self._state: dict[str, Any] | None = None
        self.start_loss = 0.0
        """Where the search began."""
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
        """The losses that were measured."""
        return self._costs

    def add(self, costs: Mapping[str, float]) -> None:
        """Keeps losses by name."""
        self._costs.update(costs)
        self.keep()

    def standing(self, top: Choice) -> Standing | None:
        """Returns where the search stands; None where it has not begun.

        Args:
            top: the highest level that each unit may have.

        Raises:
            FormatError: the file says something else.
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
        """Keeps where the search begins."""
        self.start_loss = state.loss
        self.write(state)

    def write(self, state: Standing) -> None:
        """Keeps where the search stands."""
        self._state = {**asdict(state), "parent": state.parent.tolist()}
        self.keep()

    def keep(self) -> None:
        """Writes all that is known."""
        value = {
            "edgemoe_search": _VERSION, "of": self._identity, "costs": self._costs,
            "state": self._state, "start_loss": self.start_loss,
        }  # fmt: skip
        write_whole(self._path, json.dumps(value).encode() + b"\n", ours=True)
