"""Compares merging experts (M-SMoE, arXiv 2310.01334) with leaving them out, without any training.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --text calibration.txt
    python benchmarks/merging.py mini.moe mini.calib calibration.txt held_out.txt

The most frequent experts of a layer stay; every other one joins the one whose router logits are most like its own. The
neurons of a group's experts are matched to those of its first expert by linear assignment; then the matrices are
averaged, weighted by frequency. All members keep their gates. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from halves import cut, divergences, log_probs
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.bit_router import Routed
from edgemoe.lab.quality.loss import standard_error
from edgemoe.quant import Calibration

Matrices = tuple[Tensor, ...]


class Listening(Routed):
    """A model that keeps its routers' logits."""

    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(*args, **named)  # type: ignore[arg-type]
        self.scores: dict[int, list[Tensor]] = {}

    def _moe(self, layer: int, x: Tensor, choosing: object) -> Tensor:
        router = self._dense[f"layers.{self.config.moe_layers[layer]}.router"]
        self.scores.setdefault(layer, []).append(x @ router.T)
        return super()._moe(layer, x, choosing)  # type: ignore[arg-type]

    @property
    def experts(self) -> list[Matrices]:
        """All experts in float, by layer and number; each may be replaced."""
        return self._experts[self._full]


def groups_of(
    scores: NDArray[np.float32], count: NDArray[np.int64], keep: int
) -> NDArray[np.int64]:
    """Returns, for each expert [E], the first expert of its group.

    Args:
        scores: [T, E] router logits.
        count: [E] how often each was chosen.
    """
    unit = scores / np.linalg.norm(scores, axis=0)
    alike = unit.T @ unit
    first = np.argsort(-count, kind="stable")[:keep]
    group = np.array([first[np.argmax(alike[e, first])] for e in range(len(count))])
    group[first] = first
    return group


def merged(experts: list[Matrices], weights: NDArray[np.float64]) -> Matrices:
    """Returns the average of experts (gate, up, down), neurons matched to those of the first."""
    sums: list[Tensor] = [weights[0] * m for m in experts[0]]
    g0, u0, d0 = experts[0]
    for (g, u, d), weight in zip(experts[1:], weights[1:], strict=True):
        alike = g0 @ g.T + u0 @ u.T + d0.T @ d
        _, order = linear_sum_assignment(-alike.numpy())
        matched = (g[order], u[order], d[:, order])
        sums = [total + weight * m for total, m in zip(sums, matched, strict=True)]
    return tuple(total / weights.sum() for total in sums)


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path, help="whose router logits say which experts are alike")
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    moe, calibration = open_moe(args.model), Calibration(args.calibration)
    model = Listening(moe, (moe.ladder[-1][0],), rate=1.0)
    L, E = len(moe.config.moe_layers), moe.config.num_experts
    count = np.stack([calibration.layer(i, "count") for i in calibration.layers])
    original = list(model.experts)

    pieces = partial(cut, moe, args.window)

    model.logits(pieces(args.text, 8))
    scores = [torch.cat(model.scores[i]).numpy() for i in range(L)]
    windows = pieces(args.held_out, args.windows)
    reference = log_probs(model, windows)
    print("| experts of their own | what becomes of the others | KL |\n|---|---|---|")
    for keep in (7 * E // 8, 3 * E // 4, E // 2):
        groups = [groups_of(scores[i], count[i], keep) for i in range(L)]
        for what in ("nothing", "the first of their group runs", "merged"):
            for i, group in enumerate(groups):
                for e, of in enumerate(group.tolist()):
                    row = original[i * E + of]
                    members = [of, *(m for m in np.flatnonzero(group == of).tolist() if m != of)]
                    if what == "merged" and len(members) > 1:
                        weights = np.maximum(count[i, members], 1).astype(np.float64)
                        row = merged([original[i * E + m] for m in members], weights)
                    elif what == "nothing" and e != of:
                        row = tuple(torch.zeros_like(m) for m in row)
                    model.experts[i * E + e] = row
            kl = divergences(reference, log_probs(model, windows))
            print(
                f"| {keep} of {E} | {what} | {kl.mean():.4f} ± {standard_error(kl, len(windows)):.4f} |",
                flush=True,
            )
    model.experts[:] = original


if __name__ == "__main__":
    main()
