"""Measures what deciding costs: microseconds per layer and token of every scheduler and eviction while decoding.

    python benchmarks/schedulers.py --layers 16 --experts 64 --top-k 8

Routing is random with skewed frequencies and half of an earlier token's experts kept; half of the experts are resident.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edgemoe.plan import Routing
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.evict import EVICTIONS
from edgemoe.scheduler.paths import SECTION

_LEVER_SETS: Mapping[str, Mapping[str, Any]] = {
    "cache_prior": {"cache_prior": 0.3},
    "top_p": {"top_p": 0.8},
    "miss_bits": {"miss_bits": 4},
}


def tokens(
    count: int, layers: int, experts: int, top_k: int, ahead: int, seed: int = 0
) -> Iterator[list[Routing]]:
    """Yields the routings of all layers, token by token."""
    rng = np.random.default_rng(seed)
    bias = rng.normal(0, 1.5, (layers, experts))
    before = np.zeros((layers, experts))
    for _ in range(count):
        logits = bias + rng.normal(0, 1.5, (layers, experts)) + 0.5 * before
        before = logits - bias
        order = np.argsort(-logits, axis=1)[:, :top_k].astype(np.int32)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
        gates = np.take_along_axis(scores, order, 1)
        yield [
            Routing(
                i, order[i : i + 1], gates[i : i + 1],
                order[i + 1 : i + 1 + ahead, None] if ahead and i + 1 < layers else None,
                gates[i + 1 : i + 1 + ahead, None] if ahead and i + 1 < layers else None,
                scores[i : i + 1],
            )
            for i in range(layers)
        ]  # fmt: skip


def cost(
    setting: Setting, name: str, options: Mapping[str, Any], count: int
) -> tuple[float, float]:
    """Returns the microseconds per layer and token of planning and of what happens once per token, medians."""
    scheduler = SCHEDULERS[name](setting, **options)
    rng = np.random.default_rng(1)
    residency: NDArray[np.int8] = (
        rng.random((setting.num_layers, setting.num_experts)) < 0.5
    ) * np.int8(len(setting.level_bits))
    scheduler.begin()
    plans, after = [], []
    for layers in tokens(
        count, setting.num_layers, setting.num_experts, setting.experts_per_token, scheduler.look_ahead
    ):  # fmt: skip
        told = time.thread_time()
        scheduler.tokens(rng.integers(0, 1000, 1).astype(np.int32))
        start = time.thread_time()
        for routing in layers:
            scheduler.plan(routing, residency)
        middle = time.thread_time()
        scheduler.passed(1, 0.05)
        plans.append(middle - start)
        after.append(time.thread_time() - middle + start - told)
    scale = 1e6 / setting.num_layers
    return float(np.median(plans)) * scale, float(np.mean(after)) * scale


def paths(layers: int, experts: int, width: int = 192, rows: int = 16384) -> bytes:
    """Returns a predictor of paths of the usual size, that knows nothing."""
    n, d = layers * experts, width
    shapes = {
        "w_input": (3 * d, d), "w_state": (3 * d, d), "b_input": (3 * d,), "b_state": (3 * d,),
        "now": (n, 2 * d), "now_bias": (n,), "next": (n, d), "next_bias": (n,),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    return save({"embedding": rng.normal(0, 0.1, (rows, d)).astype(np.float16), **tensors})


def main() -> None:
    """Prints one row per scheduler, eviction and lever."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    setting = Setting(
        num_layers=args.layers, num_experts=args.experts, experts_per_token=args.top_k, bits=8,
        level_bits=(2, 3, 4, 6, 8), level_bytes=(3 << 12, 4 << 12, 5 << 12, 7 << 12, 9 << 12),
        slots_bytes=args.layers * args.experts * (9 << 12) // 2,
        sections={SECTION: paths(args.layers, args.experts)},
    )  # fmt: skip
    rows: list[tuple[str, str, Mapping[str, Any]]] = [(name, name, {}) for name in SCHEDULERS]
    rows.append(("expertflow, habit", "expertflow", {"predictor": "habit"}))
    rows += [(f"on-demand, {e}", "on-demand", {"eviction": e}) for e in EVICTIONS[1:]]
    rows += [(f"on-demand, {name}", "on-demand", o) for name, o in _LEVER_SETS.items()]
    print("| scheduler | plan, µs per layer | per token, ÷ layers |\n|---|---|---|")
    for label, name, options in rows:
        plan, after = cost(setting, name, options, args.tokens)
        print(f"| {label} | {plan:.1f} | {after:.1f} |", flush=True)


if __name__ == "__main__":
    main()
