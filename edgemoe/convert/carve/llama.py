"""Runs a dense Llama-architecture checkpoint in numpy, for calibration and as a reference for quality.

It is not an inference engine: it computes whole sequences in float32, with one layer's weights in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Checkpoint, refuse_unused
from edgemoe.convert.families.reading import num_layers
from edgemoe.convert.numpy_ops import attention, rms_norm, rotated, silu
from edgemoe.convert.rope import Rope, check_rotated, rope
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, quoted

__all__ = ["DEFAULT_THETA", "Array", "LlamaShape", "OnFFN", "head", "hidden_states", "llama_shape"]

DEFAULT_THETA = 10000.0
"""The RoPE base of a Llama if config.json names none."""

Array: TypeAlias = NDArray[np.float32]
OnFFN: TypeAlias = Callable[[int, Array, Array, Array], None]
"""A callback that receives a layer's number, its FFN's input x [T, D], silu(x Wg) * (x Wu) [T, I] and w_down [D, I].

The arrays are valid only during the call."""


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The values of a dense Llama's config.json that its arithmetic needs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    """That of config.json; RoPE scaling may extend it."""
    norm_eps: float
    tied: bool
    rope: Rope

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor, by name."""
        d, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for layer in range(self.num_layers):
            p = f"model.layers.{layer}."
            out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (d,)
            out[p + "self_attn.q_proj.weight"] = (q, d)
            out[p + "self_attn.k_proj.weight"] = out[p + "self_attn.v_proj.weight"] = (kv, d)
            out[p + "self_attn.o_proj.weight"] = (d, q)
            out[p + "mlp.gate_proj.weight"] = out[p + "mlp.up_proj.weight"] = (i, d)
            out[p + "mlp.down_proj.weight"] = (d, i)
        out["model.norm.weight"] = (d,)
        if not self.tied:
            out["lm_head.weight"] = (self.vocab_size, d)
        return out


def llama_shape(dense: Checkpoint) -> LlamaShape:
    """Reads the config of a dense Llama and checks that all its tensors exist.

    Raises:
        FormatError: the architecture or a feature is not supported, a number is missing or senseless, or a tensor is
            missing, unknown or of another shape.
    """
    try:
        settings = Settings(dense.config)
        kind = settings.text("model_type")
        if kind != "llama":
            raise settings.error(
                "model_type", f"{quoted(kind)} cannot be carved; supported: 'llama'"
            )
        for key in ("attention_bias", "mlp_bias"):
            if settings.flag(key, False):
                raise settings.error(key, "models with it cannot be carved")
        if settings.text("hidden_act", "silu") != "silu":
            raise settings.error("hidden_act", f"must be 'silu', got {settings.get('hidden_act')}")
        hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
        kv_heads = settings.integer("num_key_value_heads", heads)
        head_dim = settings.integer("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise FormatError(
                f"config.json: {heads} heads of {head_dim} over {kv_heads} do not fit"
            )
        shape = LlamaShape(
            num_layers=num_layers(settings),
            hidden_size=hidden,
            intermediate_size=settings.integer("intermediate_size"),
            vocab_size=settings.integer("vocab_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            context_length=settings.integer("max_position_embeddings"),
            norm_eps=settings.number("rms_norm_eps", 1e-6),
            tied=settings.flag("tie_word_embeddings", False),
            rope=Rope(np.empty(0, np.float32), 1.0, 0),
        )
        for name, size in shape.tensors().items():
            if dense.shapes.get(name) != size:
                raise FormatError(f"{name} must be {size}, got {dense.shapes.get(name, 'none')}")
        refuse_unused(dense, shape.tensors().keys(), family=kind, tied=shape.tied)
        # Last, because the shapes of the tensors have now confirmed the head size.
        check_rotated(settings, head_dim, head_dim)
        angles = rope(settings, dim=head_dim, default_theta=DEFAULT_THETA)
        shape = replace(shape, rope=angles)
    except FormatError as error:
        raise FormatError(f"{dense.name}: {error}") from error
    return shape


def hidden_states(
    dense: Checkpoint, ids: NDArray[np.int64], *, on_ffn: OnFFN | None = None
) -> Array:
    """Computes the output [N, S, D] of the last layer, after the final norm, for N independent sequences.

    Args:
        dense: a dense Llama.
        ids: token ids [N, S].
        on_ffn: called for every layer's FFN, with all tokens at once.

    Raises:
        FormatError: the checkpoint is not a dense Llama, or a tensor is broken.
    """
    shape = llama_shape(dense)
    count, length = ids.shape
    x = dense.tensor("model.embed_tokens.weight")[ids.reshape(-1)]
    cos, sin = _rotation(shape.rope, length)
    for layer in range(shape.num_layers):
        p = f"model.layers.{layer}."
        normed = rms_norm(x, dense.tensor(p + "input_layernorm.weight"), shape.norm_eps)
        q, k, v = (
            (normed @ dense.tensor(f"{p}self_attn.{name}_proj.weight").T)
            .reshape(count, length, -1, shape.head_dim)
            .transpose(0, 2, 1, 3)
            for name in "qkv"
        )
        mixed = attention(
            rotated(q, cos, sin), rotated(k, cos, sin), v, scale=1 / math.sqrt(shape.head_dim)
        )
        x += mixed @ dense.tensor(p + "self_attn.o_proj.weight").T
        normed = rms_norm(x, dense.tensor(p + "post_attention_layernorm.weight"), shape.norm_eps)
        inner = silu(normed @ dense.tensor(p + "mlp.gate_proj.weight").T)
        inner *= normed @ dense.tensor(p + "mlp.up_proj.weight").T
        down = dense.tensor(p + "mlp.down_proj.weight")
        if on_ffn is not None:
            on_ffn(layer, normed, inner, down)
        x += inner @ down.T
    x = rms_norm(x, dense.tensor("model.norm.weight"), shape.norm_eps)
    return x.reshape(count, length, -1)


def head(dense: Checkpoint) -> Array:
    """Reads the output head [V, D], which maps hidden states to logits."""
    tied = llama_shape(dense).tied
    return dense.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")


def _rotation(rope: Rope, length: int) -> tuple[Array, Array]:
    """Returns cos and sin [S, head_dim / 2] of the angles by position."""
    angles = np.outer(np.arange(length), rope.of(length).astype(np.float64))
    cos, sin = np.cos(angles) * rope.scale, np.sin(angles) * rope.scale
    return cos.astype(np.float32), sin.astype(np.float32)
