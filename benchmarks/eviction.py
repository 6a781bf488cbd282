"""Compares eviction policies on a model's own routing of a text, in the runtime's cache.

    python benchmarks/eviction.py MODEL.moe --text FILE --experts 4 8 --room 0.25 0.5 0.75
    python benchmarks/eviction.py MODEL.moe --text FILE --fit-hobbit

The text runs through the model once per number of experts. Then every policy sees the same routing, token by token,
with a cache that reads nothing. Belady's optimum knows the future. "Best way" is how far the best policy gets from LRU
to the optimum. `--fit-hobbit` searches a grid for the weights of HOBBIT's priority with the most hits, for each room.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgemoe
from edgemoe.experts import Observer
from edgemoe.file.reader import open_moe
from edgemoe.plan import Plan, Priorities, Routing
from edgemoe.scheduler import SCHEDULERS, Setting
from edgemoe.scheduler.evict import EVICTIONS
from edgemoe.scheduler.paths import SECTION
from edgemoe.store import ExpertStore

_PAGE = 4096
_WARM = 50  # tokens that are not counted


class Recorder(Observer):
    """An observer that keeps every routing, token by token."""

    def __init__(self) -> None:
        self.layers: dict[int, list[Routing]] = {}

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """See `Observer.planned`."""
        assert routing.scores is not None
        e, g, s = routing.experts.copy(), routing.gates.copy(), routing.scores.copy()
        for t in range(len(e)):
            one = slice(t, t + 1)
            self.layers.setdefault(routing.layer, []).append(
                Routing(routing.layer, e[one], g[one], scores=s[one])
            )

    def tokens(self) -> list[tuple[Routing, ...]]:
        """Returns the routings of each token's layers."""
        return list(zip(*(self.layers[i] for i in sorted(self.layers)), strict=True))


def record(
    model: Path, text: str, *, experts: int | None, count: int
) -> tuple[Setting, list[tuple[Routing, ...]], NDArray[np.int32]]:
    """Returns the model's shape, the routing of a text, and its tokens."""
    recorder = Recorder()
    with edgemoe.load(model, experts=experts, context=count + 1, observer=recorder) as engine:
        assert engine.tokenizer is not None
        ids = np.array(engine.tokenizer.encode(text)[:count], np.int32)
        engine.logits(ids, last_only=True)
        c = engine.config
        setting = Setting(
            num_layers=len(c.moe_layers), num_experts=c.num_experts,
            experts_per_token=c.experts_per_token, bits=8, level_bits=(8,), level_bytes=(_PAGE,),
            slots_bytes=0, sections=open_moe(model).sections,
        )  # fmt: skip
    return setting, recorder.tokens(), ids


def store(setting: Setting, room: float, policy: Any) -> ExpertStore:
    """Returns a cache without a file, with room for a share of all experts."""
    experts = int(room * setting.num_layers * setting.num_experts)
    return ExpertStore.dry(
        num_layers=setting.num_layers, num_experts=setting.num_experts,
        level_bits=setting.level_bits, level_bytes=setting.level_bytes,
        budget_bytes=max(experts, 1) * _PAGE, policy=policy,
    )  # fmt: skip


def hit_rate(
    setting: Setting,
    tokens: Sequence[tuple[Routing, ...]],
    ids: NDArray[np.int32],
    room: float,
    options: Mapping[str, Any],
) -> float:
    """Returns the hit rate with an eviction policy and without reading ahead, after the first tokens."""
    # expertflow is no eviction policy, but a scheduler with one of its own.
    name = "on-demand" if "eviction" in options else "expertflow"
    alone = {"look_ahead": False} if "eviction" in options else {"prefetch": 0}
    scheduler = SCHEDULERS[name](setting, **alone, **options)
    cache = store(setting, room, scheduler.policy)
    scheduler.begin()
    base = cache.stats
    for i, layers in enumerate(tokens):
        if i == _WARM:
            base = cache.stats
        scheduler.tokens(ids[i : i + 1])
        for routing in layers:
            cache.request(scheduler.plan(routing, cache.residency))
            for _ in cache.ready_groups():
                pass
        scheduler.passed(1, 0.0)
    return _rate(base, cache.stats)


def belady(setting: Setting, tokens: Sequence[tuple[Routing, ...]], room: float) -> float:
    """Returns the same for Belady's optimum, which drops the expert whose next use is furthest away."""
    L, E, K = setting.num_layers, setting.num_experts, setting.experts_per_token
    future = np.empty((len(tokens), L, K))
    soon = np.full((L, E), np.inf)
    for t in range(len(tokens) - 1, -1, -1):
        for layer, routing in enumerate(tokens[t]):
            future[t, layer] = soon[layer, routing.experts[0]]
            soon[layer, routing.experts[0]] = t * L + layer
    priorities = Priorities.zeros(L, E)
    scheduler = SCHEDULERS["on-demand"](setting, look_ahead=False)
    cache = store(setting, room, priorities)
    base = cache.stats
    for t, layers in enumerate(tokens):
        if t == _WARM:
            base = cache.stats
        for layer, routing in enumerate(layers):
            priorities.scores[layer, routing.experts[0]] = -np.minimum(future[t, layer], 1e18)
            priorities.version[layer] += 1
            cache.request(scheduler.plan(routing, cache.residency))
            for _ in cache.ready_groups():
                pass
    return _rate(base, cache.stats)


def _rate(base: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    hits, misses = now["hits"] - base["hits"], now["misses"] - base["misses"]
    return float(hits / (hits + misses))


def fit_hobbit(
    setting: Setting, tokens: Sequence[tuple[Routing, ...]], ids: NDArray[np.int32], room: float
) -> None:
    """Prints the best weights of a grid; they sum to 1, and so w_high is the rest. All uses are at high precision."""
    best = []
    for r, f, d in itertools.product((0, 0.1, 0.25, 0.5, 0.75), repeat=3):
        if (rest := 1 - r - f - d) < 0:
            continue
        options = {
            "eviction": "hobbit",
            "w_recency": r,
            "w_frequency": f,
            "w_high": rest,
            "w_distance": d,
        }
        best.append((hit_rate(setting, tokens, ids, room, options), r, f, rest, d))
    for rate, r, f, h, d in sorted(best, reverse=True)[:5]:
        print(f"{rate:.4f}  w_recency={r:g} w_frequency={f:g} w_high={h:g} w_distance={d:g}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--experts", type=int, nargs="+", default=[None], help="per token")
    parser.add_argument("--room", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--tokens", type=int, default=1100)
    parser.add_argument("--fit-hobbit", action="store_true")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    has_paths = SECTION in open_moe(args.model).sections
    names = ["lru", *(e for e in EVICTIONS if e != "lru" and (has_paths or e != "next-path"))]
    kinds = ["habit", *(["trained"] if has_paths else [])]
    if not args.fit_hobbit:
        listed = " | ".join([*names, *(f"expertflow, {kind}" for kind in kinds)])
        print(f"| experts | room | {listed} | Belady | best way |")
        print(f"|{'---|' * (len(names) + len(kinds) + 4)}")
    for experts in args.experts:
        setting, tokens, ids = record(args.model, text, experts=experts, count=args.tokens)
        for room in args.room:
            if args.fit_hobbit:
                print(f"{setting.experts_per_token} experts, room for {room:.0%}:")
                fit_hobbit(setting, tokens, ids, room)
                continue
            ways = [{"eviction": name} for name in names] + [{"predictor": kind} for kind in kinds]
            rates = [hit_rate(setting, tokens, ids, room, way) for way in ways]
            optimum = belady(setting, tokens, room)
            way = (max(rates) - rates[0]) / (optimum - rates[0])
            print(
                f"| {setting.experts_per_token} | {room:.0%} | "
                + " | ".join(f"{r:.3f}" for r in rates) + f" | {optimum:.3f} | {way:.0%} |",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
