"""A tiny random Qwen2-MoE checkpoint with a byte-level tokenizer and a ChatML template, made without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    CHATML.replace("assistant\n{% endif", "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
                   "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif")
    + "{# <tool_call> #}{% if tools %}{% endif %}"
)  # fmt: skip
"""A chat template that opens a reasoning block, unless `enable_thinking` is false."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class MemoryCheckpoint:
    """A checkpoint in memory."""

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        self.name = "tiny"
        self.identity = ""
        self.config = config
        self.files = files
        self._tensors = tensors

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self._tensors.items()}

    def tensor(self, name: str) -> Any:
        return self._tensors[name]


def tokenizer_files() -> dict[str, bytes]:
    """Returns a tokenizer's files: 256 bytes and three special tokens, 259 ids in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    config = {
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML
    }  # fmt: skip
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def tiny_checkpoint(
    *, layers: int = 2, experts: int = 8, top_k: int = 2, width: int = 48, seed: int = 0
) -> MemoryCheckpoint:
    """Returns a checkpoint with random weights, large enough that routers have clear choices and logits differ."""
    rng = np.random.default_rng(seed)
    V, D, H, S, heads, kv = 264, 96, width, 80, 4, 2
    config = {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_act": "silu",
        "vocab_size": V, "hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "num_experts": experts,
        "num_experts_per_tok": top_k, "moe_intermediate_size": H, "norm_topk_prob": True,
        "shared_expert_intermediate_size": S, "intermediate_size": S, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "use_sliding_window": False, "bos_token_id": 256, "eos_token_id": 258,
    }  # fmt: skip

    def w(*shape: int, gain: float = 1.0) -> np.ndarray:
        scale = gain / np.sqrt(shape[-1])
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    hd = D // heads
    tensors = {
        "model.embed_tokens.weight": w(V, D, gain=8), "lm_head.weight": w(V, D, gain=2),
        "model.norm.weight": np.ones(D, np.float32),
    }  # fmt: skip
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": np.ones(D, np.float32),
            p + "post_attention_layernorm.weight": np.ones(D, np.float32),
            p + "self_attn.q_proj.weight": w(D, D), p + "self_attn.o_proj.weight": w(D, D, gain=0.5),
            p + "self_attn.k_proj.weight": w(kv * hd, D), p + "self_attn.v_proj.weight": w(kv * hd, D),
            p + "self_attn.q_proj.bias": np.zeros(D, np.float32),
            p + "self_attn.k_proj.bias": np.zeros(kv * hd, np.float32),
            p + "self_attn.v_proj.bias": np.zeros(kv * hd, np.float32),
            p + "mlp.gate.weight": w(experts, D, gain=6),
            p + "mlp.shared_expert.gate_proj.weight": w(S, D), p + "mlp.shared_expert.up_proj.weight": w(S, D),
            p + "mlp.shared_expert.down_proj.weight": w(D, S, gain=0.5),
            p + "mlp.shared_expert_gate.weight": w(1, D),
        }  # fmt: skip
        for e in range(experts):
            q = f"{p}mlp.experts.{e}."
            tensors |= {
                q + "gate_proj.weight": w(H, D), q + "up_proj.weight": w(H, D),
                q + "down_proj.weight": w(D, H, gain=0.5),
            }  # fmt: skip
    return MemoryCheckpoint(config, tensors, tokenizer_files())


def thinking_checkpoint() -> MemoryCheckpoint:
    """Returns one whose template opens a reasoning block, with tokens 259 to 262 for reasoning and for tool calls."""
    checkpoint = tiny_checkpoint()
    checkpoint.config["max_position_embeddings"] = 2048
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(mark) for mark in marks])
    config = json.loads(checkpoint.files["tokenizer_config.json"]) | {"chat_template": THINKING}
    checkpoint.files = {
        "tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()
    }  # fmt: skip
    return checkpoint


def tiny_paths(layers: int = 2, experts: int = 8, *, width: int = 8, rows: int = 16) -> bytes:
    """Returns a random predictor of routing paths, in the form of the section "paths"."""
    from safetensors.numpy import save

    rng = np.random.default_rng(5)
    n, d = layers * experts, width
    shapes = {
        "w_input": (3 * d, d), "w_state": (3 * d, d), "b_input": (3 * d,), "b_state": (3 * d,),
        "now": (n, 2 * d), "now_bias": (n,), "next": (n, d), "next_bias": (n,),
    }  # fmt: skip
    tensors = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    return save({"embedding": rng.normal(0, 1, (rows, d)).astype(np.float16), **tensors})
