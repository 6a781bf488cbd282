"""Measures the cost of heads that see only the first and last tokens (streaming, as in RLKV, arXiv 2510.08525).

    edgemoe convert path/to/mini-moe mini.moe
    python benchmarks/streaming_heads.py mini.moe calibration.txt held_out.txt

A streaming head keeps the first 16 and the last 64 tokens. Heads are ranked without training, on one text: by the
attention that they pay to the other tokens, and by the KL divergence when one head alone streams. The heads that lose
least then stream together, on another text. Everything is in float32. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from halves import cut, divergences, log_probs
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgemoe.file.reader import open_moe
from edgemoe.lab.bits.bit_router import Routed
from edgemoe.lab.quality.loss import standard_error
from edgemoe.specs import AttentionSpec

FIRST, LAST = 16, 64


class Heads:
    """A replacement for attention, in which some heads stream; called once for each layer."""

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.streams = np.zeros((layers, kv_heads), bool)
        self.outside = np.zeros((layers, kv_heads))
        """[layers, kv_heads]: the attention paid to tokens that streaming would drop, summed over tokens."""
        self._layer = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float
    ) -> Tensor:
        """Returns what `functional.scaled_dot_product_attention` does, [N, heads, T, d]."""
        layers, kv_heads = self.streams.shape
        T, repeats = q.shape[2], q.shape[1] // kv_heads
        near = torch.arange(T)[:, None] - torch.arange(T) < LAST
        near |= torch.arange(T) < FIRST
        weights = (q @ k.transpose(-1, -2) * scale).masked_fill(~attn_mask, -torch.inf)
        share = (weights.softmax(-1) * ~near)[:, :, T // 2 :].sum((0, 2, 3))
        self.outside[self._layer] += share.reshape(kv_heads, repeats).sum(1).numpy()
        streams = torch.from_numpy(self.streams[self._layer]).repeat_interleave(repeats)
        gone = streams[:, None, None] & ~near
        self._layer = (self._layer + 1) % layers
        return weights.masked_fill(gone, -torch.inf).softmax(-1) @ v


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="to rank heads on")
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--ranking-windows", type=int, default=4)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    moe = open_moe(args.model)
    spec = moe.config.mixer(0)
    assert isinstance(spec, AttentionSpec)
    heads = Heads(moe.config.num_layers, spec.num_kv_heads)
    plain: Any = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = heads  # type: ignore[assignment]
    model = Routed(moe, (moe.ladder[-1][0],), rate=1.0)

    pieces = partial(cut, moe, args.window)

    def divergence(
        reference: NDArray[np.float64], windows: NDArray[np.int32]
    ) -> NDArray[np.float64]:
        return divergences(reference, log_probs(model, windows))

    ranking = pieces(args.text, args.ranking_windows)
    reference = log_probs(model, ranking)
    outside = heads.outside / (reference.shape[0] * reference.shape[1])
    alone = np.zeros(heads.streams.shape)
    for at in np.ndindex(alone.shape):
        heads.streams[:] = False
        heads.streams[at] = True
        alone[at] = divergence(reference, ranking).mean()
    print("attention outside, by layer and head\n", np.array2string(outside, precision=3))
    print("KL when one alone streams\n", np.array2string(alone, precision=5, suppress_small=True))
    windows = pieces(args.held_out, args.windows)
    heads.streams[:] = False
    reference = log_probs(model, windows)
    print(
        "| heads that stream | of the KV bytes | by attention: KL | by KL alone: KL |\n|---|---|---|---|"
    )
    total = alone.size
    for count in (total // 8, total // 4, total // 2, 3 * total // 4):
        said = []
        for score in (outside, alone):
            heads.streams[:] = False
            heads.streams.reshape(-1)[np.argsort(score.reshape(-1), kind="stable")[:count]] = True
            kl = divergence(reference, windows)
            said.append(f"{kl.mean():.5f} ± {standard_error(kl, len(windows)):.5f}")
        left = 1 - count / total * (1 - (FIRST + LAST) / args.window)
        print(f"| {count} of {total} | {100 * left:.0f}% | {said[0]} | {said[1]} |", flush=True)
    functional.scaled_dot_product_attention = plain


if __name__ == "__main__":
    main()
