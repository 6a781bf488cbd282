"""The common parts of architectures with Mamba-2 layers: their sizes, and tensors that are stored differently."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemoe.convert.gguf.architecture import Array, Made
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


def _log_rate(x: Array) -> Array:
    """Returns A_log from the file's -exp(A_log)."""
    with np.errstate(all="ignore"):  # NaN stays NaN, which the users of tensors check for
        return np.log(-x.astype(np.float64)).astype(np.float32)


def mamba2(prefix: str) -> dict[str, Made]:
    """Returns the tensors of a layer that are stored differently; `prefix` begins their names within the layer."""

    def flat(name: str, change: Any = lambda x: x) -> Made:
        return Made(
            (name,),
            lambda config, values: change(values[0]).reshape(-1),
            lambda config, shapes: (int(np.prod(shapes[0])),),
        )

    return {
        f"{prefix}A_log": flat("ssm_a", _log_rate),
        f"{prefix}D": flat("ssm_d"),
        f"{prefix}norm.weight": flat("ssm_norm.weight"),
    }
