"""Frequencies of rotary position embeddings (RoPE), with every scaling that the supported families use.

The formulas are those of transformers (`modeling_rope_utils.py`), the reference for what a config.json means. The
context length that a scaling extends to follows vLLM's rule: `factor` times the original length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgemoe.config import LIMIT
from edgemoe.convert.settings import Settings
from edgemoe.errors import quoted

__all__ = ["Rope", "check_rotated", "query_growth", "rope", "rotated_columns", "score_gain"]

Array = NDArray[np.float64]

_BEYOND = "is beyond what can be computed"


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of q and k: at position p, pair i is rotated by p * frequencies[i] radians."""

    frequencies: NDArray[np.float32]
    """[dim / 2]"""
    scale: float
    """Multiplies cos and sin."""
    context_length: int
    """The longest context in tokens: that of config.json, or a longer one that the scaling is for."""
    note: str = ""
    """A line for the user about the part of the scaling that is not used; empty if all of it is."""
    short: NDArray[np.float32] | None = None
    """[dim / 2]: the frequencies of sequences of up to `short_length` tokens; None for `frequencies`."""
    short_length: int = 0

    def of(self, length: int) -> NDArray[np.float32]:
        """Returns the frequencies of a sequence of `length` tokens; they apply to all its positions."""
        if self.short is None or length > self.short_length:
            return self.frequencies
        return self.short

    def tensors(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Returns the frequency tensors by their names in a file, as in `RopeSpec.tensors`."""
        short = {} if self.short is None else {f"{name}_short": self.short}
        return {name: self.frequencies, **short}


@dataclass(frozen=True, slots=True)
class _Request:
    """The inputs of a scaling: its parameters, and the model's sizes."""

    parameters: Settings
    dim: int
    theta: float
    max_positions: int
    original_length: int

    def plain(self) -> Array:
        """Returns the unscaled frequencies, [dim / 2]."""
        exponents = np.arange(0, self.dim, 2, dtype=np.float64) / self.dim
        frequencies: Array = self.theta**-exponents
        return frequencies

    def stretch(self) -> float:
        """Returns `factor` or, without it, how many times longer than the original length the context is."""
        return self.parameters.positive("factor", self.max_positions / self.original_length)

    def context_length(self) -> int:
        """Returns the context length of a scaling: `factor` times the original, or that of config.json if longer.

        Published recipes add a scaling to config.json and leave `max_position_embeddings` as it was.
        """
        reach = self.stretch() * self.original_length
        if reach >= LIMIT:
            raise self.parameters.error(
                "factor", f"{reach:.6g} positions are more than the {LIMIT - 1} that are supported"
            )
        return max(self.max_positions, int(reach))


def rope(settings: Settings, *, dim: int, default_theta: float) -> Rope:
    """Computes the frequencies that config.json asks for.

    Reads `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (earlier versions).

    Args:
        settings: the settings of config.json.
        dim: columns of each query and key head that are rotated.
        default_theta: the base if config.json names none.

    Raises:
        FormatError: the scaling is unknown, or a parameter is missing or out of range.
    """
    parameters = _parameters(settings)
    for layer_type in ("full_attention", "sliding_attention"):
        if parameters.get(layer_type) is not None:
            raise parameters.error(layer_type, "RoPE that differs by layer is not supported")
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    supported = (*_SCALINGS, "longrope")
    if kind not in supported:
        raise parameters.error(
            "rope_type", f"{quoted(kind)} is not supported; supported: {', '.join(supported)}"
        )
    theta = parameters.number("rope_theta", settings.number("rope_theta", default_theta))
    if theta <= 1:
        raise parameters.error("rope_theta", f"must be above 1, got {theta}")
    max_positions = settings.integer("max_position_embeddings", at_least=2)
    original_length = settings.integer(
        "original_max_position_embeddings",
        parameters.integer("original_max_position_embeddings", max_positions, at_least=2),
        at_least=2,
    )
    request = _Request(parameters, dim, theta, max_positions, original_length)

    def rounded(frequencies: Array) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            out = frequencies.astype(np.float32)
        if not np.isfinite(out).all():
            raise parameters.error("rope_type", f"{kind} gives frequencies that are not finite")
        return out

    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "longrope":
            return _longrope(request, rounded)
        frequencies, scale = _SCALINGS[kind](request)
    if kind in ("linear", "yarn", "llama3"):
        return Rope(rounded(frequencies), scale, request.context_length())
    note = ""
    if kind == "dynamic" and parameters.get("alpha") is None:
        note = (
            f"dynamic RoPE scaling: contexts of up to {max_positions} tokens, where it changes nothing; "
            "beyond these every length has frequencies of its own, which is not supported"
        )
    return Rope(rounded(frequencies), scale, max_positions, note)


def rotated_columns(settings: Settings, head_dim: int, default: float = 1.0) -> int:
    """Returns how many leading columns of a head RoPE rotates: the share that config.json gives, or `default`."""
    return int(head_dim * _share(_parameters(settings), _share(settings, default)))


def _share(settings: Settings, default: float) -> float:
    share = settings.positive("partial_rotary_factor", default)
    if share > 1:
        raise settings.error("partial_rotary_factor", f"must be at most 1, got {share:g}")
    return share


def check_rotated(settings: Settings, head_dim: int, dim: int) -> None:
    """Checks that config.json, if it gives a share of a head's columns to rotate, gives the `dim` of the family.

    Raises:
        FormatError: it gives another share.
    """
    for source in (_parameters(settings), settings):
        factor = source.number("partial_rotary_factor", dim / head_dim)
        if not dim <= head_dim * factor < dim + 1:
            raise source.error(
                "partial_rotary_factor",
                f"expected {dim / head_dim:g} for this family, got {factor:g}",
            )


def score_gain(settings: Settings) -> float:
    """Returns the factor by which scaled RoPE multiplies scores if config.json has `mscale_all_dim` (DeepSeek-V2).

    It applies in addition to `Rope.scale`, which is then a quotient of two such magnitudes, usually 1.
    """
    parameters = _parameters(settings)
    mscale = parameters.number("mscale_all_dim", 0.0)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind == "default" or not mscale:
        return 1.0
    magnitude = _magnitude(parameters.positive("factor"), mscale)
    if not math.isfinite(magnitude * magnitude):
        raise parameters.error("mscale_all_dim", _BEYOND)
    return magnitude * magnitude


def query_growth(settings: Settings) -> tuple[float, int]:
    """Returns how much queries grow with their position, and the number of positions in a step; zeros for no growth.

    These are `growth` and `grow_every` of a mixer: the scaling of Llama 4, which Mistral 4 has too.
    """
    parameters = _parameters(settings)
    growth = parameters.number("llama_4_scaling_beta", 0.0)
    if growth < 0:
        raise parameters.error("llama_4_scaling_beta", f"must not be negative, got {growth}")
    if not growth:
        return 0.0, 0
    return growth, parameters.integer("original_max_position_embeddings")


def _magnitude(factor: float, mscale: float) -> float:
    """Returns YaRN's gain for longer contexts, whose attention scores would otherwise be flatter."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _parameters(settings: Settings) -> Settings:
    # If a file has both, the older key wins, as in transformers.
    return settings.section("rope_scaling") or settings.section("rope_parameters") or Settings({})


def _default(request: _Request) -> tuple[Array, float]:
    # Also for "dynamic", which changes the base only beyond max_position_embeddings, where the context ends; and for
    # "mrope", which gives each token three positions that are equal in text.
    return request.plain(), 1.0


def _dynamic(request: _Request) -> tuple[Array, float]:
    """Raises the base once, for all lengths, if there is an `alpha` (NTK, as Hunyuan has it); else see `_default`."""
    if request.parameters.get("alpha") is None:
        return request.plain(), 1.0
    dim, alpha = request.dim, request.parameters.positive("alpha")
    try:
        theta = request.theta * alpha ** (dim / (dim - 2))
    except (OverflowError, ZeroDivisionError):
        theta = math.inf
    if not 1 < theta < math.inf:
        raise request.parameters.error(
            "alpha", f"{alpha:g} gives no finite base above 1 for {dim} columns"
        )
    return replace(request, theta=theta).plain(), 1.0


def _proportional(request: _Request) -> tuple[Array, float]:
    """Rotates only a leading share of the pairs of all columns, and the other pairs not at all."""
    turned = int(_share(request.parameters, 1.0) * request.dim // 2)
    frequencies = request.plain()
    frequencies[turned:] = 0
    return frequencies / request.parameters.positive("factor", 1.0), 1.0


def _linear(request: _Request) -> tuple[Array, float]:
    return request.plain() / request.parameters.positive("factor"), 1.0


def _yarn(request: _Request) -> tuple[Array, float]:
    """Interpolates low frequencies and keeps high ones, with a ramp between them (YaRN, Peng et al. 2023)."""
    parameters, dim, factor = request.parameters, request.dim, request.stretch()

    scale = _magnitude(factor, 1)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        scale = _magnitude(factor, parameters.positive("mscale"))
        scale /= _magnitude(factor, parameters.positive("mscale_all_dim"))

    def dimension(key: str, default: float) -> float:
        turns = request.original_length / (parameters.positive(key, default) * 2 * math.pi)
        found = dim * math.log(turns) / (2 * math.log(request.theta)) if turns > 0 else math.inf
        if not math.isfinite(found):
            raise parameters.error(key, _BEYOND)
        return found

    low, high = dimension("beta_fast", 32), dimension("beta_slow", 1)
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the paper's code: a step instead of a division by zero
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    plain = request.plain()
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)
    return frequencies, parameters.positive("attention_factor", scale)


def _longrope(request: _Request, rounded: Callable[[Array], NDArray[np.float32]]) -> Rope:
    """Divides each frequency by a factor that was found by search (LongRoPE, arXiv 2402.13753).

    There is one set of factors for sequences within the original length, and one for longer sequences.
    """
    parameters, factor = request.parameters, request.stretch()
    context_length, original_length = request.context_length(), request.original_length
    short, long = (
        rounded(request.plain() / np.array(parameters.positives(key, request.dim // 2)))
        for key in ("short_factor", "long_factor")
    )
    scale = 1.0
    if factor > 1:
        scale = math.sqrt(1 + math.log(factor) / math.log(original_length))
    scale = parameters.positive("attention_factor", scale)
    if context_length <= original_length:
        return Rope(short, scale, context_length)
    return Rope(long, scale, context_length, short=short, short_length=original_length)


def _llama3(request: _Request) -> tuple[Array, float]:
    """Divides low frequencies, keeps high ones, and blends between two wavelengths (Llama 3.1).

    Llama-4-Scout has one wavelength for both, and so no blend.
    """
    parameters = request.parameters
    factor = parameters.positive("factor")
    low, high = parameters.positive("low_freq_factor"), parameters.positive("high_freq_factor")
    if low > high:
        raise parameters.error("low_freq_factor", f"must be at most high_freq_factor {high}: {low}")
    plain = request.plain()
    turns = request.original_length * plain / (2 * math.pi)
    kept = (
        np.clip((turns - low) / (high - low), 0, 1) if low < high else (turns >= low).astype(float)
    )
    return (1 - kept) * plain / factor + kept * plain, 1.0


_SCALINGS: dict[str, Callable[[_Request], tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "mrope": _default,
    "proportional": _proportional,
    "yarn": _yarn,
    "llama3": _llama3,
}
