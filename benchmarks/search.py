"""Compares one search over everything with the best of `error` at the same bytes: KL from the file's highest level.

    edgemoe convert path/to/mini-moe mini.moe
    edgemoe calibrate mini.moe --text calibration.txt
    edgemoe allocate mini.moe --method search --bytes 16MiB --context 1024 --calibration mini.calib -o found.json
    python benchmarks/search.py mini.moe mini.calib held_out.txt found.json found.kv.json

`error` gives experts their bits; all other matrices share one number of bits, and all keys and values one type. Every
pair of these that leaves enough bytes for the experts is measured. The search has seen none of this text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import results
from numpy.typing import NDArray

from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.allocate import Settings, allocate
from edgemoe.lab.bits.calibrate import windows_of
from edgemoe.lab.bits.kv_types import KINDS
from edgemoe.lab.bits.units import Choice, Units
from edgemoe.lab.quality.loss import standard_error
from edgemoe.lab.quality.mixed_loss import MixedLoss
from edgemoe.model import KvTable
from edgemoe.quant import Allocation, Calibration


def found_choice(units: Units, allocation: Allocation, table: KvTable) -> Choice:
    """Returns the choice of an allocation and a table of KV cache types."""
    levels = [rung[0] for rung in units.moe.ladder]
    experts = [levels.index(b) for b in allocation.bits.reshape(-1).tolist()]
    dense = [units.moe.dense_ladder.index(allocation.dense[name]) for name in units.matrices]
    rows = [table.layers[cell.layer] or ("f16", "f16") for cell in units.cells]
    kv = [KINDS.index(row[cell.side]) for row, cell in zip(rows, units.cells, strict=True)]
    return np.array([*experts, *dense, *kv])


def main() -> None:
    """Parses the command line, measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path, help="held out")
    parser.add_argument("allocation", type=Path, help="what the search found")
    parser.add_argument("table", type=Path, help="its keys and values")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    moe, calibration = open_moe(args.model), Calibration(args.calibration)
    allocation = Allocation.from_json(args.allocation.read_bytes(), str(args.allocation))
    table = KvTable.from_json(args.table.read_bytes(), str(args.table))
    total, context = allocation.settings["bytes"], allocation.settings["context"]
    units = Units(moe, context=context)
    text = args.text.read_text(encoding="utf-8")
    windows = windows_of(moe, text, window=args.window, count=args.windows)
    loss = MixedLoss(args.model, windows, threads=args.threads)
    rows: list[dict[str, Any]] = []

    def measure(label: str, choice: Choice) -> NDArray[np.float64]:
        kl = loss([units.mix(choice)]).reshape(-1)
        rows.append({"what": label, "bytes": units.bytes(choice), "kl": float(kl.mean())})
        error = standard_error(kl, len(windows))
        print(
            f"| {label} | {rows[-1]['bytes'] / 2**20:.3f} | {kl.mean():.5f} ± {error:.5f} |",
            flush=True,
        )
        return kl

    print(f"at most {total} bytes, context {context}\n\n| what | MiB | KL |\n|---|---|---|")
    ours = measure("search", found_choice(units, allocation, table))
    best = None
    E = units.num_experts
    for level, bits in enumerate(moe.dense_ladder):
        for kind_level, kind in enumerate(KINDS):
            choice = np.zeros(len(units), np.int64)
            choice[E : E + len(units.matrices)] = level
            choice[E + len(units.matrices) :] = kind_level
            room = total - units.bytes(choice)  # beyond the experts' fewest bits
            if room < 0:
                continue
            # The bytes per bit differ from level to level by scales and padding, so the average is found by bisection.
            low, high = moe.ladder[0][0], moe.ladder[-1][0]
            ladder = [rung[0] for rung in moe.ladder]
            kept = None
            for _ in range(12):
                average = (low + high) / 2
                try:
                    given = allocate(
                        args.model, "error", Settings(average_bits=average), calibration=calibration
                    )
                except ValueError:  # the protected experts alone take more
                    low = average
                    continue
                choice[:E] = [ladder.index(b) for b in given.bits.reshape(-1).tolist()]
                if units.bytes(choice) <= total:
                    low, kept = average, choice.copy()
                else:
                    high = average
            if kept is None:
                continue
            kl = measure(
                f"error, {units.expert_bits(kept).mean():.2f} bits; others {bits}; {kind}", kept
            )
            if best is None or kl.mean() < best.mean():
                best = kl
    assert best is not None
    change = ours - best
    print(
        f"\nthe search against the best of them: {100 * (ours.mean() / best.mean() - 1):+.1f}%, "
        f"difference {change.mean():+.6f} ± {standard_error(change, len(windows)):.6f}"
    )
    if args.json:
        results.write(args.json, rows)


if __name__ == "__main__":
    main()
