"""Writes a GGUF file with the true shapes of a published model and random weights in Q4_0, to compare with llama.cpp.

    python benchmarks/synth_gguf.py olmoe|granite|qwen3.6|gpt-oss|glm-flash|qwen3 OUT.gguf [--layers 8] [--experts 128]
    edgemoe convert OUT.gguf OUT.moe --bits 4
    python benchmarks/llama_cpp.py --llama-bench PATH --pair OUT.gguf OUT.moe 4 --memory

`--layers 0` makes all layers of the release. With fewer layers the vocabulary is cut to the same share, so that
embedding and head keep their share of the model. There is no tokenizer. `--embedding` is a factor of the embedding, see
benchmarks/synth.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensor = tuple[str, tuple[int, ...], float | None]
"""A name, a shape with the row last, and the value of a vector in float32; None for a matrix in Q4_0."""


@dataclass(frozen=True)
class Shape:
    """A published model."""

    arch: str
    hidden: int
    layers: int
    vocabulary: int
    experts: int
    chosen: int
    width: int
    """The width of an expert."""
    heads: int
    kv_heads: int
    head_dim: int
    keys: dict[str, Any]
    """Further metadata."""


SHAPES = {
    "qwen3.6": Shape(
        "qwen35moe", 2048, 40, 248320, 256, 8, 512, 16, 2, 256,
        {
            "expert_shared_feed_forward_length": 512, "full_attention_interval": 4, "rope.dimension_count": 64,
            "rope.dimension_sections": [11, 11, 10, 0], "rope.freq_base": 1e7, "ssm.conv_kernel": 4,
            "ssm.inner_size": 4096, "ssm.state_size": 128, "ssm.time_step_rank": 32, "ssm.group_count": 16,
        },
    ),
    "gpt-oss": Shape(
        "gpt-oss", 2880, 24, 201088, 32, 4, 2880, 64, 8, 64,
        {
            "attention.sliding_window": 128, "rope.freq_base": 150000.0, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096, "rope.dimension_count": 64,
        },
    ),
    "glm-flash": Shape(
        "deepseek2", 2048, 47, 154880, 64, 4, 1536, 20, 1, 576,
        {
            "attention.q_lora_rank": 768, "attention.kv_lora_rank": 512, "attention.key_length_mla": 256,
            "attention.value_length_mla": 256, "attention.value_length": 512, "rope.dimension_count": 64,
            "rope.freq_base": 1e6, "leading_dense_block_count": 1, "feed_forward_length": 10240,
            "expert_shared_count": 1, "expert_weights_scale": 1.8, "expert_weights_norm": True,
            "expert_gating_func": 2,
        },
    ),
    "qwen3": Shape(
        "qwen3moe", 2048, 48, 151936, 128, 8, 768, 32, 4, 128,
        {"rope.freq_base": 1e6, "rope.dimension_count": 128},
    ),
    "olmoe": Shape(
        "olmoe", 2048, 16, 50304, 64, 8, 1024, 16, 16, 128,
        {"rope.freq_base": 1e4, "rope.dimension_count": 128},
    ),
    "granite": Shape(
        "granitemoe", 1024, 24, 49155, 32, 8, 512, 16, 8, 64,
        {
            "rope.freq_base": 1e4, "rope.dimension_count": 64, "attention.scale": 0.015625,
            "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 6.0,
        },
    ),
}  # fmt: skip


def _delta(shape: Shape) -> Iterator[Tensor]:
    d, k = shape.hidden, shape.keys
    inner, heads, dim = k["ssm.inner_size"], k["ssm.time_step_rank"], k["ssm.state_size"]
    channels = inner + 2 * k["ssm.group_count"] * dim
    yield from (("attn_qkv.weight", (channels, d), None), ("attn_gate.weight", (inner, d), None))
    yield from (("ssm_beta.weight", (heads, d), 0.01), ("ssm_alpha.weight", (heads, d), 0.01))
    yield from (("ssm_a", (heads,), -1.0), ("ssm_dt.bias", (heads,), 0.5))
    yield from (("ssm_conv1d.weight", (channels, 4), 0.3), ("ssm_norm.weight", (dim,), 1.0))
    yield "ssm_out.weight", (d, inner), None


def _latent(shape: Shape) -> Iterator[Tensor]:
    d, k, heads = shape.hidden, shape.keys, shape.heads
    query, latent, turned = (
        k[x] for x in ("attention.q_lora_rank", "attention.kv_lora_rank", "rope.dimension_count")
    )
    key, value = k["attention.key_length_mla"], k["attention.value_length_mla"]
    yield from (("attn_q_a.weight", (query, d), None), ("attn_q_a_norm.weight", (query,), 1.0))
    yield from (("attn_q_b.weight", (heads * key, query), None),)
    yield from (("attn_kv_a_mqa.weight", (latent + turned, d), None),)
    yield from (("attn_kv_a_norm.weight", (latent,), 1.0),)
    yield from (("attn_k_b.weight", (heads, latent, key - turned), None),)
    yield from (("attn_v_b.weight", (heads, value, latent), None),)
    yield "attn_output.weight", (d, heads * value), None


def _attention(shape: Shape) -> Iterator[Tensor]:
    d, own, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    queries = 2 * own if shape.arch == "qwen35moe" else own  # with their gates
    for name, rows in (("attn_q", queries), ("attn_k", kv), ("attn_v", kv)):
        yield f"{name}.weight", (rows, d), None
        if shape.arch == "gpt-oss":
            yield f"{name}.bias", (rows,), 0.01
    yield "attn_output.weight", (d, own), None
    if shape.arch == "gpt-oss":
        yield from (("attn_output.bias", (d,), 0.01), ("attn_sinks.weight", (shape.heads,), 0.5))
    elif shape.arch != "granitemoe":
        of_all = shape.arch == "olmoe"  # else of each head
        for x, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            yield f"attn_{x}_norm.weight", (shape.head_dim * (heads if of_all else 1),), 1.0


def _ffn(shape: Shape, experts: int, is_dense: bool) -> Iterator[Tensor]:
    d = shape.hidden
    shared = shape.keys.get("expert_shared_feed_forward_length", 0)
    if shape.arch == "deepseek2":
        shared = shape.width
    ends = {"": shape.keys["feed_forward_length"]} if is_dense else {"_shexp": shared}
    for end, width in ends.items():
        if width:
            yield f"ffn_gate{end}.weight", (width, d), None
            yield f"ffn_up{end}.weight", (width, d), None
            yield f"ffn_down{end}.weight", (d, width), None
    if is_dense:
        return
    yield "ffn_gate_inp.weight", (experts, d), 0.02
    if shape.arch == "qwen35moe":
        yield "ffn_gate_inp_shexp.weight", (d,), 0.02
    if shape.arch == "deepseek2":
        yield "exp_probs_b.bias", (experts,), 0.01
    for name, rows, cols in (("gate", shape.width, d), ("up", shape.width, d), ("down", d, shape.width)):  # fmt: skip
        yield f"ffn_{name}_exps.weight", (experts, rows, cols), None
        if shape.arch == "gpt-oss":
            yield f"ffn_{name}_exps.bias", (experts, rows), 0.01
    if shape.arch == "gpt-oss":
        yield "ffn_gate_inp.bias", (experts,), 0.01


def tensors(shape: Shape, layers: int, experts: int, vocabulary: int) -> Iterator[Tensor]:
    """Yields all tensors of a model, in file order."""
    yield from (("token_embd.weight", (vocabulary, shape.hidden), None),)
    if shape.arch != "granitemoe":  # there the embedding is the head
        yield "output.weight", (vocabulary, shape.hidden), None
    yield "output_norm.weight", (shape.hidden,), 1.0
    late = shape.arch in ("qwen35moe", "gpt-oss")
    second = "post_attention_norm" if late else "ffn_norm"
    for i in range(layers):
        mixer = _latent if shape.arch == "deepseek2" else _attention
        if (i + 1) % shape.keys.get("full_attention_interval", 1):
            mixer = _delta
        dense = i < shape.keys.get("leading_dense_block_count", 0)
        norms = [(f"{x}.weight", (shape.hidden,), 1.0) for x in ("attn_norm", second)]
        for name, size, value in (*norms, *mixer(shape), *_ffn(shape, experts, dense)):
            yield f"blk.{i}.{name}", size, value


def write(out: Path, shape: Shape, layers: int, experts: int, embedding: float) -> None:
    """Writes a file of random weights; the embedding is multiplied by a factor."""
    rng = np.random.Generator(np.random.SFC64(20261129))
    vocabulary = shape.vocabulary
    if layers < shape.layers:
        vocabulary = vocabulary * layers // shape.layers // 64 * 64
    writer = gguf.GGUFWriter(out, shape.arch)
    keys = {
        "block_count": layers, "context_length": 32768, "embedding_length": shape.hidden,
        "attention.head_count": shape.heads, "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6, "expert_count": experts, "expert_used_count": shape.chosen,
        "expert_feed_forward_length": shape.width, "feed_forward_length": shape.width,
        "vocab_size": vocabulary, **shape.keys,
    }  # fmt: skip
    for name, value in keys.items():
        kind = {bool: "bool", float: "float32", str: "string", list: "array"}.get(type(value))
        getattr(writer, f"add_{kind or 'uint32'}")(f"{shape.arch}.{name}", value)
    writer.add_tokenizer_model("none")
    listed = list(tensors(shape, layers, experts, vocabulary))
    q4, f32 = gguf.GGMLQuantizationType.Q4_0, np.dtype(np.float32)
    for name, size, value in listed:
        if value is None:
            stored = (*size[:-1], size[-1] // 32 * 18)
            count = int(np.prod(stored))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), count, raw_dtype=q4)
        else:
            writer.add_tensor_info(name, size, f32, 4 * int(np.prod(size)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size, value in listed:
        if value is None:
            factor = embedding if name == "token_embd.weight" else 1.0
            # Codes are uniform in -8 to 7, scaled to a standard deviation of 0.02. Their mean is -0.5, so each block's
            # sign is random: otherwise all rows would share a direction, and all tokens would choose the same experts.
            blocks = rng.integers(0, 2**64, -(-int(np.prod(size)) // 32 * 18 // 8), np.uint64)
            blocks = blocks.view(np.uint8)[: int(np.prod(size)) // 32 * 18].reshape(-1, 18)
            signs = blocks[:, 1] & 0x80
            blocks[:, :2] = np.array([0.02 / 4.6 * factor], np.float16).view(np.uint8)
            blocks[:, 1] |= signs
            writer.write_tensor_data(blocks.reshape(*size[:-1], -1))
        elif len(size) > 1 and "bias" not in name:
            noise = rng.standard_normal(size, np.float32)
            writer.write_tensor_data(noise * np.float32(value))
        else:
            writer.write_tensor_data(np.full(size, value, np.float32))
    writer.close()


def main() -> None:
    """Writes one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=8, help="0: as many as in the release")
    parser.add_argument("--experts", type=int, default=0, help="default: as many as in the release")
    parser.add_argument("--embedding", type=float, default=50.0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    layers, experts = args.layers or shape.layers, args.experts or shape.experts
    write(args.out, shape, layers, experts, args.embedding)


if __name__ == "__main__":
    main()
