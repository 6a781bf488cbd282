"""The verbs of the forward pass on a device: kernels on a queue, and the CPU's bits.

Weights outside the experts, keys and values and activations lie in the device's memory. The host has what schedulers
look at, the embedding, of which a token needs one row, and the experts that are not in the device's memory: it computes
them itself. See `Ops` for the verbs.
"""

from __future__ import annotations

from edgemoe.ops.cuda.attention import CudaAttention
from edgemoe.ops.cuda.recurrent import CudaRecurrent
from edgemoe.ops.cuda.repeats import CudaRepeats
from edgemoe.ops.cuda.rows import CudaRows

__all__ = ["CudaOps"]


class CudaOps(CudaRows, CudaAttention, CudaRecurrent, CudaRepeats):
    """Runs operations on a device, and experts that are not there on the host. One caller at a time."""
