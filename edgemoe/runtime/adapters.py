"""The adapters of an open model: their names, the places of their experts, and the weights that they do not share.

The model and its adapters share one table of experts (`edgemoe.places`). An expert that an adapter changes has a place
of its own in it. A router chooses experts by number; the number is then translated to a place, through the table of the
token's adapter. What an adapter shares with the model is in memory once. Dense tensors that an adapter changes are
resident beside the model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core
from edgemoe.arguments import path_of
from edgemoe.config import MATRICES
from edgemoe.errors import quoted
from edgemoe.file.adapter import MOST_ADAPTERS, AdapterFile, open_adapter, with_adapters
from edgemoe.file.format import MoeFile
from edgemoe.places import Places
from edgemoe.store import Weight, load_tensors, tensors_bytes

__all__ = ["NO_ADAPTER", "Adapters", "named_adapters"]

NO_ADAPTER = "none"
"""The name that stands for the model alone."""
_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]{0,63}", re.ASCII)

_PLACE_BYTES = 128
"""Bookkeeping of the cache for each place that adapters add; the model's own places are counted in the growth of the
process (`Budget.growth`)."""

Weights = Mapping[str, Weight]


def named_adapters(given: object) -> dict[str, str]:
    """Returns the paths of adapters by name. Without a given name, an adapter is called like its file, without `.moea`.

    Args:
        given: one path, a list of paths, or a mapping of names to paths.

    Raises:
        ValueError: a name is not valid or is given twice, or there are too many adapters.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        pairs = [(name, path_of("adapters", path)) for name, path in given.items()]
    else:
        each = given if isinstance(given, list | tuple) else [given]
        paths = [path_of("adapters", path) for path in each]
        pairs = [(Path(path).name.removesuffix(".moea"), path) for path in paths]
    out: dict[str, str] = {}
    for name, path in pairs:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == NO_ADAPTER:
            raise ValueError(
                f"adapters: expected a name of letters, digits, . _ and -, not {NO_ADAPTER}; got {quoted(name)}"
            )
        if name in out:
            raise ValueError(f"adapters: two are called {name}; expected each under its own name")
        out[name] = str(path)
    if len(out) > MOST_ADAPTERS:
        raise ValueError(f"adapters: expected at most {MOST_ADAPTERS}, got {len(out)}")
    return out


@dataclass(frozen=True, slots=True)
class Adapters:
    """All adapters of a model, numbered from 1 in the order in which they were given; 0 is the model alone."""

    names: tuple[str, ...] = ()
    files: tuple[AdapterFile, ...] = ()
    places: Places | None = None

    @classmethod
    def open(cls, moe: MoeFile, given: Mapping[str, str]) -> tuple[MoeFile, Adapters]:
        """Opens adapters, and returns the model with their experts added to its table, and the adapters.

        Raises:
            FormatError: an adapter is not sound, or belongs to another model.
        """
        if not given:
            return moe, cls()
        files = tuple(open_adapter(path) for path in given.values())
        moe, places = with_adapters(moe, files, [_apart(moe, file) for file in files])
        return moe, cls(tuple(given), files, places)

    def number(self, name: str | None) -> int:
        """Returns an adapter's number; 0 for None and `NO_ADAPTER`.

        Raises:
            ValueError: no adapter has that name.
        """
        if name is None or name == NO_ADAPTER:
            return 0
        if name not in self.names:
            known = ", ".join((NO_ADAPTER, *self.names))
            raise ValueError(f"adapter: expected one of {known}, got {quoted(name)}")
        return self.names.index(name) + 1

    def told(self, sections: dict[str, bytes]) -> dict[str, bytes]:
        """Returns the file's sections that schedulers may use: none with adapters, as the sections are of the model."""
        return {} if self.names else sections

    @property
    def variants(self) -> tuple[int, ...]:
        """The set of dense weights that each adapter computes with, by its number.

        Set 0 is the model's; the others are those that `load` returns, in order. An adapter without dense tensors of
        its own computes with set 0.
        """
        sets = accumulate(bool(file.dense) for file in self.files)
        return (0, *(n if f.dense else 0 for f, n in zip(self.files, sets, strict=True)))

    def beside(self, level: int, hidden: int) -> tuple[int, int]:
        """Returns the bytes that adapters take apart from experts: of dense weights, and of scratch for each token.

        See `beside` of `Budget.divide`.

        Args:
            level: how many rungs of dense matrices are used.
            hidden: the model's width, D.
        """
        if self.places is None:
            return 0, 0
        # Sets of weights run one after the other (`Model._pass`); their hidden states, float32 [T, D], are gathered.
        return self._dense_bytes(level), 4 * hidden if any(self.variants) else 0

    def _dense_bytes(self, level: int) -> int:
        """Returns the bytes of what `load` and `widen_biases` add to a model's weights, and of the added places."""
        own = sum(tensors_bytes(file, file.dense, level) for file in self.files)
        return (
            own
            + self._bias_bytes
            + _PLACE_BYTES * (0 if self.places is None else self.places.owner.size)
        )

    @property
    def _bias_bytes(self) -> int:
        if self.places is None or not self.files[0].config.expert_bias:
            return 0
        config, (layers, places) = self.files[0].config, self.places.names.shape
        width = sum(shape[0] for shape in config.expert_shapes)
        return 4 * width * int(layers * places)

    def load(self, weights: Weights, level: int, *, verify: bool) -> list[Weights]:
        """Returns a set of weights for each adapter that has dense tensors of its own; see `variants`.

        A set holds all dense weights by name. Those that the adapter does not change are the model's own objects.

        Args:
            weights: the model's, with biases as `widen_biases` leaves them.
            level: how many rungs of the matrices are used.

        Raises:
            FormatError: a checksum does not match.
            ReadError: the disk failed.
        """
        out: list[Weights] = []
        for file in self.files:
            if not file.dense:
                continue
            own = load_tensors(file, file.dense, level, verify=verify)
            every = {name: own.get(name, weight) for name, weight in weights.items()}
            matrices = [w for name, w in own.items() if isinstance(w, _core.Nested)]
            for before, after in pairwise(matrices):
                after.share_basis(before)
            out.append(every)
        return out

    def widen_biases(self, weights: dict[str, Weight], *, verify: bool) -> None:
        """Extends the biases of experts, in place, to a row for each place of a layer instead of each expert."""
        places = self.places
        if places is None or not self.files[0].config.expert_bias:
            return
        config = self.files[0].config
        theirs = [
            load_tensors(f, [n for n in f.tensors if n not in f.dense], 1, verify=verify)
            for f in self.files
        ]
        for at, layer in enumerate(config.moe_layers):
            names, owner = places.names[at], places.owner[at]
            for part in MATRICES:
                name = f"layers.{layer}.expert_bias.{part}"
                mine = cast(NDArray[np.float32], weights[name])
                wide = np.zeros((len(names), mine.shape[1]), np.float32)
                wide[: len(mine)] = mine
                for place, of in enumerate(owner.tolist(), start=len(mine)):
                    if of:
                        rows = cast(NDArray[np.float32], theirs[of - 1].get(name, mine))
                        wide[place] = rows[names[place]]
                weights[name] = wide


def _apart(moe: MoeFile, adapter: AdapterFile) -> NDArray[np.bool_]:
    """Returns which experts have biases that differ from the model's, [layers, E].

    Such an expert needs a place of its own even where its matrices are the model's.
    """
    out = np.zeros((len(moe.config.moe_layers), moe.config.num_experts), np.bool_)
    names = [name for name in adapter.tensors if name not in adapter.dense]
    mine = load_tensors(moe, names, 1, verify=True)
    theirs = load_tensors(adapter, names, 1, verify=True)
    for name in names:
        a, b = (cast(NDArray[np.float32], of[name]) for of in (mine, theirs))
        out[moe.config.moe_layers.index(int(name.split(".")[1]))] |= (a != b).any(axis=1)
    return out
