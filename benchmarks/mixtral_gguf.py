"""Writes a Mixtral checkpoint with a byte-level tokenizer of its own as a float32 GGUF file, for llama.cpp's tools.

    python benchmarks/mixtral_gguf.py CHECKPOINT OUT.gguf

llama.cpp's own converter recognises tokenizers by a list of known ones, on which a freshly trained one cannot be.
For all other models use that converter (`--outtype f32`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.hf import HFCheckpoint

__all__ = ["write_gguf"]


def write_gguf(source: Path, out: Path, *, untied: bool = False) -> None:
    """Writes the file; routers and norms are float32 as everything else.

    Args:
        untied: write a tied output matrix a second time, as a tensor of its own.

    Raises:
        SystemExit: the checkpoint is of a kind that this cannot write.
    """
    checkpoint = HFCheckpoint(source)
    config = checkpoint.config
    if config["model_type"] != "mixtral":
        sys.exit(
            f"{source}: is {config['model_type']}; make the GGUF with llama.cpp's convert_hf_to_gguf.py --outtype f32"
        )
    tokenizer = json.loads(checkpoint.files["tokenizer.json"])
    if tokenizer["pre_tokenizer"].get("type") != "ByteLevel":
        sys.exit(f"{source}: its tokenizer is not a plain byte-level one")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_name(source.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokenizer, config)

    def add(name: str, array: NDArray[np.float32]) -> None:
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))

    add("token_embd.weight", checkpoint.tensor("model.embed_tokens.weight"))
    if untied or not config["tie_word_embeddings"]:
        tied = config["tie_word_embeddings"]
        add(
            "output.weight",
            checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight"),
        )
    add("output_norm.weight", checkpoint.tensor("model.norm.weight"))
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        add(ours + "attn_norm.weight", checkpoint.tensor(theirs + "input_layernorm.weight"))
        add(ours + "ffn_norm.weight", checkpoint.tensor(theirs + "post_attention_layernorm.weight"))
        for short, count in (("q", heads), ("k", kv_heads), ("v", 0)):
            weight = checkpoint.tensor(f"{theirs}self_attn.{short}_proj.weight")
            add(f"{ours}attn_{short}.weight", _permuted(weight, count) if count else weight)
        add(ours + "attn_output.weight", checkpoint.tensor(theirs + "self_attn.o_proj.weight"))
        moe = theirs + "block_sparse_moe."
        add(ours + "ffn_gate_inp.weight", checkpoint.tensor(moe + "gate.weight"))
        for name, part in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            experts = [
                checkpoint.tensor(f"{moe}experts.{i}.{part}.weight")
                for i in range(config["num_local_experts"])
            ]
            add(f"{ours}ffn_{name}_exps.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Returns q or k rows in llama.cpp's order of rotary pairs: (2i, 2i + 1) for (i, i + half)."""
    rows, cols = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, config: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"[unused {i}]" for i in range(len(tokens), config["vocab_size"])]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL for i in range(len(tokens))]
    )
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    """Reads the two paths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_gguf(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
