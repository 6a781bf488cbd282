"""The verbs of the forward pass: what a device must do to run a model.

The model and the experts see only these. They never look inside an array but for those of `host`: a device's arrays
are its own, have `shape`, `len` and slices of leading rows, and nothing else. Every verb gives the same bits on every
device, and a row's result never depends on the rows beside it. Arrays are contiguous float32 unless said; what a verb
writes is an argument, made by `empty` or `host`. One caller at a time.

Shape letters: T tokens of a batch, D hidden, K experts per token, E experts, V vocabulary, p layers ahead.
"""

from edgemoe.ops.sizes import kv_bytes, kv_parts, kv_ring, rope_bytes
from edgemoe.ops.steps import (
    absorb_queries,
    attend_in_steps,
    attend_latents_in_steps,
    run_experts_in_steps,
)
from edgemoe.ops.values import (
    Array,
    AttentionMatrices,
    AttentionWeights,
    Basis,
    Beside,
    DeltaRule,
    ExpertLayer,
    Ids,
    KvLayer,
    LatentMatrices,
    LatentWeights,
    MambaRule,
    Matrix,
    OpsShape,
    RopeTable,
    RouteRule,
    RouterWeights,
    RowTable,
)
from edgemoe.ops.verbs import Ops

__all__ = [
    "Array", "AttentionMatrices", "AttentionWeights", "Basis", "Beside", "DeltaRule", "ExpertLayer", "Ids", "KvLayer",
    "LatentMatrices", "LatentWeights", "MambaRule", "Matrix", "Ops", "OpsShape", "RopeTable", "RouteRule",
    "RouterWeights", "RowTable", "absorb_queries", "attend_in_steps", "attend_latents_in_steps", "kv_bytes", "kv_parts",
    "kv_ring", "rope_bytes", "run_experts_in_steps",
]  # fmt: skip
