"""Measures what ExpertFlow's token scheduler would save: tokens of many sequences, split by experts into two batches.

    edgemoe profile trace MODEL.moe --text FILE --pieces 128 -o TRACE
    python benchmarks/grouping.py TRACE [--model MODEL.moe] [--sizes 2 4 8 16 32]

The trace's sequences are taken to run side by side. At random moments, one token of each of 2 T sequences goes into one
of two batches of T: in order; at random; by K-means with equal sizes on the Hamming distance of their paths, which are
the experts that they use in all layers (arXiv 2410.17954); and by K-means with swaps of pairs while these help, to come
near the best split. Paths are the true ones and, with --model, also those that the file's trained predictor gives once
a token is known. The figure is the number of experts that a batch needs per layer; each is one read if nothing is
resident. "One batch" is a single batch of all 2 T.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.file.reader import open_moe
from edgemoe.runtime.trace import Trace, read
from edgemoe.scheduler.paths import SECTION, PathPredictor

Paths = NDArray[np.bool_]
"""The experts that each token uses, [n, L, E]."""


def sequences(trace: Trace, length: int) -> tuple[NDArray[np.int64], Paths]:
    """Returns tokens [n, length] and paths [n, length, L, E] of all sequences of at least `length` tokens."""
    ids = trace.by_token("id")[:, 0].astype(np.int64)
    experts = trace.by_token("experts").astype(np.intp)
    starts = np.flatnonzero(trace.by_token("token")[:, 0] == 0)
    kept = [a for a, b in zip(starts, [*starts[1:], len(ids)], strict=True) if b - a >= length]
    at = np.array(kept)[:, None] + np.arange(length)
    uses = np.zeros((len(kept), length, experts.shape[1], trace.header.num_experts), bool)
    np.put_along_axis(uses, experts[at], True, axis=3)
    return ids[at], uses


def predicted(trace: Trace, section: bytes, ids: NDArray[np.int64]) -> Paths:
    """Returns the path that the predictor gives for each token, [n, length, L, E]."""
    h = trace.header
    predictor = PathPredictor.from_section(section, h.num_layers, h.num_experts)
    out = np.zeros((*ids.shape, h.num_layers, h.num_experts), bool)
    for i, row in enumerate(ids):
        predictor.begin()
        for t in range(len(row)):
            predictor.follow(row[t : t + 1])
            best = np.argpartition(-predictor.now, h.experts_per_token - 1, axis=1)
            np.put_along_axis(out[i, t], best[:, : h.experts_per_token], True, axis=1)
    return out


def needed(paths: Paths, first: NDArray[Any]) -> int:
    """Returns the number of experts, over all layers, that the tokens `first` need, plus that of the other tokens."""
    rest = np.ones(len(paths), bool)
    rest[first] = False
    return int(paths[first].any(axis=0).sum() + paths[rest].any(axis=0).sum())


def k_means(paths: Paths) -> NDArray[np.intp]:
    """Returns one of the two clusters of equal size that K-means finds."""
    points = paths.reshape(len(paths), -1).astype(np.float32)
    # Hamming distances of rows of zeros and ones; the two rows that differ most are the first centres.
    sums = points.sum(axis=1)
    distance = sums[:, None] + sums - 2 * points @ points.T
    centres = points[list(np.unravel_index(np.argmax(distance), distance.shape))]
    half = np.arange(0)
    for _ in range(20):
        nearer = np.abs(points[:, None] - centres).sum(axis=2)
        new = np.sort(np.argsort(nearer[:, 0] - nearer[:, 1], kind="stable")[: len(points) // 2])
        if np.array_equal(new, half):
            break
        half = new
        rest = np.setdiff1d(np.arange(len(points)), half)
        centres = np.array([points[half].mean(axis=0), points[rest].mean(axis=0)])
    return half


def swapped(paths: Paths, half: NDArray[np.intp]) -> NDArray[np.intp]:
    """Returns a half that no swap of two tokens improves, found by swaps from the given one."""
    best, half = needed(paths, half), half.copy()
    better = True
    while better:
        better = False
        for i in range(len(half)):
            for j in np.setdiff1d(np.arange(len(paths)), half):
                new = half.copy()
                new[i] = j
                if (count := needed(paths, new)) < best:
                    best, half, better = count, new, True
                    break
    return half


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace")
    parser.add_argument("--model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--draws", type=int, default=40)
    args = parser.parse_args()
    trace = read(args.trace)
    ids, paths = sequences(trace, args.length)
    guesses = None
    if args.model is not None:
        guesses = predicted(trace, open_moe(args.model).sections[SECTION], ids)
    rng = np.random.default_rng(0)
    names = ["in order", "random", "K-means", "and swaps"]
    names += [] if guesses is None else ["K-means, predicted paths"]
    print(f"{len(ids)} sequences, experts per layer that a batch of T needs:\n")
    print(
        f"| T | {' | '.join(names)} | one batch | gain of K-means, swaps |\n|{'---|' * (len(names) + 3)}"
    )
    for size in args.sizes:
        if 2 * size > len(ids):
            continue
        rows = []
        for _ in range(args.draws):
            which = np.sort(rng.permutation(len(ids))[: 2 * size])  # order is that of the text
            t = int(rng.integers(16, args.length))
            mine = paths[which, t]
            near = k_means(mine)
            halves = [np.arange(size), rng.permutation(2 * size)[:size], near, swapped(mine, near)]
            if guesses is not None:
                halves.append(k_means(guesses[which, t]))
            rows.append([*(needed(mine, half) for half in halves), 2 * mine.any(axis=0).sum()])
        means = np.mean(rows, axis=0) / 2 / paths.shape[2]
        print(
            f"| {size} | {' | '.join(f'{m:.2f}' for m in means)} | "
            f"{means[1] / means[2]:.2f}×, {means[1] / means[3]:.2f}× |",
            flush=True,
        )


if __name__ == "__main__":
    main()
