"""Measures the overhead of decisions: microseconds per layer and token, for every scheduler and eviction, in decoding.

    python benchmarks/schedulers.py
    python benchmarks/schedulers.py --shapes 48x512x10 --rooms 0.25 --only next-use

It measures everything that happens per layer except reading and computing, on a store without a file: the plan with its
scores, the request with its evictions, and what happens once per token. Routing is random, with skewed frequencies and
half of the previous token's logits kept; memory is full before the first token. The first 256 tokens are not counted:
predictors learn from each of them, and afterwards from every eighth.

On a virtual machine, the same loop can take 1.7 times as long a minute later, when the host is busy elsewhere. So all
rows run in turns, `--rounds` times, and a row shows its best round: the sum of three medians or means over that round's
tokens. The least disturbed round is the best measure of what the code itself costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
from safetensors.numpy import save

from edgemoe.plan import Routing
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.evict import EVICTIONS
from edgemoe.scheduler.paths import SECTION
from edgemoe.store import ExpertStore

_SHAPES = ("16x64x8", "40x256x8", "48x512x10")
_ROOMS = (0.0, 0.25, 0.5, 1.0)
_LEVER_SETS: Mapping[str, Mapping[str, Any]] = {
    "cache_prior": {"cache_prior": 0.3},
    "top_p": {"top_p": 0.8},
    "miss_bits": {"miss_bits": 4},
}
_LEVEL_BITS, _LEVEL_BYTES = (2, 3, 4, 6, 8), (3 << 12, 4 << 12, 5 << 12, 7 << 12, 9 << 12)
_WARM = 256  # tokens that are not counted


def routings(count: int, shape: tuple[int, int, int], seed: int = 0) -> list[list[Routing]]:
    """Returns the routings of all layers, token by token, with one layer of look-ahead."""
    layers, experts, top_k = shape
    rng = np.random.default_rng(seed)
    bias = rng.normal(0, 1.5, (layers, experts))
    before = np.zeros((layers, experts))
    tokens = []
    for _ in range(count):
        logits = bias + rng.normal(0, 1.5, (layers, experts)) + 0.5 * before
        before = logits - bias
        order = np.argsort(-logits, axis=1)[:, :top_k].astype(np.int32)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
        gates = np.take_along_axis(scores, order, 1)
        tokens.append(
            [
                Routing(
                    i, order[i : i + 1], gates[i : i + 1],
                    order[None, i + 1 : i + 2] if i + 1 < layers else None,
                    gates[None, i + 1 : i + 2] if i + 1 < layers else None,
                    scores[i : i + 1],
                )
                for i in range(layers)
            ]
        )  # fmt: skip
    return tokens


def cost(
    setting: Setting, name: str, options: Mapping[str, Any], tokens: list[list[Routing]]
) -> tuple[float, float, float, float]:
    """Returns microseconds per layer and token for plans with scores, requests with evictions, and the rest; and the
    evictions per layer and token."""
    scheduler = SCHEDULERS[name](setting, **options)
    store = ExpertStore.dry(
        num_layers=setting.num_layers, num_experts=setting.num_experts, level_bits=setting.level_bits,
        level_bytes=setting.level_bytes, budget_bytes=setting.slots_bytes, policy=scheduler.policy,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    fit = setting.slots_bytes // setting.level_bytes[-1]
    some = rng.permutation(setting.num_layers * setting.num_experts)[:fit].astype(np.int32)
    store.load(some, np.full(len(some), setting.bits, np.int8))
    residency, clock = store.residency, time.thread_time
    scheduler.begin()
    plans, requests, after = [], [], []
    evicted = 0
    for i, layers in enumerate(tokens):
        if i == _WARM:
            evicted = store.stats["evictions"]
        planning = requesting = 0.0
        told = clock()
        scheduler.tokens(rng.integers(0, 1000, 1).astype(np.int32))
        rest = clock() - told
        sees_ahead = scheduler.look_ahead > 0
        for routing in layers:
            seen = routing if sees_ahead else _blind(routing)
            start = clock()
            plan = scheduler.plan(seen, residency)
            middle = clock()
            store.request(plan)
            for _ in store.ready_groups():
                pass
            requesting += clock() - middle
            planning += middle - start
        start = clock()
        scheduler.passed(1, 0.05)
        plans.append(planning)
        requests.append(requesting)
        after.append(rest + clock() - start)
    scale = 1e6 / setting.num_layers
    n = (len(tokens) - _WARM) * setting.num_layers
    return (
        float(np.median(plans[_WARM:])) * scale,
        float(np.median(requests[_WARM:])) * scale,
        float(np.mean(after[_WARM:])) * scale,
        (store.stats["evictions"] - evicted) / n,
    )


def _blind(r: Routing) -> Routing:
    return Routing(r.layer, r.experts, r.gates, scores=r.scores)


def paths(layers: int, experts: int, width: int = 192, rows: int = 16384) -> bytes:
    """Returns an untrained predictor of paths, of the usual size."""
    n, d = layers * experts, width
    shapes = {
        "w_input": (3 * d, d), "w_state": (3 * d, d), "b_input": (3 * d,), "b_state": (3 * d,),
        "now": (n, 2 * d), "now_bias": (n,), "next": (n, d), "next_bias": (n,),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    return save({"embedding": rng.normal(0, 0.1, (rows, d)).astype(np.float16), **tensors})


def _rows() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name in SCHEDULERS:
        yield name, name, {}
    yield "expertflow, habit", "expertflow", {"predictor": "habit"}
    for eviction in EVICTIONS[1:]:
        yield f"on-demand, {eviction}", "on-demand", {"eviction": eviction}
    for name, options in _LEVER_SETS.items():
        yield f"on-demand, {name}", "on-demand", options


def main() -> None:
    """Prints one table per shape: a row per scheduler, eviction and lever, and a column per room."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", default=_SHAPES, help="layers x experts x experts per token"
    )
    parser.add_argument(
        "--rooms", nargs="+", type=float, default=_ROOMS,
        help="shares of the experts that fit; 0 is twice what one layer's token uses",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="rows that have this in their name")
    parser.add_argument("--tokens", type=int, default=96, help="that are counted")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best is shown")
    args = parser.parse_args()
    for text in args.shapes:
        L, E, K = shape = tuple(map(int, text.split("x")))
        tokens = routings(args.tokens + _WARM, shape)
        sections = {SECTION: paths(L, E)}
        print(
            f"\n{L} layers of {E} experts, {K} per token; all = plan + request + once per token ÷ layers, evictions"
        )
        print("| scheduler | " + " | ".join(f"room {r:g}" for r in args.rooms) + " |")
        print("|---" * (len(args.rooms) + 1) + "|")
        rows = [row for row in _rows() if args.only in row[0]]
        cells: dict[tuple[str, float], tuple[float, float, float, float]] = {}
        for _, (label, name, options), room in product(range(args.rounds), rows, args.rooms):
            slots = max(int(L * E * room), 2 * K)
            setting = Setting(
                num_layers=L, num_experts=E, experts_per_token=K, bits=8, level_bits=_LEVEL_BITS,
                level_bytes=_LEVEL_BYTES, slots_bytes=slots * _LEVEL_BYTES[-1], sections=sections,
            )  # fmt: skip
            found = cost(setting, name, options, tokens)
            cells[label, room] = min(found, cells.get((label, room), found), key=_all)
        for label, _, _ in rows:
            shown = " | ".join(_cell(cells[label, room]) for room in args.rooms)
            print(f"| {label} | {shown} |", flush=True)


def _all(found: tuple[float, float, float, float]) -> float:
    return sum(found[:3])


def _cell(found: tuple[float, float, float, float]) -> str:
    plan, request, rest, evictions = found
    return f"**{_all(found):.1f}** = {plan:.1f} + {request:.1f} + {rest:.1f}, {evictions:.1f} out"


if __name__ == "__main__":
    main()
