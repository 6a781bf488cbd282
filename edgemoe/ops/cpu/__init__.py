"""The verbs of the forward pass on a CPU: numpy arrays in, native kernels underneath."""

from __future__ import annotations

from edgemoe.ops.cpu.attention import CpuAttention
from edgemoe.ops.cpu.recurrent import CpuRecurrent
from edgemoe.ops.cpu.repeats import CpuRepeats
from edgemoe.ops.cpu.rows import CpuRows

__all__ = ["CpuOps"]


class CpuOps(CpuRows, CpuAttention, CpuRecurrent, CpuRepeats):
    """The operations of a CPU, with their own threads and scratch. One caller at a time. See `Ops` for the verbs."""
