"""Writes a `.moe` file with the true shapes of a published model and random weights, for speed measurements.

    python benchmarks/synth.py olmoe|granite|qwen3.6|tiny OUT.moe [--embedding 500] [--alike]

Random weights do not route uniformly: the residual stream is dominated by what attention adds, so that consecutive
tokens choose the same experts. `--embedding` multiplies the embedding; at 500 the routing is close to uniform.
With `--alike` large matrices of one shape have the same codes, which are made once: a file of 19 GB in a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.file.writer import Writer
from edgemoe.quant import SCHEMES, Scheme
from edgemoe.specs import AttentionSpec, DeltaSpec, MlaSpec, RopeSpec

COMMON = {"tied": False, "norm_eps": 1e-5}


def attention(
    layers: int, heads: int, kv_heads: int, head_dim: int, **switches: Any
) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig` whose layers all have the same attention."""
    spec = {"scale": head_dim**-0.5, "rope": RopeSpec(dim=head_dim), **switches}
    mixer = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **spec)
    return {"num_layers": layers, "mixers": (mixer,), "layer_mixers": (0,) * layers}


SHAPES = {
    # allenai/OLMoE-1B-7B
    "olmoe": ModelConfig(
        family="olmoe", vocab_size=50304, hidden_size=2048, context_length=8192,
        **attention(16, 16, 16, 128, qk_norm="full"), num_experts=64, experts_per_token=8, expert_hidden=1024,
        moe_layers=tuple(range(16)), **COMMON,
    ),
    # ibm-granite/granite-3.0-1b-a400m
    "granite": ModelConfig(
        family="granitemoe", vocab_size=49155, hidden_size=1024, context_length=8192,
        **attention(24, 16, 8, 64, scale=0.015625), num_experts=32, experts_per_token=8, expert_hidden=512,
        moe_layers=tuple(range(24)), scoring="softmax_topk",
        embedding_multiplier=12.0, residual_multiplier=0.22, logits_divisor=6.0,
        **{**COMMON, "tied": True},
    ),
    # zai-org/GLM-4.7-Flash, its first two layers of 47 and a fifth of its vocabulary
    "glm-flash": ModelConfig(
        family="glm4_moe_lite", vocab_size=32768, hidden_size=2048, context_length=202752, num_layers=2,
        mixers=(
            MlaSpec(
                num_heads=20, q_rank=768, latent_dim=512, nope_dim=192, rope_dim=64, value_dim=256,
                scale=256**-0.5, rope=RopeSpec(dim=64),
            ),
        ),
        layer_mixers=(0, 0), num_experts=64, experts_per_token=4, expert_hidden=1536, moe_layers=(1,),
        shared_hidden=(10240, 1536), scoring="sigmoid", choice_bias=True, renormalise=True, gate_scale=1.8,
        **COMMON,
    ),
    # Qwen/Qwen3.6-35B-A3B
    "qwen3.6": ModelConfig(
        family="qwen3_5_moe", vocab_size=248320, hidden_size=2048, context_length=262144, num_layers=40,
        mixers=(
            DeltaSpec(
                key_heads=16, value_heads=32, key_dim=128, value_dim=128, taps=4, norm_eps=1e-6
            ),
            AttentionSpec(
                num_heads=16, num_kv_heads=2, head_dim=256, scale=1 / 16, rope=RopeSpec(dim=64), qk_norm="head",
                gate="sigmoid",
            ),
        ),
        layer_mixers=(0, 0, 0, 1) * 10, num_experts=256, experts_per_token=8, expert_hidden=512,
        moe_layers=tuple(range(40)), shared_hidden=(512,) * 40, shared_sigmoid=True, renormalise=True, **COMMON,
    ),
    "tiny": ModelConfig(
        family="olmoe", vocab_size=1024, hidden_size=256, context_length=2048,
        **attention(4, 4, 4, 64, qk_norm="full"), num_experts=16, experts_per_token=4, expert_hidden=256,
        moe_layers=tuple(range(4)), **COMMON,
    ),
}  # fmt: skip


def alike_scheme() -> Scheme:
    """Returns nested codes that are made once for all matrices of a shape with the same first weight."""
    made: dict[tuple[Any, ...], list[np.ndarray]] = {}
    plain = SCHEMES["nested"]

    def quantize(w: np.ndarray, ladder: Sequence[int], **rest: Any) -> list[np.ndarray]:
        key = (w.shape, float(w[0, 0]), *ladder)
        if key not in made:
            made[key] = plain.quantize(w, ladder, **rest)
        return made[key]

    return replace(plain, quantize=quantize)


def write(
    out: Path, config: ModelConfig, *, bits: int, embedding: float, name: str, alike: bool = False
) -> None:
    """Writes a model of random weights; the embedding is multiplied by a factor."""
    rng = np.random.Generator(np.random.SFC64(20261122))
    made: dict[tuple[int, int], np.ndarray] = {}

    def weights(rows: int, cols: int) -> np.ndarray:
        if (rows, cols) in made:
            return made[rows, cols]
        w = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
        if alike and w.size >= 1 << 20:
            made[rows, cols] = w
        return w

    source = {"name": name, "embedding": embedding}
    scheme = alike_scheme() if alike else SCHEMES["nested"]
    with Writer(out, config, bits=bits, scheme=scheme, sections={}, source=source) as writer:
        bar = tqdm(total=writer.total_bytes, unit="B", unit_scale=True)
        for tensor, spec in dense_tensors(config).items():
            if tensor.startswith("rope"):
                (half,) = spec.shape
                writer.add(tensor, (10000.0 ** (-np.arange(half) / half)).astype(np.float32))
            elif len(spec.shape) == 1:
                writer.add(tensor, np.ones(spec.shape, np.float32))
            else:
                factor = np.float32(embedding if tensor == "embed" else 1)
                writer.add(tensor, weights(*spec.shape) * factor)
            bar.update(writer.written_bytes - bar.n)
        d, h = config.hidden_size, config.expert_hidden
        for layer in config.moe_layers:
            for e in range(config.num_experts):
                writer.add_expert(layer, e, weights(h, d), weights(h, d), weights(d, h))
                bar.update(writer.written_bytes - bar.n)
        writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--embedding", type=float, default=1.0, help="factor on the embedding")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--alike", action="store_true", help="matrices of a shape are the same")
    args = parser.parse_args()
    write(
        args.out,
        SHAPES[args.shape],
        bits=args.bits,
        embedding=args.embedding,
        name=f"random {args.shape}",
        alike=args.alike,
    )


if __name__ == "__main__":
    main()
