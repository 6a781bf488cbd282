"""Where weights live: dense weights are resident, experts are in a cache; both are read from one `.moe` file.

Dense weights are all tensors outside the routed experts. A matrix is stored in rungs: the first holds codes of few
bits, and each further one adds bits to them. Level n of a matrix is its first n rungs.
"""

from edgemoe.store.dense import (
    EMBED_ROWS,
    Told,
    Weight,
    dense_bytes,
    has_stored_rows,
    load_dense,
    load_rows,
    load_tensors,
    looked_up_bytes,
    nobody,
    read_dense,
    resident_matrices,
    rows_bytes,
    rows_read,
    tensors_bytes,
)
from edgemoe.store.experts import ExpertStore
from edgemoe.store.records import (
    all_expert_bytes,
    disk_rate,
    expert_bytes,
    level_bytes,
    num_there,
    read_rate,
)
from edgemoe.store.request import Request

__all__ = [
    "EMBED_ROWS", "ExpertStore", "Request", "Told", "Weight", "all_expert_bytes", "dense_bytes", "disk_rate",
    "expert_bytes", "has_stored_rows", "level_bytes", "load_dense", "load_rows", "load_tensors",
    "looked_up_bytes", "nobody", "num_there", "read_dense", "read_rate", "resident_matrices", "rows_bytes", "rows_read",
    "tensors_bytes",
]  # fmt: skip
