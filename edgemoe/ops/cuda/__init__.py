"""The verbs of the forward pass on a GPU ("the device"): kernels on a queue, with the same bits as on the CPU.

Dense weights, keys and values, and activations lie in the device's memory. The host's memory has what schedulers look
at, the embedding, of which a token needs one row, and the experts that are not on the device: the CPU computes those
itself. See `Ops` for the verbs.
"""

from __future__ import annotations

from edgemoe.ops.cuda.attention import CudaAttention
from edgemoe.ops.cuda.recurrent import CudaRecurrent
from edgemoe.ops.cuda.repeats import CudaRepeats
from edgemoe.ops.cuda.rows import CudaRows

__all__ = ["CudaOps"]


class CudaOps(CudaRows, CudaAttention, CudaRecurrent, CudaRepeats):
    """The operations of a device; experts that are not in its memory run on the host. One caller at a time."""
