"""Draws the picture of the README: tokens per second under memory caps, beside llama.cpp.

    python benchmarks/picture.py benchmarks/results/llama_cpp_caps.json docs/images/caps.svg [--model NAME]

The input is what `benchmarks/llama_cpp.py --caps … --json FILE` wrote. Needs the extra "lab".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="of several in the file")
    args = parser.parse_args()
    rows = [r for r in json.loads(args.rows.read_text())["rows"] if "share" in r and "ours" in r]
    model = args.model or rows[0]["model"]
    rows = sorted((r for r in rows if r["model"] == model), key=lambda r: -r["share"])

    mpl.rcParams.update({"svg.hashsalt": "edgemoe", "font.family": "sans-serif", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7, 1.1 + 0.75 * len(rows)))
    for y, row in enumerate(rows):
        for rate, at, colour in (
            (row["ours"], y - 0.19, "#d9480f"),
            (row["best"], y + 0.19, "#868e96"),
        ):
            axes.barh(at, rate, 0.34, color=colour)
            axes.text(rate, at, f" {rate:.1f}", va="center")
    axes.set_yticks(range(len(rows)), [f"memory for {r['share']:.0%}" for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(r["ours"] for r in rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"{model}, 4 bits: tokens per second", loc="left", fontsize=11)
    handles = [Rectangle((0, 0), 1, 1, color=c) for c in ("#d9480f", "#868e96")]
    axes.legend(handles, ["edgemoe", "llama.cpp"], loc="lower right", frameon=False)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
