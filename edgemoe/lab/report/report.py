"""Summaries of a trace: which experts are used, how consistently, and where the time went."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemoe.lab.routing import metrics
from edgemoe.runtime.trace import Trace

__all__ = ["locality", "to_json", "usage", "waits"]

_SHARES = (0.1, 0.25, 0.5)
_WINDOWS = (4, 16, 64, 256)
_RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0)
_SAMPLE = 512  # tokens: the sample of arXiv 2505.16056, and enough for hit rates


def usage(trace: Trace, *, top: int = 10) -> dict[str, Any]:
    """Returns how often experts are used, over all tokens.

    Args:
        top: how many of the most used experts to list.

    Raises:
        ValueError: the trace has no complete pass.
    """
    experts = trace.by_token("experts").astype(np.int64)
    T, L, _ = experts.shape
    if T == 0:
        raise ValueError("usage: the trace has no token that went through all layers")
    E = trace.header.num_experts
    counts = np.zeros((L, E), np.int64)
    np.add.at(counts, (np.arange(L)[None, :, None], experts), 1)
    order = np.argsort(-counts.ravel(), kind="stable")[:top]
    entropies = [metrics.entropy(c) for c in counts]
    per_layer = np.array([metrics.share_of_hottest(c, _SHARES) for c in counts])
    return {
        "tokens": T,
        "counts": counts.tolist(),
        "never_used": int((counts == 0).sum()),
        "top": [
            {"layer": int(i // E), "expert": int(i % E), "share": float(counts.ravel()[i] / T)}
            for i in order
        ],
        "entropy": entropies,
        "shares": list(_SHARES),
        "hottest_of_layer": per_layer.mean(axis=0).tolist(),
        "hottest_of_all": metrics.share_of_hottest(counts.ravel(), _SHARES),
    }


def locality(trace: Trace) -> dict[str, Any]:
    """Returns the SRP, and the hit rates of caches of rho times a token's experts, with shuffled tokens as a control.

    Hit rates are over the first 512 tokens. "layers" is the mean over layers with a cache each; "pool" is one cache for
    all layers.
    """
    experts = trace.by_token("experts").astype(np.int64)
    T, L, K = experts.shape
    E = trace.header.num_experts
    control = metrics.shuffled(experts)
    consistency = []
    for window in _WINDOWS:
        if window > min(T, _SAMPLE):
            break
        counts = metrics.segment_counts(experts, E, window=window, sample=_SAMPLE)
        model = metrics.srp(counts)
        of_layers = [metrics.srp(counts, layer=layer).f1 for layer in range(L)]
        low, high = metrics.srp_interval(counts)
        mixed = metrics.segment_counts(control, E, window=window, sample=_SAMPLE)
        consistency.append(
            {
                "window": window, "srp": model.f1, "low": low, "high": high, "size": model.size,
                "samples": len(counts.counts), "layers": of_layers,
                "shuffled": metrics.srp(mixed).f1,
            }
        )  # fmt: skip
    rates = []
    part, mixed_part = experts[:_SAMPLE], control[:_SAMPLE]
    for ratio in _RATIOS:
        slots = round(ratio * K)
        if slots >= E:
            break
        for rule in metrics.RULES:
            layers = metrics.hit_rate(part, E, slots, rule)
            pool, pool_mixed = (
                float(metrics.hit_rate(metrics.merged(x, E), L * E, L * slots, rule)[0])
                for x in (part, mixed_part)
            )
            rates.append(
                {
                    "ratio": ratio, "slots": slots, "rule": rule, "layers": float(layers.mean()),
                    "pool": pool, "pool_shuffled": pool_mixed,
                }
            )  # fmt: skip
    return {"tokens": T, "srp": consistency, "hit_rates": rates}


def waits(trace: Trace) -> dict[str, Any]:
    """Returns where the time of single tokens went, and how often their experts were in memory.

    Raises:
        ValueError: there are fewer than two single tokens; the first one is not counted.
    """
    header = trace.header
    column = {
        name: trace.by_token(name, single=True)[1:].astype(np.float64)
        for name in ("before_us", "experts_us", "wait_us", "bytes_read")
    }
    T = len(column["wait_us"])
    if T < 1:
        raise ValueError("waits: expected a trace of at least 2 tokens computed one at a time")
    total = (column["before_us"] + column["experts_us"]).sum(axis=1)
    levels = np.zeros(256, np.int64)
    levels[list(header.level_bits)] = np.arange(1, len(header.level_bits) + 1)
    bits = trace.by_token("bits", single=True)[1:]
    found = (levels[bits] <= trace.by_token("resident", single=True)[1:]) & (bits > 0)
    layers = {
        "before_us": column["before_us"].mean(axis=0).tolist(),
        "computing_us": (column["experts_us"] - column["wait_us"]).mean(axis=0).tolist(),
        "wait_us": column["wait_us"].mean(axis=0).tolist(),
    }
    per_token = {name: float(sum(values)) for name, values in layers.items()}
    return {
        "tokens": T,
        "rate": float(1e6 / total.mean()),
        "per_token": per_token,
        "percentiles_ms": {str(q): float(np.percentile(total, q) / 1e3) for q in (50, 95, 99)},
        "bytes_per_token": float(column["bytes_read"].sum() / T),
        "hit_rate": float(found.sum() / max(1, (bits > 0).sum())),
        "average_bits": float(bits.sum() / max(1, (bits > 0).sum())),
        "skipped": float((bits == 0).mean()),
        "layers": layers,
    }


def to_json(report: Mapping[str, Any]) -> str:
    """Returns a report as JSON, with null for nan and infinity, which JSON does not have."""
    return json.dumps(_plain(report), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
