"""Plots of quality, drawn with matplotlib."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_plot", "plot_quality"]

_ENDINGS = (".png", ".svg", ".pdf")


def check_plot(path: str | os.PathLike[str]) -> None:
    """Checks that a plot can be made, before the measurements that it will show.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
        ValueError: the file's name has an unknown ending.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a plot needs matplotlib: pip install 'edgemoe[lab]'")
    if Path(path).suffix not in _ENDINGS:
        raise ValueError(f"{os.fspath(path)}: expected a name that ends in {', '.join(_ENDINGS)}")


def plot_quality(
    rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str
) -> None:
    """Draws KL divergence over bits per weight, a line per scheduler.

    Args:
        rows: each with scheduler, bits_per_weight, kl (mean) and kl_99 (99th percentile), KL in nats; the reference,
            whose kl is None, is left out.
        path: of the file to write, .png, .svg or .pdf.

    Raises:
        ValueError: there is nothing to draw, or the file's name has an unknown ending.
        ImportError: matplotlib is missing.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # not pyplot, which keeps state and may need a display

    known = [row for row in rows if row["kl"] is not None]
    if not known:
        raise ValueError("nothing to draw: only the reference was measured")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["scheduler"] for row in known):
        mine = [row for row in known if row["scheduler"] == name]
        mine.sort(key=lambda row: float(row["bits_per_weight"]))
        sizes = [row["bits_per_weight"] for row in mine]
        (line,) = axes.plot(sizes, [row["kl"] for row in mine], "o-", label=f"{name}: mean")
        far = [row["kl_99"] for row in mine]
        axes.plot(sizes, far, ".--", color=line.get_color(), label=f"{name}: 99%")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("KL divergence from the reference, nats")
    axes.set_title(title, fontsize="small", wrap=True)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
