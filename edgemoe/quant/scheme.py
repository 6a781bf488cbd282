"""Quantisation schemes: what a file's planes mean, as `edgemoe convert` writes them and the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemoe.quant import float4, mwq, nested
from edgemoe.quant.correction import (
    SHARED,
    Correction,
    basis_bytes,
    correction_bytes,
    kind_of,
)
from edgemoe.quant.lowrank import Directions

__all__ = ["SCHEMES", "Scheme"]

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Quantize(Protocol):
    """A function that quantises a matrix to its rungs; see `edgemoe.quant.nested.quantize`."""

    def __call__(
        self,
        w: NDArray[np.float32],
        ladder: Sequence[int],
        *,
        second_moments: NDArray[np.float32] | None,
        favour: int | None = None,
        directions: Directions | None = None,
        threads: int,
    ) -> list[NDArray[np.uint8]]: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store a matrix as rungs, each of which adds bits, so that every prefix of the rungs is a model."""

    name: str
    """Its name in the index of a file and in `edgemoe._core`."""
    about: str
    """A description for users."""
    group: int
    """Columns that share a scale."""
    ladders: tuple[tuple[int, ...], ...]
    """The ladders that `edgemoe convert` writes: bits in use after each rung. The first ladder is the default."""
    is_ladder: Callable[[Sequence[int]], bool]
    """Returns whether a file may have these levels."""
    measure: Callable[[int, int, Sequence[int], Sequence[int]], list[int]]
    """Returns the bytes of each rung without corrections, from rows, columns, ladder and `row_scales`."""
    quantize: Quantize
    can_favour: bool
    """Whether `quantize` can make one level better at the cost of the others."""
    row_scales: tuple[int, ...] = (1,)
    """Whether each rung begins with scales of rows, 1 or 0; rungs beyond its end do not. A file may have others."""
    correction: Correction = field(default_factory=dict)
    """Ranks of the corrections that a file has."""
    dense: Scheme | None = None
    """The scheme of all matrices outside the experts; None for this one."""
    is_thorough: bool = False
    """Whether `quantize` searches in full; see `thorough`."""

    def rung_bytes(self, rows: int, cols: int, ladder: Sequence[int], name: str = "") -> list[int]:
        """Returns the bytes of each rung of a matrix [rows, cols].

        Args:
            name: the matrix's name, which determines its scheme and corrections. Without it the matrix is an expert's
                and has no corrections.
        """
        if name and self.of(name) is not self:
            return self.of(name).rung_bytes(rows, cols, ladder, name)
        sizes, ranks = self.measure(rows, cols, ladder, self.row_scales), self.ranks(name)
        if any(ranks) and rows:
            sizes = [
                size + correction_bytes(rows, rank)
                for size, rank in zip(sizes, ranks, strict=False)
            ]
            if kind_of(name) not in SHARED:
                sizes[0] += basis_bytes(cols, max(ranks))
        return sizes

    def of(self, name: str) -> Scheme:
        """Returns the scheme of a matrix, by its name: "experts.…" or a dense tensor's."""
        return self if self.dense is None or name.startswith("experts.") else self.dense

    def ranks(self, name: str) -> tuple[int, ...]:
        """Returns the rank of each rung's correction of a matrix; () if it has no corrections."""
        return self.correction.get(kind_of(name), ())

    @property
    def shared_rank(self) -> int:
        """How many rows each basis in the section `basis` has; 0 if there is no such section."""
        return max((max(self.ranks(name), default=0) for name in SHARED), default=0)

    def fitted(self) -> Scheme:
        """Returns the scheme for weights that are fitted to products (second moments) of their inputs.

        Nested codes of 2 bits then have row scales of their own. Without products these would only take space: fitted
        to the weights alone, they make the model worse.
        """
        if self.quantize not in (nested.quantize, _THOROUGH):
            return self
        return replace(
            self,
            row_scales=nested.ROW_SCALES,
            quantize=partial(nested.quantize, row_scales=nested.ROW_SCALES),
        )

    def thorough(self, name: str = "thorough") -> Scheme:
        """Returns the scheme with the full search for scales, which takes several times as long.

        Raises:
            ValueError: the scheme has only one search; the message begins with `name`.
        """
        if self.dense is not None:
            return replace(self, is_thorough=True, dense=self.dense.thorough(name))
        if self.quantize is not nested.quantize:
            raise ValueError(f"{name}: not for the scheme {self.name}")
        return replace(self, is_thorough=True, quantize=_THOROUGH)

    def cut(self, dense: int, experts: int) -> Scheme:
        """Returns the scheme with corrections of the first rungs only.

        Args:
            dense: how many rungs of dense matrices keep theirs.
            experts: the same for experts.
        """
        ranks = {
            name: of[: experts if name.startswith("experts.") else dense]
            for name, of in self.correction.items()
        }
        return replace(self, correction={name: of for name, of in ranks.items() if any(of)})

    def ladder(self, bits: int | None, name: str = "bits") -> tuple[int, ...]:
        """Returns the levels up to `bits`; for None, the whole default ladder.

        If experts have a scheme of their own, this is the ladder of the other matrices.

        Raises:
            ValueError: no ladder has this level; the message begins with `name`.
        """
        if self.dense is not None:
            return self.dense.ladder(bits, name)
        for ladder in self.ladders:
            if bits is None or bits in ladder:
                return ladder if bits is None else ladder[: ladder.index(bits) + 1]
        levels = ", ".join(str(b) for ladder in self.ladders for b in ladder)
        raise ValueError(f"{name}: expected one of {levels}, got {bits}")

    def favoured(
        self, bits: int | None, favour: int | None, names: tuple[str, str] = ("bits", "favour")
    ) -> int | None:
        """Returns the favoured level as a number from 1, its place in the ladder up to `bits`; None for `favour` None.

        Args:
            bits: as for `ladder`.
            favour: bits of the level whose error matters most.
            names: what errors call the two arguments.

        Raises:
            ValueError: `favour` is not one of these levels, the scheme cannot favour any, or `ladder` raises it.
        """
        ladder = self.ladder(bits, names[0])
        if favour is None:
            return None
        if not self.can_favour:
            raise ValueError(f"{names[1]}: not for the scheme {self.name}")
        if favour not in ladder:
            levels = ", ".join(map(str, ladder))
            raise ValueError(f"{names[1]}: expected one of {levels}, got {favour}")
        return ladder.index(favour) + 1

    def levels_of_experts(self, ladder: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the levels that experts have when the other matrices have those of `ladder`."""
        return ladder if self.dense is None else self.ladders[0]


_THOROUGH = partial(nested.quantize, thorough=True)


def _quantize_mwq(
    w: NDArray[np.float32],
    ladder: Sequence[int],
    *,
    second_moments: NDArray[np.float32] | None,
    favour: int | None = None,
    directions: Directions | None = None,
    threads: int,
) -> list[NDArray[np.uint8]]:
    assert favour is None
    assert directions is None
    del threads  # numpy's matrix products use threads of their own; more on top made it slower
    return mwq.quantize(w, ladder, second_moments=second_moments)


_NESTED = Scheme(
    "nested",
    f"nested codes; a scale for each row, and a byte to adjust it for each {nested.GROUP} columns",
    nested.GROUP,
    (nested.DEFAULT_LADDER,),
    lambda ladder: True,
    nested.rung_bytes,
    nested.quantize,
    True,
)


def _float4(name: str, about: str, group: int, encode: Callable[[Array], Bytes]) -> Scheme:
    """Returns a scheme of 4-bit floats for experts; other matrices have nested codes."""

    def quantize(
        w: Array,
        ladder: Sequence[int],
        *,
        second_moments: Array | None,
        favour: int | None = None,
        directions: Directions | None = None,
        threads: int,
    ) -> list[Bytes]:
        del ladder, second_moments, threads  # there is nothing to choose
        assert favour is None
        assert directions is None
        return [encode(w)]

    return Scheme(
        name,
        f"experts as they were released, {about}; all else nested codes",
        group,
        (float4.LADDER,),
        lambda ladder: tuple(ladder) == float4.LADDER,
        lambda rows, cols, ladder, row_scales: [float4.rung_bytes(rows, cols, group)],
        quantize,
        False,
        dense=_NESTED,
    )


SCHEMES = {
    s.name: s
    for s in (
        _NESTED,
        Scheme(
            "mwq",
            "D2MoE's MWQ; a base and planes of signs, each with a float16 scale for each "
            f"{mwq.GROUP} columns of a row",
            mwq.GROUP,
            mwq.LADDERS,
            mwq.is_ladder,
            lambda rows, cols, ladder, row_scales: mwq.rung_bytes(rows, cols, ladder),
            _quantize_mwq,
            False,
        ),
        _float4("mxfp4", "4-bit floats with a power of two for each 32 columns", 32, float4.mxfp4),
        _float4("nvfp4", "4-bit floats with an 8-bit one for each 16 columns", 16, float4.nvfp4),
    )
}
"""All schemes, by name."""
