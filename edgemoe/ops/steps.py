"""Combined verbs written as sequences of simpler ones, for implementations that gain nothing from a single call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgemoe.ops.values import AttentionMatrices, Beside, ExpertLayer, LatentMatrices
from edgemoe.plan import Plan
from edgemoe.store.request import Request

__all__ = ["absorb_queries", "attend_in_steps", "attend_latents_in_steps", "run_experts_in_steps"]


def attend_in_steps(
    ops: Any, weights: Any, x: Any, matrices: AttentionMatrices, rows: tuple[Any, Any, Any], pos: int,
    cos: Any, sin: Any, table: Any, kv: Any, heads: Any, out: Any,
) -> None:  # fmt: skip
    """`Ops.attend` as a sequence of other verbs. Implementations use it as their method."""
    ops.linear(x, matrices.qkv, rows)
    ops.attention(weights, *rows, pos, cos, sin, table, kv, heads)
    ops.linear(heads, (matrices.out,), (out,))


def attend_latents_in_steps(
    ops: Any, weights: Any, x: Any, matrices: LatentMatrices, eps: float, rows: Sequence[Any], pos: int,
    cos: Any, sin: Any, kv: Any, out: Any,
) -> None:  # fmt: skip
    """`Ops.attend_latents` as a sequence of other verbs."""
    q_a, q, absorbed, keys, latents, values = rows
    absorb_queries(ops, x, matrices, eps, (q_a, q, absorbed, keys))
    ops.latent_attention(weights, q, absorbed, keys, pos, cos, sin, kv, latents)
    ops.linear_heads(latents, matrices.v_b, matrices.heads, values)
    ops.linear(values, (matrices.out,), (out,))


def absorb_queries(
    ops: Any, x: Any, matrices: LatentMatrices, eps: float, rows: Sequence[Any]
) -> None:
    """Computes what comes before latent attention: the first four `rows` of `Ops.attend_latents`."""
    q_a, q, absorbed, keys = rows
    if matrices.q_b is None:
        ops.linear(x, (matrices.kv_a, matrices.q_a), (keys, q))
    else:
        ops.linear(x, (matrices.kv_a, matrices.q_a), (keys, q_a))
        ops.norm(q_a, matrices.q_norm, eps, q_a)
        ops.linear(q_a, (matrices.q_b,), (q,))
    ops.linear_heads(q, matrices.k_b, matrices.heads, absorbed)


def run_experts_in_steps(
    ops: Any, x: Any, layer: ExpertLayer, request: Request, groups: Iterator[list[int]], plan: Plan,
    parts: Any, out: Any, beside: Beside | None,
) -> bool:  # fmt: skip
    """`Ops.run_experts` as a sequence of other verbs."""
    for group in groups:
        ops.expert_ffn(x, layer, request, plan, group, parts)
    ops.combine(parts, plan, out)
    return False
