"""Uses the quality stored in a model's file: picks settings for `--max-quality-loss`, and tells the cost of others."""

from __future__ import annotations

import functools
import shlex
from argparse import Namespace
from typing import TYPE_CHECKING

from edgemoe.cli.table import change

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from edgemoe.lab.quality.choice import Chosen

__all__ = ["MAX_LOSS_HELP", "check", "cost", "pick", "share"]

MAX_LOSS_HELP = (
    "take the fewest bits, or other settings, that `edgemoe quality --store` has measured to raise perplexity by "
    "at most this share: 0.01 or 1%%; with --scheduler auto, bits only"
)

_PICKED = ("bits", "allocation", "dense_bits", "experts", "scheduler", "set")


def share(text: str) -> float:
    """Returns the share that "0.01" or "1%" stands for.

    Raises:
        ValueError: neither, or not from 0 to below 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(
            f"--max-quality-loss: expected a share of perplexity like 0.01 or 1%, got {text!r}"
        )
    return value


def check(args: Namespace) -> None:
    """Checks `--max-quality-loss` and the flags that it replaces.

    Raises:
        ValueError: it is no share, or another flag sets what it would pick.
    """
    share(args.max_quality_loss)
    if getattr(args, "adapter", None):
        raise ValueError(
            "--max-quality-loss: is of what was measured of the model alone; expected no --adapter"
        )
    for name in _PICKED:
        given = getattr(args, name, None)
        if given not in (None, {}, "on-demand") and (name, given) != ("scheduler", "auto"):
            raise ValueError(
                f"--max-quality-loss: picks the settings itself; expected no --{name.replace('_', '-')}"
                + (" but auto" if name == "scheduler" else "")
            )


def pick(args: Namespace, *, context: int | None) -> str:
    """Picks settings, puts them into the arguments of a command, and returns a line about them.

    Args:
        args: arguments that `check` has accepted, with model, ram, threads, cache_type_k and cache_type_v.
        context: tokens that must fit; None for what fits well.

    Raises:
        ValueError: the file holds nothing to pick from.
        FormatError: it is not a sound `.moe` file.
    """
    from edgemoe.errors import OutOfBudget
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.quality.choice import OLD_ERRORS, applies, choose, has_chunks, is_plain, stored
    from edgemoe.runtime.opening import room_for_experts
    from edgemoe.runtime.options import EngineOptions

    limit = share(args.max_quality_loss)
    moe = open_moe(args.model)
    report = stored(moe)
    top = [moe.ladder[-1][0], moe.dense_ladder[-1]]
    if report is None or report["reference"] != top:
        raise ValueError(
            f"{args.model}: holds no quality measured against its highest level; {_command(args)} measures it"
        )

    def slots(dense_bits: int) -> int:
        try:
            options = EngineOptions(
                ram=args.ram, dense_bits=dense_bits, context=context, threads=args.threads,
                cache_type_k=args.cache_type_k, cache_type_v=args.cache_type_v,
                kv_table=getattr(args, "kv_table", None),
            )  # fmt: skip
            return room_for_experts(moe, options)
        except OutOfBudget:
            return 0  # the engine will say so, unless other settings fit

    caches = (args.cache_type_k, args.cache_type_v)
    rows = report["rows"]
    if (
        args.scheduler == "auto"
    ):  # auto finds the exact settings that pay; only the bits are left to pick, the same for all experts
        rows = [row for row in rows if is_plain(row) and row["bits"] != "auto"]
    found = choose(moe, rows, max_loss=limit, cache_types=caches, slots=slots)
    if found.row is not None:
        args.bits, args.dense_bits = found.row["bits"], found.row["dense_bits"]
        if args.scheduler != "auto":
            args.scheduler, args.set = found.row["scheduler"], dict(found.row["options"])
    old = sum(not applies(moe, row) for row in report["rows"])
    again = f"; {old} of its rows no longer hold: {_command(args)} measures again" if old else ""
    if any(applies(moe, row) and not has_chunks(row) for row in report["rows"]):
        again += f"; standard errors of an earlier version are multiplied by {OLD_ERRORS}"
    return f"--max-quality-loss {args.max_quality_loss}: {_about(found, report)}{again}"


def cost(args: Namespace) -> str | None:
    """Returns a line about the measured cost of the settings in the arguments; None if they were not measured.

    Call it before the engine is loaded: it reads the file's sections, for which the budget has no room afterwards.

    Args:
        args: with model, bits, dense_bits, allocation, experts, scheduler, set, cache_type_k and cache_type_v.

    Raises:
        FormatError: the file is not a sound `.moe` file.
    """
    caches = (args.cache_type_k, args.cache_type_v)
    is_exact = (args.bits, args.dense_bits, args.scheduler) == (None, None, "on-demand")
    if is_exact and not args.set and caches == ("f16", "f16"):
        return None
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.quality.choice import find, is_plain, stored

    moe = open_moe(args.model)
    report = stored(moe)
    top = [moe.ladder[-1][0], moe.dense_ladder[-1]]
    if report is None or report["reference"] != top or args.experts is not None:
        return None
    if getattr(args, "adapter", None):
        return None
    if getattr(args, "allocation", None) is not None:
        return None
    mine = functools.partial(
        find, moe, report["rows"], bits=args.bits or top[0], dense_bits=args.dense_bits or top[1],
        scheduler=args.scheduler, options=args.set, cache_types=caches,
    )  # fmt: skip
    if (row := mine()) is None:
        if mine(outdated=True) is None:
            return None
        return (
            f"what was measured of these settings no longer holds: {_command(args)} measures again"
        )
    room = "" if is_plain(row) else f", with {row['slots_bytes'] / 2**20:.0f} MiB for experts"
    return f"measured: perplexity {_loss(row)} {_where(report)}{room}"


def _command(args: Namespace) -> str:
    return f"edgemoe quality {shlex.quote(str(args.model))} --store"


def _where(report: Mapping[str, Any]) -> str:
    return f"on {report['measured_on'].removeprefix('text: ').partition('; reference')[0]}"


def _about(found: Chosen, report: Mapping[str, Any]) -> str:
    where = _where(report)
    if found.row is not None:
        return f"{_settings(found.row)}, perplexity {_loss(found.row)} {where}"
    if found.nearest is None:
        return "exact: nothing cheaper was measured for these flags and this memory"
    row = found.nearest
    return (
        f"exact: the next cheaper setting, {_settings(row)}, may cost more: perplexity "
        f"{_loss(row)} {where}"
    )


def _loss(row: Mapping[str, Any]) -> str:
    return "the same" if row["kl"] is None else change(row)


def _settings(row: Mapping[str, Any]) -> str:
    """Returns the flags that a row was measured with."""
    flags = [f"--bits {row['bits']} --dense-bits {row['dense_bits']}"]
    if row["scheduler"] != "on-demand":
        flags.append(f"--scheduler {row['scheduler']}")
    flags += [f"--set {name}={value}" for name, value in row["options"].items()]
    return " ".join(flags)
