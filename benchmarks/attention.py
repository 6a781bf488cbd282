"""Times one layer's attention at some depth of the context, for types of keys and values in turns; needs no model.

    python benchmarks/attention.py [--shape 32,4,128] [--depth 8192] [--threads 2] [--types f16,q8_0,q4_0]

Times of single tokens are medians over rounds through several layers, which together do not fit the processor's caches.
The time of a prompt is that of the last 256 tokens of the depth, measured once.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from edgemoe import _core

LAYERS, CHUNK = 8, 256


class Attention:
    """One layer's attention of some shape, whose rotary angles are all 0."""

    def __init__(self, shape: tuple[int, int, int], depth: int, threads: int) -> None:
        self.heads, self.kv_heads, self.columns = shape
        self.capacity = depth + CHUNK
        self._ws = _core.Workspace(threads, CHUNK, 64, 64, self.capacity, self.columns, self.heads)
        self._all, self._few = (self._layer(window) for window in (0, 32))
        self._rng = np.random.default_rng(0)

    def _layer(self, window: int) -> _core.AttentionLayer:
        return _core.AttentionLayer(
            index=0, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.columns, window=window,
            scale=self.columns**-0.5, q_bias=None, k_bias=None, v_bias=None, q_norm=None, k_norm=None,
            norm_per_head=False, norm_eps=1e-6, clip=0.0,
        )  # fmt: skip

    def cache(self, kind: str) -> _core.KvLayer:
        """Returns an empty cache."""
        return _core.KvLayer(
            key_type=kind, value_type=kind, num_heads=self.kv_heads, capacity=self.capacity,
            head_dim=self.columns,
        )  # fmt: skip

    def rows(self, count: int) -> list[NDArray[np.float32]]:
        """Returns random queries, keys and values of `count` tokens."""
        return [
            self._rng.standard_normal((count, n * self.columns)).astype(np.float32)
            for n in (self.heads, self.kv_heads, self.kv_heads)
        ]

    def run(self, pos: int, kv: _core.KvLayer, *, all: bool = True) -> float:
        """Runs CHUNK tokens from `pos` on, or one token after the depth; returns the seconds."""
        count = CHUNK if pos + CHUNK < self.capacity else 1
        q, k, v = self.rows(count)
        cos = np.ones((count, self.columns // 2), np.float32)
        layer, out = self._all if all else self._few, np.empty_like(q)
        start = time.perf_counter()
        _core.attention(self._ws, layer, q, k, v, pos, cos, 0 * cos, None, kv, out)
        return time.perf_counter() - start


def main() -> None:
    """Parses the command line and prints a row for each type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="32,4,128", help="heads, kv heads, columns of each")
    parser.add_argument("--depth", type=int, default=8192, help=f"a multiple of {CHUNK}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default="f16,q8_0,q4_0,q3_0,q2_0")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    heads, kv_heads, columns = map(int, args.shape.split(","))
    attention = Attention((heads, kv_heads, columns), args.depth, args.threads)
    kinds, prompt, caches = args.types.split(","), {}, {}
    for kind in kinds:
        first, *others = caches[kind] = [attention.cache(kind) for _ in range(LAYERS)]
        for pos in range(0, args.depth, CHUNK):
            is_last = pos + CHUNK == args.depth
            prompt[kind] = attention.run(pos, first, all=is_last)
        for other in others:
            other.take(first, 0, args.depth)
    token: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind in kinds:
            spent = sum(attention.run(args.depth, kv) for kv in caches[kind])
            token[kind].append(spent / LAYERS)
    print(f"{_core.isa()}, {args.shape} at {args.depth}, {args.threads} threads")
    print("| keys, values | a token, µs a layer | the prompt's last 256, ms |\n|---|---|---|")
    for kind in kinds:
        print(f"| {kind} | {statistics.median(token[kind]) * 1e6:.0f} | {prompt[kind] * 1e3:.0f} |")


if __name__ == "__main__":
    main()
