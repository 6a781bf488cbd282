"""The verbs of the forward pass: the operations that a device must implement to run a model.

The model and the experts use nothing else of a device. An array belongs to its device: it has `shape`, `len` and slices
of leading rows, and its values can be read only if it was made by `host`. Every verb gives the same bits on every
device, and a row's result never depends on the other rows. Arrays are contiguous float32 unless said otherwise. A verb
writes to arrays among its arguments, which were made by `empty` or `host`. One caller at a time.

Shape letters: T tokens of a batch, D hidden size, H width of an expert, K experts per token, E experts per layer,
V vocabulary, p layers of look-ahead, m rows of a plan (pairs of a token and an expert).
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
