"""Measures ExpertFlow's token scheduler on real batches: bytes read when sequences decode side by side.

    python benchmarks/token_batches.py MODEL.moe TEXT [--sequences 8] [--room 0.25]

Sequences of the text decode their own tokens, with memory for a share of the experts: all in one batch; in two batches,
in order; and in two batches that are chosen anew at every token, by K-means with equal sizes on paths (arXiv
2410.17954). The paths are those of each sequence's last token, which are known, or those of the token itself, which no
predictor can improve on. The answers are the same in all cases.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from grouping import k_means
from numpy.typing import NDArray

from edgemoe.experts import Observer
from edgemoe.file.reader import open_moe
from edgemoe.model import Batch
from edgemoe.plan import Plan, Routing
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.store import all_expert_bytes
from edgemoe.text.tokenizer import Tokenizer

PROMPT = 32


class Paths(Observer):
    """An observer that keeps the experts of the last pass."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = num_layers, num_experts
        self.last = np.zeros((0, *self._shape), bool)
        """[n, L, E]: the experts that the pass's tokens use."""

    def planned(self, routing: Routing, plan: Plan, residency: NDArray[np.int8]) -> None:
        """See `Observer.planned`."""
        if routing.layer == 0:
            self.last = np.zeros((len(routing.experts), *self._shape), bool)
        np.put_along_axis(
            self.last[:, routing.layer], routing.experts.astype(np.intp), True, axis=1
        )


def decoded(
    path: Path, tokens: NDArray[np.int32], how: str, slots: int, known: NDArray[np.bool_] | None
) -> tuple[float, float, NDArray[np.bool_]]:
    """Decodes tokens [n, T] after their first `PROMPT`; returns bytes read and experts run per token, and all paths."""
    n, T = tokens.shape
    config = open_moe(path).config
    seen = Paths(len(config.moe_layers), config.num_experts)
    options = EngineOptions(slots=slots, sequences=n, context=T, observer=seen)
    model = open_model(path, options).model
    states = [model.make_state() for _ in range(n)]
    for state, ids in zip(states, tokens, strict=True):
        model.forward(Batch.of((state, ids[:PROMPT])))
    paths = np.zeros((T, n, *seen.last.shape[1:]), bool)
    before, ran = int(model.store.stats["bytes_read"]), 0
    for t in range(PROMPT, T):
        every, half = np.arange(n), np.arange(n // 2)
        if how == "last" and t > PROMPT:
            half = k_means(paths[t - 1])
        elif how == "own" and known is not None:
            half = k_means(known[t])
        groups = [every] if how == "one" else [half, np.setdiff1d(every, half)]
        for group in groups:
            model.forward(Batch.of(*((states[i], tokens[i, t : t + 1]) for i in group)))
            paths[t, group] = seen.last
            ran += int(seen.last.any(axis=0).sum())
    read = int(model.store.stats["bytes_read"]) - before
    return read / n / (T - PROMPT), ran / n / (T - PROMPT), paths


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--room", type=float, default=0.25)
    args = parser.parse_args()
    moe = open_moe(args.model)
    ids = Tokenizer.from_files(moe.sections).encode(args.text.read_text(encoding="utf-8"))
    n, T = args.sequences, args.length
    starts = np.linspace(0, len(ids) - T, n).astype(int)
    tokens = np.array([ids[start : start + T] for start in starts], np.int32)
    slots = int(args.room * all_expert_bytes(moe, len(moe.ladder)))
    print("| batches | KB read per token | experts run per token |\n|---|---|---|")
    known = None
    for how, name in (
        ("one", f"one of {n}"), ("order", f"two of {n // 2}, in order"),
        ("last", "two, by the paths of the last tokens"), ("own", "two, by the paths of the tokens themselves"),
    ):  # fmt: skip
        read, ran, paths = decoded(args.model, tokens, how, slots, known)
        known = paths if known is None else known
        print(f"| {name} | {read / 1e3:.0f} | {ran:.1f} |", flush=True)


if __name__ == "__main__":
    main()
