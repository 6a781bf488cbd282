"""Turns a command's flags into options of an engine, in the same way for all commands."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["ONE_ADAPTER_HELP", "engine_flags", "one_adapter", "sampling_flags"]

_SAME = (
    "ram", "bits", "allocation", "dense_bits", "experts", "cache_type_k", "cache_type_v", "kv_table", "threads",
    "scheduler", "device", "vram",
)  # fmt: skip
"""Flags with the name and the meaning of an engine option."""

ONE_ADAPTER_HELP = "measure the model with this adapter, a fine-tune of edgemoe convert --base"
"""The help of --adapter in commands that measure."""


def engine_flags(args: Namespace, **given: Any) -> dict[str, Any]:
    """Returns a command's flags as arguments of `EngineOptions`; `ram` is for the whole process.

    Args:
        args: the parsed arguments; options that the command has no flag for are left out.
        given: options that the command decides itself; they replace those of flags.
    """
    flags = vars(args)
    said: dict[str, Any] = {"whole_process": True}
    said |= {name: flags[name] for name in _SAME if name in flags}
    if "adapter" in flags:
        said["adapters"] = _adapters(flags["adapter"])
    if "set" in flags:
        said["options"] = flags["set"] or {}  # the command has turned its texts into a mapping
    if "no_verify" in flags:
        said["verify"] = not flags["no_verify"]
    return {**said, **given}


def _adapters(given: Sequence[str]) -> Mapping[str, str]:
    """Returns the files of `--adapter` by name; a file without NAME= goes by its own name.

    Raises:
        ValueError: two adapters have the same name.
    """
    out: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = Path(text).name.removesuffix(".moea"), text
        if name in out:
            raise ValueError(f"--adapter: two are called {name}; NAME=FILE gives one another name")
        out[name] = path
    return out


def one_adapter(args: Namespace) -> Mapping[str, str]:
    """Returns the one adapter that a command measures, as its file by name; empty for the model alone.

    Raises:
        ValueError: more than one is given.
    """
    if len(args.adapter) > 1:
        raise ValueError(f"--adapter: expected one, which is measured, got {len(args.adapter)}")
    return _adapters(args.adapter)


def sampling_flags(args: Namespace) -> dict[str, Any]:
    """Returns a command's sampling flags as arguments of `SamplingParams`."""
    given = {
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "typical_p": args.typical,
        "repeat_penalty": args.repeat_penalty,
        "repeat_last_n": args.repeat_last_n,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "max_tokens": args.predict,
    }
    return {name: value for name, value in given.items() if value is not None}
