"""The table of measured quality, as `edgemoe quality` prints it and `edgemoe inspect` shows it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["QUALITY_HEAD", "change", "quality_line", "run_name"]

QUALITY_HEAD = """\
| scheduler | bits | dense bits | bits/weight | perplexity | bits/byte | change | KL | KL 99% | same top \
| same experts | read/token |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def quality_line(row: Mapping[str, Any]) -> str:
    """Returns a line for one of the rows that the report of `edgemoe quality` holds."""
    divergence = "reference | – | – | – | –"
    if row["kl"] is not None:
        divergence = (
            f"{change(row)} | {round(row['kl'], 6) + 0.0:.6f} ± {row['kl_error']:.6f} | {row['kl_99']:.5f} "
            f"| {100 * row['same_top']:.2f}% | {_percent(row.get('same_experts'))}"
        )
    read, per_byte = row["read_per_token"], row.get("bits_per_byte")  # older rows lack it
    return (
        f"| {run_name(row)} | {row['average_bits']:.3g} | {row['dense_bits']} "
        f"| {row['bits_per_weight']:.3f} | {row['perplexity']:.6g} "
        f"| {'–' if per_byte is None else f'{per_byte:.4f}'} | {divergence} "
        f"| {'–' if read is None else f'{read / 1e6:.2f} MB'} |"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}%"


def run_name(row: Mapping[str, Any]) -> str:
    """Returns a row's scheduler, its options, and the types of the KV cache that are not float16."""
    options = [f"{name}={value}" for name, value in row["options"].items()]
    caches = [
        f"-ct{letter} {kind}"
        for letter, kind in zip("kv", row["cache_types"], strict=True)
        if kind != "f16"
    ]
    return " ".join([row["scheduler"], *options, *caches])


def change(row: Mapping[str, Any]) -> str:
    """Returns how a row's perplexity differs from the reference's, ± the standard error of that."""
    return f"{100 * math.expm1(row['loss_change']):+.2f} ± {100 * row['loss_error']:.2f}%"
