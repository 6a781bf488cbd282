"""The table of measured quality, as `edgemoe quality` prints it and `edgemoe inspect` shows it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["QUALITY_HEAD", "quality_line"]

QUALITY_HEAD = """\
| scheduler | bits | dense bits | bits/weight | perplexity | KL | KL 99% | same top |
|---|---|---|---|---|---|---|---|"""


def quality_line(row: Mapping[str, Any]) -> str:
    """Returns a line for one of the rows that the report of `edgemoe quality` holds."""
    divergence = "reference | – | –"
    if row["kl"] is not None:
        divergence = (
            f"{row['kl']:.6f} ± {row['kl_error']:.6f} | {row['kl_99']:.5f} "
            f"| {100 * row['same_top']:.2f}%"
        )
    return (
        f"| {row['scheduler']} | {row['average_bits']:.3g} | {row['dense_bits']} "
        f"| {row['bits_per_weight']:.3f} | {row['perplexity']:.6g} | {divergence} |"
    )
