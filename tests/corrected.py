"""`.moe` files with corrections of low rank, made by a slow and obvious encoder: random directions, least squares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgemoe import _core
from edgemoe.file.writer import Writer
from edgemoe.quant import SCHEMES, plane_widths
from edgemoe.quant.correction import (
    SHARED,
    basis_codes,
    factor_codes,
    kind_of,
    pack_basis,
    with_correction,
)

RANKS = {
    "experts.gate": (8, 8, 0, 0, 0), "experts.up": (16, 8, 8, 0, 0), "experts.down": (8, 16, 8, 0, 0),
    "q": (8, 8, 8, 0, 0), "k": (8, 0, 0, 0, 0), "o": (16, 16, 16, 0, 8), "head": (24, 8, 8, 0, 0),
    "embed": (8, 8, 8, 8, 8), "shared.up": (8, 8, 0, 0, 0), "shared.down": (8, 8, 8, 0, 0),
}  # fmt: skip


def directions(name, cols, rank):
    """Returns V as it is stored, of which nothing is known: the same for all of a layer's experts, and for q and k."""
    kind = kind_of(name)
    name = name.split(".")[1] if kind in SHARED else "qk" if kind in ("q", "k") else name
    rows = np.random.default_rng([cols, *name.encode()]).standard_normal((cols, 32))
    return basis_codes(np.linalg.qr(rows)[0].T[:rank])


def with_corrections(w, rungs, ladder, ranks, row_scales, v, *, is_shared):
    """Returns rungs whose corrections are what the levels lack in the directions v."""
    factors = {}
    widths = plane_widths(ladder)
    for level, rank in enumerate(ranks[: len(ladder)], 1):
        if not rank:
            continue
        matrix = _core.Nested.from_rungs(
            rungs[:level], *w.shape, widths[:level], row_scales=row_scales
        )
        coded = np.empty(w.shape, np.float32)
        matrix.decode_rows(np.arange(len(w), dtype=np.int32), coded)
        last = max(r for r, has in enumerate(row_scales[:level]) if has)
        scales = rungs[last][: 2 * len(w)].view("<f2").astype(float)
        units = scales / 4096 * 2.0 ** (8 - ladder[level - 1])
        a = np.linalg.lstsq(v[:rank].T.astype(float), (w - coded).T, rcond=None)[0].T
        factors[level - 1] = factor_codes(a, units)
    return with_correction(rungs, factors, None if is_shared else v)


class CorrectingWriter(Writer):
    """Writes what the scheme says of corrections too; to be put in place of `Writer`."""

    def __init__(self, path, config, *, scheme=SCHEMES["nested"], sections, ranks=None, **rest):
        names = RANKS if ranks is None else ranks
        scheme = replace(scheme, correction=names)
        if scheme.shared_rank:
            d, rank = config.hidden_size, scheme.shared_rank
            bases = [directions(f"experts.{i}.0.up", d, rank) for i in config.moe_layers]
            sections = {**sections, "basis": pack_basis(bases)}
        super().__init__(path, config, scheme=scheme, sections=sections, **rest)

    def _quantize(self, name, w, ladder, favour):
        rungs = super()._quantize(name, w, ladder, favour)
        scheme, is_shared = self._layout.scheme, kind_of(name) in SHARED
        ranks = scheme.ranks(name)
        if not ranks:
            return rungs
        rank = scheme.shared_rank if is_shared else max(ranks)
        v = directions(name, w.shape[1], rank)
        return with_corrections(w, rungs, ladder, ranks, scheme.row_scales, v, is_shared=is_shared)
