"""Compares methods that give every expert its bits: KL divergence from the model's highest level at equal mean bits.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --text calibration.txt
    python benchmarks/allocation.py mini.moe mini.calib held_out.txt --measure calibration.txt

Only experts run at fewer bits; everything else runs at the file's highest level, which is also the reference. The text
is cut into windows, and the second half of each counts. `--measure` is the text on which expertwise searches; without
it, that method is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results
from halves import cut

from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.allocate import Settings, allocate
from edgemoe.lab.quality.loss import Loss
from edgemoe.quant import Calibration


def candidates(average: float) -> Iterator[tuple[str, str, Settings]]:
    """Yields a label, a method and its settings."""
    base = Settings(average_bits=average, protect=False)

    def but(**changes: Any) -> Settings:
        return dataclasses.replace(base, **changes)

    for seed in range(3):
        yield f"random, seed {seed}", "random", but(seed=seed)
    yield "first blocks", "first-blocks", base
    yield "outlier", "outlier", base
    yield "frequency", "frequency", base
    yield "frequency, 2 and 4", "frequency", but(levels=(2, 4))
    yield "pmq as published (1, 1, 2; 2 3 4; per layer)", "pmq", but(per_layer=True)
    yield "pmq as its code (1, 1.5, 1)", "pmq", but(per_layer=True, exponents=(1, 1.5, 1))
    yield "pmq over all layers", "pmq", base
    yield "expertwise as published (2 and 4)", "expertwise", base
    yield "expertwise, 2 and 3", "expertwise", but(levels=(2, 3))
    yield "error, per layer", "error", but(per_layer=True)
    yield "error, 2 and 3", "error", but(levels=(2, 3))
    yield "error, 2 3 4", "error", but(levels=(2, 3, 4))
    yield "error", "error", base
    yield "error, Super Experts protected", "error", but(protect=True)


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path, help="held out")
    parser.add_argument("--measure", type=Path, help="text of expertwise's search")
    parser.add_argument("--average", type=float, default=2.5, metavar="BITS")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--measured-windows", type=int, default=8)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    moe, calibration = open_moe(args.model), Calibration(args.calibration)
    shape = (len(moe.config.moe_layers), moe.config.num_experts)

    pieces = partial(cut, moe, args.window)

    measured = None if args.measure is None else pieces(args.measure, args.measured_windows)
    rows: list[dict[str, Any]] = []

    def add(label: str, bits: np.ndarray) -> None:
        rows.append({"method": label, "bits": float(bits.mean()), "kl": loss(bits)})
        print(f"| {label} | {bits.mean():.3f} | {rows[-1]['kl']:.5f} |", flush=True)

    print("| method | bits | KL |\n|---|---|---|")
    with Loss(args.model, pieces(args.text, args.windows), reference=moe.ladder[-1][0]) as loss:
        for rung in moe.ladder:
            add(f"uniform {rung[0]}", np.full(shape, rung[0], np.int8))
        for label, method, settings in candidates(args.average):
            if method == "expertwise" and measured is None:
                continue
            found = allocate(
                args.model, method, settings, calibration=calibration, windows=measured
            )
            add(label, found.bits)
    if args.json:
        results.write(args.json, rows)


if __name__ == "__main__":
    main()
