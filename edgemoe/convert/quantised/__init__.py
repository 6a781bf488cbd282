"""Quantised checkpoints as their makers release them, read as the floats that they stand for.

A method is chosen by config.json's `quantization_config`. It finds the stored tensors that together make one weight and
presents that under the name which a float checkpoint has for it.
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
"""By the `quant_method` of config.json."""

_KEYS = ("quantization_config", "compression_config")  # the second is the older name of one method

# What was measured of activations, keys and values. They stay floats here.
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
    """Returns a checkpoint's tensors with those that are quantised as floats, reading no weight.

    Args:
        config: the content of config.json.
        stored: every stored tensor by name.
        where: config.json's path, for messages.

    Raises:
        FormatError: the method or a value of it is not supported, or a scale is missing or of another shape.
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
    """Returns config.json as the float checkpoint would have it."""
    inner = config.get("text_config")
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(inner, Mapping):
        kept["text_config"] = {key: value for key, value in inner.items() if key not in _KEYS}
    return kept


def _settings(config: Mapping[str, Any], where: str) -> Settings | None:
    """Returns the section that describes the quantisation, which may lie beside the text model's other keys."""
    whole = Settings(config, where=where)
    for key in _KEYS:
        if found := whole.section(key):
            return found
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return Settings(text, where=f"{where}: text_config").section(_KEYS[0])
    return None
