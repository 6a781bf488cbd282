"""The common parts of architectures with Mamba-2 layers: their sizes, and tensors that are stored differently."""

from __future__ import annotations

from edgemoe.convert.gguf.architecture import Made, flat, log_rate
from edgemoe.convert.gguf.meta import Meta

__all__ = ["mamba2", "sizes"]


def sizes(meta: Meta) -> dict[str, int]:
    """Returns the numbers of heads, states, groups and convolution taps, and the head size."""
    heads = meta.whole("ssm.time_step_rank")
    return {
        "heads": heads,
        "head_dim": meta.whole("ssm.inner_size") // heads,
        "states": meta.whole("ssm.state_size"),
        "groups": meta.whole("ssm.group_count"),
        "taps": meta.whole("ssm.conv_kernel"),
    }


def mamba2(prefix: str) -> dict[str, Made]:
    """Returns the tensors of a layer that are stored differently; `prefix` begins their names within the layer."""
    return {
        f"{prefix}A_log": flat("ssm_a", log_rate),
        f"{prefix}D": flat("ssm_d"),
        f"{prefix}norm.weight": flat("ssm_norm.weight"),
    }
