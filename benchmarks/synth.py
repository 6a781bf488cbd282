"""Writes a `.moe` file with the true shapes of a published model and random weights, for speed measurements.

    python benchmarks/synth.py olmoe|granite|glm-flash|qwen3.6|tiny OUT.moe [--embedding 500] [--alike] [--layers 3]

Random weights do not route uniformly: the residual stream is dominated by what attention adds, so that consecutive
tokens choose the same experts. `--embedding` multiplies the embedding; at 500 the routing is close to uniform.
With `--alike` large matrices of one shape have the same codes, which are made once: a file of 19 GB in a minute.
`--layers` keeps only the first layers, and the same share of the vocabulary. `--correction RANK` gives every matrix
what a calibrated conversion has: scales of rows for 2 bits, and corrections of that rank for 2, 3 and 4 bits (0: none),
in arbitrary directions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edgemoe.config import MATRICES, ModelConfig, dense_tensors
from edgemoe.file.writer import Writer
from edgemoe.quant import SCHEMES, Scheme, nested
from edgemoe.quant.correction import kind_of
from edgemoe.quant.lowrank import Directions
from edgemoe.quant.nested import ROW_SCALES
from edgemoe.quant.ranks import same_rank
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


def fewer_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """Returns a model of the first layers, all of which have experts, with the same share of the vocabulary."""
    return replace(
        config, num_layers=layers, moe_layers=tuple(range(layers)), layer_mixers=config.layer_mixers[:layers],
        shared_hidden=config.shared_hidden[:layers],
        vocab_size=config.vocab_size * layers // config.num_layers // 16 * 16,
    )  # fmt: skip


def corrected(config: ModelConfig, rank: int) -> Scheme:
    """Returns nested codes with what calibrated conversions have; the codes themselves are not refined."""
    plain = SCHEMES["nested"]

    def quantize(
        w: np.ndarray, ladder: Sequence[int], *, second_moments: np.ndarray | None = None,
        directions: Directions | None = None, **rest: Any,
    ) -> list[np.ndarray]:  # fmt: skip
        rungs = nested.quantize(w, ladder, second_moments=None, row_scales=ROW_SCALES, **rest)
        if directions is None:
            return rungs
        return directions.correct(w, rungs, ladder, ROW_SCALES, second_moments)

    matrices = [name for name, spec in dense_tensors(config).items() if spec.kind == "nested"]
    kinds = map(kind_of, [*matrices, *(f"experts.{part}" for part in MATRICES)])
    correction = {kind: same_rank(rank) for kind in kinds} if rank else {}
    return replace(plain, quantize=quantize, row_scales=ROW_SCALES, correction=correction)


class Alike:
    """A stand-in for a calibration, in which all inputs are independent and of the same size."""

    is_full = False  # `corrected` has already changed the scheme as a full calibration would

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._dense = config, dense_tensors(config)

    def matrix(self, name: str) -> np.ndarray:
        """See `Calibration.matrix`."""
        if name.endswith(".down") and name.startswith("experts."):
            return np.eye(self._config.expert_hidden, dtype=np.float32)
        of = self._dense.get(name)
        return np.eye(of.shape[-1] if of else self._config.hidden_size, dtype=np.float32)

    def layer_matrix(self, layer: int) -> np.ndarray:
        """See `Calibration.layer_matrix`."""
        return np.eye(self._config.hidden_size, dtype=np.float32)


def once(plain: Scheme) -> Scheme:
    """Returns a scheme whose codes are made once for all matrices of a shape with the same first weight."""
    made: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def quantize(
        w: np.ndarray, ladder: Sequence[int], directions: Directions | None = None, **rest: Any
    ) -> list[np.ndarray]:
        more = (directions.stored, *directions.ranks) if directions else ()
        key = (w.shape, float(w[0, 0]), *ladder, more)
        if key not in made:
            made[key] = plain.quantize(w, ladder, directions=directions, **rest)
        return made[key]

    return replace(plain, quantize=quantize)


def write(
    out: Path,
    config: ModelConfig,
    *,
    bits: int,
    embedding: float,
    name: str,
    alike: bool = False,
    correction: int | None = None,
) -> None:
    """Writes a model of random weights; the embedding is multiplied by a factor."""
    rng = np.random.Generator(np.random.SFC64(20261122))
    made: dict[tuple[int, int], np.ndarray] = {}

    def weights(rows: int, cols: int) -> np.ndarray:
        if (rows, cols) in made:
            return made[rows, cols]
        w = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
        if alike and w.size >= 1 << 19 and rows != config.num_experts:  # routers differ
            made[rows, cols] = w
        return w

    source = {"name": name, "embedding": embedding}
    scheme = SCHEMES["nested"] if correction is None else corrected(config, correction)
    seen: Any = None if correction is None else Alike(config)
    with Writer(
        out, config, bits=bits, scheme=once(scheme) if alike else scheme, sections={}, source=source,
        calibration=seen,
    ) as writer:  # fmt: skip
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
    parser.add_argument("--layers", type=int, help="only so many, and less of the vocabulary")
    parser.add_argument("--correction", type=int, metavar="RANK", help="of every matrix")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    write(
        args.out,
        fewer_layers(config, args.layers) if args.layers else config,
        bits=args.bits,
        embedding=args.embedding,
        name=f"random {args.shape}",
        alike=args.alike,
        correction=args.correction,
    )


if __name__ == "__main__":
    main()
