"""Reports and studies as tables of text: heading, column names, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgemoe.lab.routing.predictors import Prediction

__all__ = ["Table", "hit_rates", "markdown", "predictors", "srp", "studied", "usage", "waits"]

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def markdown(table: Table) -> str:
    """Returns a table as Markdown, without its heading."""
    _, columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def usage(values: Mapping[str, Any]) -> list[Table]:
    """Returns tables of what `report.usage` returns."""
    entropies = values["entropy"]
    shares = [_percent(s, 0) for s in values["shares"]]
    return [
        (
            f"Use of experts over {values['tokens']} tokens",
            ["uses taken by the hottest", *shares],
            [
                ["experts of a layer (mean)", *map(_percent, values["hottest_of_layer"])],
                ["experts of the model", *map(_percent, values["hottest_of_all"])],
            ],
        ),
        (
            "Evenness of use (entropy; 1 is uniform)",
            ["lowest layer", "mean", "highest layer", "experts never used"],
            [
                [
                    f"{min(entropies):.3f}", f"{sum(entropies) / len(entropies):.3f}",
                    f"{max(entropies):.3f}", str(values["never_used"]),
                ]
            ],
        ),
        (
            "Most used experts",
            ["layer", "expert", "of the tokens"],
            [[str(t["layer"]), str(t["expert"]), _percent(t["share"])] for t in values["top"]],
        ),
    ]  # fmt: skip


def srp(values: Mapping[str, Any]) -> Table:
    """Returns a table of the SRP in what `report.locality` returns."""
    return (
        "Segment routing best performance (SRP)",
        ["window m", "SRP", "95% interval", "samples", "size ρ", "mean of layers", "shuffled"],
        [
            [
                str(r["window"]), _percent(r["srp"]),
                f"{_percent(r['low'])} – {_percent(r['high'])}" if r["samples"] > 1 else "one sample",
                str(r["samples"]), f"{r['size']:.2f}",
                _percent(sum(r["layers"]) / len(r["layers"])), _percent(r["shuffled"]),
            ]
            for r in values["srp"]
        ],
    )  # fmt: skip


def hit_rates(values: Mapping[str, Any]) -> Table:
    """Returns a table of the hit rates in what `report.locality` returns."""
    names = {"lru": "LRU", "lfu": "LFU", "sch": "SCH(16)", "belady": "Belady"}
    return (
        "Hit rates of caches of ρ times a token's experts",
        ["ρ", "policy", "a cache per layer", "one pool", "one pool, shuffled"],
        [
            [
                f"{r['ratio']:g}", names[r["rule"]], _percent(r["layers"]), _percent(r["pool"]),
                _percent(r["pool_shuffled"]),
            ]
            for r in values["hit_rates"]
        ],
    )  # fmt: skip


def predictors(values: Sequence[Prediction]) -> Table:
    """Returns a table of what `predictors.predictions` returns."""
    return (
        "Predictors, second half of the single tokens",
        ["guess", "layers ahead", "recall", "useful of the bytes read", "of missed bytes in time", "in time per token"],
        [
            [
                p.name, p.when or str(p.distance),
                _percent(p.recall), _percent(p.useful), _percent(p.in_time), _megabytes(p.in_time_bytes),
            ]
            for p in values
        ],
    )  # fmt: skip


def waits(values: Mapping[str, Any]) -> list[Table]:
    """Returns tables of what `report.waits` returns."""
    parts = values["per_token"]
    total = sum(parts.values())
    words = {
        "before_us": "dense parts",
        "computing_us": "experts, computing",
        "wait_us": "waiting for reads",
    }
    late = values["percentiles_ms"]
    return [
        (
            f"Time of a single token ({values['rate']:.1f} tokens/s over {values['tokens']})",
            ["part", "ms", "share"],
            [
                [words[name], f"{us / 1e3:.2f}", _percent(us / total)]
                for name, us in parts.items()
            ],
        ),
        (
            "Single tokens",
            ["hit", "read/token", "bits", "skipped", "median", "95th percentile", "99th"],
            [
                [
                    _percent(values["hit_rate"]), _megabytes(values["bytes_per_token"]),
                    f"{values['average_bits']:.2f}", _percent(values["skipped"]),
                    f"{late['50']:.1f} ms", f"{late['95']:.1f} ms", f"{late['99']:.1f} ms",
                ]
            ],
        ),
    ]  # fmt: skip


def studied(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table of what `study.study` returns."""
    has_rate = any(r["rate"] for r in rows)
    columns = [
        "experts that fit",
        "line",
        "hit",
        "of these ahead",
        "shuffled",
        "read/token",
        "bits",
    ]
    has_device = any(r["vram_bytes"] for r in rows)
    columns += ["of a device", "run there", "copied/token"] * has_device
    columns += ["predicted t/s", "waiting"] * has_rate
    out = []
    for r in rows:
        line = [
            _percent(r["share"], 0), r["name"], _percent(r["hit_rate"]),
            _percent(r["ahead_hits"] / r["hits"]) if r["ahead_hits"] else "", _percent(r["shuffled_hit_rate"]),
            _megabytes(r["bytes_per_token"]), f"{r['average_bits']:.2f}",
        ]  # fmt: skip
        if has_device:
            line += [
                _percent(r["vram_share"], 0), _percent(r["device_rate"]), _megabytes(r["copied_per_token"])
            ]  # fmt: skip
        if has_rate and not r["rate"]:
            line += ["", ""]
        elif has_rate:
            line += [f"{r['rate']:.1f}", _percent(r["wait_s"] / r["seconds"], 0)]
        out.append([*line, "" if r["is_oracle"] else f"{r['plan_us']:.1f}"])
    return "Replays of the single tokens", [*columns, "plan µs"], out


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if value == value else "–"  # nan


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB" if value == value else "–"
