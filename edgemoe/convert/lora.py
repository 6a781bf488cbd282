"""LoRA directories of peft, and what they add to the matrices of a checkpoint: W + (alpha / r) B A.

With `use_rslora` the factor is alpha / sqrt(r). Settings of peft that are not supported here are refused by name.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.folder import exists, missing, read_file
from edgemoe.convert.safetensors_file import StoredTensor, read_header, require_floats
from edgemoe.convert.settings import Settings
from edgemoe.errors import FormatError, quoted, shortened
from edgemoe.file.parse import parse_object

__all__ = ["CONFIG", "lora_patches"]

Array = NDArray[np.float32]

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)")
_PLAIN = re.compile(r"[\w.]+", re.ASCII)

_OTHERS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings that change what the factors mean or add other ones; those of `_ONLY_AT_START` only initialise them."""
_NESTED = ".base_layer"
_PARTS = ("gate_proj", "up_proj", "down_proj")
_ONLY_AT_START = ("corda_config", "eva_config", "lora_ga_config")
_RESIDUAL = ("pissa", "corda", "olora", "loftq")
"""Prefixes of `init_lora_weights` values with which the factors do not add to the checkpoint's matrix: each time peft
loads them, it first subtracts from the matrix the product that the factors were initialised to."""


@dataclass(frozen=True, slots=True)
class _Config:
    """The settings of `adapter_config.json`."""

    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    by_root: bool
    turns: bool | None
    """Whether it was written by a peft that transposed expert parameters (before 0.19); None if it names no version."""

    @classmethod
    def read(cls, path: Path) -> _Config:
        content = read_file(path, CONFIG, is_copied=False)
        if content is None:
            raise missing(path / CONFIG)
        where = str(path / CONFIG)
        values = parse_object(content, where)
        settings = Settings(values, where=where)
        if values.get("peft_type") != "LORA":
            raise FormatError(
                f"{where}: peft_type {quoted(values.get('peft_type'))} is not supported; supported: LORA"
            )
        for name in _OTHERS:
            if values.get(name) and name not in _ONLY_AT_START:
                raise FormatError(
                    f"{where}: {name} is not supported, only a LoRA of whole matrices"
                )
        begun = values.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_RESIDUAL):
            raise FormatError(
                f"{where}: init_lora_weights {quoted(begun)} changes the model that the factors add to; expected a "
                "LoRA of the model itself, which peft saves with path_initial_model_for_weight_conversion"
            )
        if settings.flag("fan_in_fan_out", False):
            raise FormatError(f"{where}: fan_in_fan_out is not supported")
        if settings.text("bias", "none") != "none":
            raise FormatError(f"{where}: bias {quoted(values['bias'])} is not supported, only none")
        patterns = [values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
        for name, pattern in zip(("rank_pattern", "alpha_pattern"), patterns, strict=True):
            if not isinstance(pattern, dict) or not all(map(_PLAIN.fullmatch, pattern)):
                raise FormatError(
                    f"{where}: {name}: expected names of modules, got {quoted(pattern)}"
                )
        ranks, alphas = patterns
        return cls(
            where, settings.integer("r"), settings.number("lora_alpha", 8.0), ranks, alphas,
            settings.flag("use_rslora", False),
            _turns(values.get("peft_version")),
        )  # fmt: skip

    def scaling(self, module: str, rank: int) -> float:
        """Returns the factor of B A in a module.

        Raises:
            FormatError: its factors have another rank than the settings say, or its alpha is not a number.
        """
        said = _of(self.ranks, module, self.rank)
        if said != rank:
            raise FormatError(
                f"{self.where}: {module}: its rank is {quoted(said)}, its factors have {rank}"
            )
        alpha = _of(self.alphas, module, self.alpha)
        alpha = Settings({"alpha_pattern": alpha}, where=self.where).number("alpha_pattern")
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _turns(version: object) -> bool | None:
    found = (
        re.match(r"(\d{1,4})\.(\d{1,4})", version, re.ASCII) if isinstance(version, str) else None
    )
    return None if found is None else (int(found[1]), int(found[2])) < (0, 19)


def _of(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns a module's value in a pattern: that of the first name that equals the module's or its last parts."""
    return next((v for name, v in pattern.items() if f".{module}".endswith(f".{name}")), default)


def lora_patches(path: Path, original: Checkpoint) -> dict[str, Callable[[Array], Array]]:
    """Returns for each tensor that a LoRA directory changes a function from its old to its new values, by name.

    Raises:
        FormatError: the directory is broken, has a target that the checkpoint lacks or that has another shape, or uses
            something that is not supported.
    """
    config = _Config.read(path)
    if not exists(path / _WEIGHTS):
        raise FormatError(f"{path}: no {_WEIGHTS}; only safetensors are supported")
    where = path / _WEIGHTS
    # The cache lives only as long as these patches: another directory may later have the same path.
    read = functools.lru_cache(maxsize=4)(StoredTensor.read)
    factors: dict[tuple[str, bool], dict[str, StoredTensor]] = {}
    out: dict[str, Callable[[Array], Array]] = {}
    for name, tensor in read_header(where).items():
        require_floats(tensor)
        short = name.removeprefix(_PREFIX)
        found = _FACTOR.fullmatch(short)
        if found is not None:
            factors.setdefault((found[1], bool(found[2])), {})[found[3]] = tensor
            continue
        saved = _SAVED.fullmatch(short)
        target = short if saved is None else f"{saved[1]}.{saved[2]}"
        _require(where, name, target, original, tensor.shape)
        if target in out:
            raise FormatError(f"{where}: {shortened(target)}: is there twice")
        out[target] = lambda _, tensor=tensor: tensor.read()  # type: ignore[misc]
    for (module, is_embedding), pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise FormatError(
                f"{where}: {shortened(module)}: expected lora_A and lora_B, got lora_{min(pair)} alone"
            )
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise FormatError(
                f"{where}: {shortened(module)}: factors of shapes {list(a.shape)} and {list(b.shape)} do not fit"
            )
        shape = (a.shape[1], b.shape[0]) if is_embedding else (b.shape[0], a.shape[1])
        experts = module
        while experts.endswith(_NESTED):  # peft wraps one parameter of a module around another
            experts = experts.removesuffix(_NESTED)
        if f"{experts}.0.{_PARTS[0]}.weight" in original.shapes and not is_embedding:
            adding = _of_experts(where, module, experts, (a, b), config, original, read)
            if not out.keys().isdisjoint(adding):
                raise FormatError(f"{where}: {shortened(module)}: has factors twice")
            out |= adding
            continue
        target = f"{module}.weight"
        _require(where, module, target, original, shape)
        if target in out:
            raise FormatError(f"{where}: {shortened(module)}: has factors and is there as a whole")
        out[target] = _adding(a, b, config.scaling(module, a.shape[0]), is_embedding)
    if not out:
        raise FormatError(f"{where}: has no tensors")
    return out


def _require(
    where: Path, name: str, target: str, original: Checkpoint, shape: tuple[int, ...]
) -> None:
    """Checks that the checkpoint has a target tensor, of the right shape."""
    if target not in original.shapes:
        raise FormatError(
            f"{where}: {shortened(name)}: {original.name} has no tensor {shortened(target)}"
        )
    if original.shapes[target] != shape:
        raise FormatError(
            f"{where}: {shortened(name)}: is for a tensor of shape {list(shape)}; "
            f"{original.name} has {list(original.shapes[target])}"
        )


def _of_experts(
    where: Path,
    module: str,
    experts: str,
    pair: tuple[StoredTensor, StoredTensor],
    config: _Config,
    original: Checkpoint,
    read: Callable[[StoredTensor], Array],
) -> dict[str, Callable[[Array], Array]]:
    """Returns the patches of a layer's experts, from factors for all of them: transformers has them as one parameter.

    Expert e has rows e * r to e * r + r - 1 of A, and columns e, E + e, 2 * E + e, … of B. The shapes of the factors
    tell which of the two parameters they are for (gate and up, or down), and whether for the parameter itself or, as
    before peft 0.19, for its transpose. Where the shapes fit both, the version of peft that wrote them decides.

    Args:
        read: returns the values of a factor; it is called once for each expert.
    """
    a, b = pair
    count = next(
        e for e in count_from(1) if f"{experts}.{e}.{_PARTS[0]}.weight" not in original.shapes
    )
    H, D = original.shapes[f"{experts}.0.{_PARTS[0]}.weight"]
    meanings = {(D, 2 * H): (0, False), (H, D): (1, False)}
    older = {(2 * H, D): (0, True), (D, H): (1, True)}
    shape = a.shape[1], b.shape[0]
    kinds = (meanings, older) if config.turns is None else (older,) if config.turns else (meanings,)
    found = [of[shape] for of in kinds if shape in of]
    if len(found) != 1 or a.shape[0] % count:
        raise FormatError(
            f"{where}: {shortened(module)}: factors of shapes {list(a.shape)} and {list(b.shape)} "
            f"{'may be of several' if found else 'are of no'} parameters of {count} experts of [{H}, {D}]"
        )
    ((which, is_turned),) = found
    rank = a.shape[0] // count
    scaling = np.float32(config.scaling(module, rank))

    def adding(e: int, rows: slice) -> Callable[[Array], Array]:
        def add(values: Array) -> Array:
            product = read(b)[:, e::count] @ read(a)[e * rank : (e + 1) * rank]
            return np.asarray(values + (product.T if is_turned else product)[rows] * scaling)

        return add

    parts = (
        ((_PARTS[0], slice(H)), (_PARTS[1], slice(H, None)))
        if which == 0
        else ((_PARTS[2], slice(None)),)
    )
    return {
        f"{experts}.{e}.{part}.weight": adding(e, rows)
        for e in range(count)
        for part, rows in parts
    }


def _adding(
    a: StoredTensor, b: StoredTensor, scaling: float, is_embedding: bool
) -> Callable[[Array], Array]:
    def add(values: Array) -> Array:
        product = b.read() @ a.read()
        return np.asarray(values + (product.T if is_embedding else product) * np.float32(scaling))

    return add
