"""Draws the picture of the README: tokens per second under memory caps, for edgemoe and llama.cpp.

    python benchmarks/picture.py benchmarks/results/llama_cpp.json docs/images/caps.svg [--models NAME …]

The input is what `benchmarks/llama_cpp.py --caps … --json FILE` wrote: bars are medians, lines reach from the least to
the most. Needs the extra "lab".
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

OURS, THEIRS = "#d9480f", "#868e96"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", help="of several in the file (default: all)")
    args = parser.parse_args()
    cells: dict[tuple[str, float], list[dict]] = {}
    for row in json.loads(args.rows.read_text())["rows"]:
        if "hit_rate" in row and (not args.models or row["model"] in args.models):
            cells.setdefault((row["model"], row["share"]), []).append(row)
    names = list(dict.fromkeys(args.models or [model for model, _ in cells]))
    order = sorted(cells, key=lambda cell: (names.index(cell[0]), -cell[1]))

    mpl.rcParams.update({"svg.hashsalt": "edgemoe", "font.family": "sans-serif", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.75 * len(order)))
    for y, cell in enumerate(order):
        for side, at, colour in (("ours", y - 0.19, OURS), ("theirs", y + 0.19, THEIRS)):
            rates = [row[side] for row in cells[cell] if row.get(side)]
            middle, low, high = statistics.median(rates), min(rates), max(rates)
            axes.barh(at, middle, 0.34, color=colour)
            axes.plot((low, high), (at, at), color="#212529", linewidth=1.2)
            axes.text(high, at, f"  {middle:.1f}", va="center")
    labels = [f"{model}\nmemory for {share:.0%} of it" for model, share in order]
    axes.set_yticks(range(len(order)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(row["ours"] for rows in cells.values() for row in rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("4 bits: tokens per second, median and range", loc="left", fontsize=11)
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in (OURS, THEIRS)]
    axes.legend(handles, ["edgemoe", "llama.cpp"], loc="lower right", frameon=False)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
