"""Measures what a KV cache in fewer bits costs: divergence from the float16 cache on held-out text.

    python benchmarks/kv_quality.py MODEL.moe [--window 1024] [--windows 8] [--bits N] [--experts K] [--types q8_0,q4_0]

Prints the mean and the 99th percentile of the KL divergence per token, the share of equal top tokens, and perplexity.
Only the second half of each window counts, where there is something to attend to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgemoe

_HELD_OUT = Path(__file__).parents[1] / "edgemoe" / "lab" / "quality" / "data" / "held_out.txt"


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns log probabilities [T, V]."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .moe file")
    parser.add_argument("--text", type=Path, default=_HELD_OUT)
    parser.add_argument("--window", type=int, default=1024, help="tokens per context")
    parser.add_argument("--windows", type=int, default=8, help="how many")
    parser.add_argument("--bits", type=int, help="bits of routed experts")
    parser.add_argument("--experts", type=int, help="experts per token; all of them for no routing")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--types", default="q8_0,q4_0", help="of keys, values and both, commas between"
    )
    args = parser.parse_args()
    kinds = args.types.split(",")
    pairs = [(kind, other) for kind in kinds for other in ("f16", kind)]
    engines = {
        types: edgemoe.load(
            args.model, ram="1GiB", context=args.window, bits=args.bits, experts=args.experts,
            threads=args.threads,
            cache_type_k=types[0], cache_type_v=types[1],
        )
        for types in [("f16", "f16"), *pairs, *(("f16", kind) for kind in kinds)]
    }  # fmt: skip
    tokenizer = next(iter(engines.values())).tokenizer
    if tokenizer is None:
        parser.error("the model has no tokenizer")
    ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    half = args.window // 2
    losses: dict[tuple[str, ...], list[NDArray[np.float32]]] = {types: [] for types in engines}
    divergences: dict[tuple[str, ...], list[NDArray[np.float32]]] = {t: [] for t in engines}
    equal: dict[tuple[str, ...], list[NDArray[np.bool_]]] = {types: [] for types in engines}
    for i in range(args.windows):
        window = ids[i * args.window : (i + 1) * args.window]
        reference = None
        for types, engine in engines.items():
            scores = log_softmax(engine.logits(window)[half:-1])
            if reference is None:
                reference = scores
            losses[types].append(-scores[np.arange(len(scores)), window[half + 1 :]])
            divergences[types].append((np.exp(reference) * (reference - scores)).sum(1))
            equal[types].append(reference.argmax(1) == scores.argmax(1))
    print(
        "| keys | values | mean KL | 99% | same top token | perplexity |\n|---|---|---|---|---|---|"
    )
    for types in engines:
        kl = np.concatenate(divergences[types])
        print(
            f"| {types[0]} | {types[1]} | {kl.mean():.5f} | {np.quantile(kl, 0.99):.4f} "
            f"| {100 * np.concatenate(equal[types]).mean():.1f}% "
            f"| {np.exp(np.concatenate(losses[types]).mean()):.3f} |"
        )


if __name__ == "__main__":
    main()
