"""Measures whether MC-MoE's 1-bit experts would pay: signs with a scale, against a file's 2 and 3 bits at equal means.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --text calibration.txt
    python benchmarks/one_bit.py mini.moe mini.calib held_out.txt

1 bit is the sign of a weight, times the mean magnitude of 16 columns of its row (the least-squares scale). The bits of
each expert are chosen exactly, for the least sum of gate^2 * change of the output, which is estimated from the squares
of each matrix's inputs. Only experts get fewer bits; everything else and the reference are at the file's highest level.
The file and the signs are both rounded without error compensation. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from halves import divergences, log_probs
from numpy.typing import NDArray
from torch import Tensor

from edgemoe.file.reader import open_moe
from edgemoe.lab.bits import rules
from edgemoe.lab.bits.bit_router import Routed
from edgemoe.lab.bits.calibrate import windows_of
from edgemoe.lab.quality.loss import standard_error
from edgemoe.quant import Calibration

GROUP = 16
Matrices = tuple[Tensor, ...]


def signs(w: Tensor) -> Tensor:
    """Returns a matrix in 1 bit."""
    groups = w.reshape(len(w), -1, GROUP)
    return (groups.sign() * groups.abs().mean(2, keepdim=True)).reshape(w.shape)


class Mixed(Routed):
    """A model whose experts may be any of several versions."""

    def versions(self, levels: tuple[int, ...]) -> list[list[Matrices]]:
        """Returns all experts at each of some levels, 1 among them."""
        return [
            [tuple(map(signs, e)) for e in self._experts[self._full]]
            if b == 1
            else list(self._experts[b])
            for b in levels
        ]

    @property
    def experts(self) -> list[Matrices]:
        """The experts that run; each may be replaced."""
        return self._experts[self._full]


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path, help="held out")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    moe, c = open_moe(args.model), Calibration(args.calibration)
    levels = (1, 2, 3)
    model = Mixed(moe, levels[1:], rate=1.0)
    versions, full = model.versions(levels), list(model.experts)
    windows = windows_of(
        moe, args.text.read_text(encoding="utf-8"), window=args.window, count=args.windows
    )

    reference = log_probs(model, windows)

    def known(what: str) -> NDArray[np.float64]:
        return np.concatenate([c.layer(i, what) for i in c.layers]).astype(np.float64)

    weight = known("gates2") / np.maximum(known("count"), 1)
    flows = [known("in.squares")] * 2 + [known("hidden.squares")]
    cost = np.zeros((len(full), len(levels)))
    for row, expert in enumerate(full):
        for level, version in enumerate(versions):
            for w, v, squares in zip(expert, version[row], flows, strict=True):
                cost[row, level] += weight[row] * float(
                    (w - v).square().sum(0).numpy() @ squares[row]
                )
    print("| experts | mean bits | 1, 2, 3 bits | KL |\n|---|---|---|---|")

    def row(name: str, choice: NDArray[np.int64]) -> None:
        model.experts[:] = [versions[level][i] for i, level in enumerate(choice)]
        kl = divergences(reference, log_probs(model, windows))
        counts = np.bincount(choice, minlength=3)
        print(
            f"| {name} | {np.array(levels)[choice].mean():.2f} | {counts.tolist()} "
            f"| {kl.mean():.5f} ± {standard_error(kl, len(windows)):.5f} |",
            flush=True,
        )

    for level, bits in enumerate(levels):
        row(f"{bits} for all", np.full(len(full), level))
    for average in (1.75, 2.0, 2.25, 2.5):
        total = int(average * len(full))
        row("1, 2, 3", rules.cheapest(cost, levels, total))
        if average > 2:
            row("2, 3", rules.cheapest(cost[:, 1:], levels[1:], total) + 1)


if __name__ == "__main__":
    main()
