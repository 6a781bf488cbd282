"""Measures several conversations in one pass: how schedulers do with one token of each, for one and for four.

    python benchmarks/sequences.py MODEL.moe [--shares 0.5 0.25] [--counts 1 4] [-n 48] [--rounds 4]

Rows are `on-demand` with three evictions, and D2MoE with and without its order of reading (HEBF: the planes that most
tokens use come first). They run in turns, from the same prompts with the same random numbers; figures are medians over
rounds. The slots hold exactly the given share of the experts, whatever else takes memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

import edgemoe
from edgemoe.model import Batch
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions

KINDS: dict[str, dict[str, Any]] = {
    "on-demand": {"scheduler": "on-demand"},
    **{
        f"on-demand, {name}": {"scheduler": "on-demand", "options": {"eviction": name}}
        for name in ("frequency-distance", "next-use")
    },
    "d2moe, in the order of the file": {"scheduler": "d2moe", "options": {"hottest_first": False}},
    "d2moe, hottest first (HEBF)": {"scheduler": "d2moe", "options": {"hottest_first": True}},
}
TOPICS = ("the sea", "a bridge", "tea", "clocks", "the moon", "rain", "bread", "maps")


class Sequences:
    """Several conversations that decode side by side."""

    def __init__(self, path: str, count: int, slots: int, kind: dict[str, Any]) -> None:
        options = EngineOptions(sequences=count, context=512, slots=slots, **kind)
        opened = open_model(path, options)
        self.model, tokenizer = opened.model, opened.text.tokenizer
        assert tokenizer is not None
        self.states = [self.model.make_state() for _ in range(count)]
        self.rng = np.random.default_rng(0)
        self.rows = np.zeros((count, self.model.config.vocab_size), np.float32)
        for i, state in enumerate(self.states):
            ids = tokenizer.encode(f"A long story about {TOPICS[i]}. Once upon a time")
            self._pass([(state, np.array(ids, np.int32))], slice(i, i + 1))

    def _pass(self, parts: list[Any], rows: slice) -> None:
        hidden = self.model.forward(Batch.of(*parts))
        last = np.cumsum([len(ids) for _, ids in parts]) - 1
        self.model.logits(np.ascontiguousarray(hidden[last]), self.rows[rows], parts[0][0])

    def decode(self, tokens: int) -> tuple[float, float]:
        """Returns the seconds and the bytes read per token, over the tokens of all conversations."""
        before, start = self.model.counters.store["bytes_read"], time.perf_counter()
        for _ in range(tokens):
            chosen = (self.rows + self.rng.gumbel(size=self.rows.shape)).argmax(axis=1)
            parts = [(s, np.array([t], np.int32)) for s, t in zip(self.states, chosen, strict=True)]
            self._pass(parts, slice(0, len(parts)))
        made = tokens * len(self.states)
        read = self.model.counters.store["bytes_read"] - before
        return (time.perf_counter() - start) / made, float(read) / made


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("-n", type=int, default=48, help="tokens of each conversation and round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name begins so")
    args = parser.parse_args()
    with edgemoe.load(args.model, context=256) as engine:
        experts = engine.budget.experts
    print("| experts in memory | scheduler | conversations | tokens/s | read per token |")
    print("|---|---|---|---|---|")
    for share in args.shares:
        runs = {
            (name, count): Sequences(args.model, count, int(share * experts), kind)
            for name, kind in KINDS.items()
            if name.startswith(args.only)
            for count in args.counts
        }
        found: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in runs}
        for i in range(args.rounds + 1):
            for key, run in runs.items():
                result = run.decode(args.n)
                if i:  # the first round fills the slots
                    found[key].append(result)
        for (name, count), results in found.items():
            seconds, read = (statistics.median(column) for column in zip(*results, strict=True))
            print(
                f"| {share:.0%} | {name} | {count} | {1 / seconds:.2f} | {read / 2**20:.2f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
