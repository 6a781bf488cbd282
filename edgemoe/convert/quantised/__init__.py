"""Quantised checkpoints as their makers release them, dequantised to floats when read.

A method is chosen by the `quantization_config` of config.json. It finds the stored tensors that together make one
weight, and presents the weight under the name that it has in a float checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemoe.convert.quantised import awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from edgemoe.convert.quantised.tensors import Method, Pieces, Tensor
from edgemoe.convert.safetensors_file import StoredTensor
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted

__all__ = ["METHODS", "Method", "Tensor", "as_floats", "without_quantisation"]

METHODS: Mapping[str, Method] = {
    "awq": awq.METHOD,
    "compressed-tensors": compressed_tensors.METHOD,
    "fbgemm_fp8": fp8.PER_CHANNEL,
    "fp8": fp8.METHOD,
    "gptq": gptq.METHOD,
    "modelopt": modelopt.METHOD,
    "mxfp4": mxfp4.METHOD,
}
"""Methods by the `quant_method` of config.json."""

_KEYS = ("quantization_config", "compression_config")  # compressed-tensors' older name

# Scales of activations, keys and values. They are ignored, as these stay floats here.
_OF_ACTIVATIONS = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "activation_scale",
    "activation_scale_ub",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)


def as_floats(
    config: Mapping[str, Any], stored: Mapping[str, StoredTensor], *, where: str
) -> Mapping[str, Tensor]:
    """Returns a checkpoint's tensors, with quantised ones presented as floats; reads no weights.

    Args:
        config: the content of config.json.
        stored: every stored tensor by name.
        where: the path of config.json, for messages.

    Raises:
        FormatError: the method or one of its settings is not supported, or a scale is missing or has another shape.
    """
    settings = _settings(config, where)
    if settings is None:
        return stored
    name = settings.text("quant_method")
    method = METHODS.get(name)
    if method is None:
        raise settings.error(
            "quant_method", f"{quoted(name)} is not supported; supported: {', '.join(METHODS)}"
        )
    pieces = Pieces({n: t for n, t in stored.items() if not n.endswith(_OF_ACTIVATIONS)})
    method.read(pieces, settings)
    return pieces.tensors()


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without the quantisation settings, as in a float checkpoint."""
    inner = config.get("text_config")
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(inner, Mapping):
        kept["text_config"] = {key: value for key, value in inner.items() if key not in _KEYS}
    return kept


def _settings(config: Mapping[str, Any], where: str) -> Settings | None:
    """Returns the section that describes the quantisation, which may be inside `text_config`; None if there is none."""
    whole = Settings(config, where=where)
    for key in _KEYS:
        if found := whole.section(key):
            return found
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return Settings(text, where=f"{where}: text_config").section(_KEYS[0])
    return None
