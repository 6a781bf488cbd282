"""Lists what can be converted, read from the tables that decide it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from edgemoe.convert.families import FAMILIES
from edgemoe.convert.families.family import Family
from edgemoe.convert.gguf.architectures import ARCHITECTURES
from edgemoe.convert.gguf.tokenizer import KINDS
from edgemoe.convert.gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from edgemoe.convert.quantised import METHODS

__all__ = ["models", "supported"]

_DENSE = ("llama",)
"""The model_types of dense models that `--carve` turns into a Mixture of Experts."""


def models(family: Family) -> str:
    """Returns a family's models in words: the part of its module's docstring before the colon."""
    module = sys.modules[family.config.__module__]
    return (module.__doc__ or module.__name__.rpartition(".")[2]).partition(":")[0].strip()


def supported() -> dict[str, Any]:
    """Returns families with their model_types and GGUF architectures, and the quantised formats, GGUF types and GGUF
    tokenizers that can be read."""
    by_family: dict[int, list[str]] = {}
    for name, family in FAMILIES.items():
        by_family.setdefault(id(family), []).append(name)
    families = [
        {
            "models": models(FAMILIES[names[0]]),
            "model_types": names,
            "gguf": _gguf(names),
        }
        for names in by_family.values()
    ]
    return {
        "families": families,
        "dense": {"model_types": list(_DENSE), "gguf": _gguf(_DENSE)},
        "quantised": {name: method.title for name, method in METHODS.items()},
        "gguf_types": _types(),
        "gguf_tokenizers": {kind: list(PRE_TOKENIZERS) if kind == "gpt2" else [] for kind in KINDS},
    }


def _gguf(model_types: list[str] | tuple[str, ...]) -> list[str]:
    return [name for name, arch in ARCHITECTURES.items() if arch.makes & set(model_types)]


def _types() -> list[str]:
    """Returns the names of the tensor types that the package gguf decodes; empty if it is not installed."""
    try:
        traits: Mapping[Any, Any] = importlib.import_module("gguf.quants")._type_traits
    except ImportError:
        return []
    return ["F32", "F16", *sorted({kind.name for kind in traits} - {"F32", "F16"})]
