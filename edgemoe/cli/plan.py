"""`edgemoe plan`: says how a model would fit, before any weight is read."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import note, run_command, say, say_json
from edgemoe.cli.names import add_model, kept_model, model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.speeds import Speeds, measured, rate_text, speeds
from edgemoe.cli.table import change
from edgemoe.cli.values import CACHE_TYPES_TEXT, ram_size, whole
from edgemoe.errors import size_text

if TYPE_CHECKING:
    from edgemoe.hub.name import HubName
    from edgemoe.runtime.forecast import Band, Forecast, Row

__all__ = ["main"]

_PROG = "edgemoe plan"

_EPILOG = """\
MODEL is a .moe file, a name of edgemoe list, a checkpoint's directory, a GGUF file, or
user/repo[:QUANT] on the Hugging Face hub. Of a checkpoint, only headers and the
tokenizer are read; from the hub, nothing else is fetched.

The table shows what the engine itself would do with a budget: how many tokens of context
fit, and which share of the experts is in memory. "read per token" is what a token of the
reply reads from the disk if every expert is as likely as any other; real text repeats
itself and reads less. "tok/s" is the range of speeds of one reply, predicted from
measurements of this machine: its memory, its kernels, and its disk with reads of the
size of an expert. "bound by" says what takes most of the time:

    disk       reading experts that are not in memory: more --ram, or fewer bits
    memory     reading weights from memory: fewer bits
    computing  the arithmetic on weights: more cores, or fewer bits
    layers     the fixed cost of each layer: the model is small

"perplexity" is shown if the file holds what its levels were measured to cost
(edgemoe quality MODEL --store).

How often a wanted expert is absent depends on the text. A trace of your own text
(edgemoe-run --trace FILE) tells it; without one it is assumed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 3 where no budget that was asked for suffices.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    args = _parser().parse_args(argv)
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    from edgemoe.file.format import MAGIC

    remote = _remote(args.model)
    if remote is not None:
        return _of_hub(args, remote)
    args.model = model_path(args.model)
    if args.model.is_file():
        with open(args.model, "rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return _tell(args)
    return _of_checkpoint(args, args.model)


def _remote(text: str | None) -> HubName | None:
    """Returns the hub's name that a text means; None for a model that is here."""
    if text is None or Path(text).exists() or kept_model(text) is not None:
        return None
    from edgemoe.hub.name import HubName

    try:
        return HubName.parse(text)
    except ValueError:
        return None


def _of_hub(args: argparse.Namespace, name: HubName) -> int:
    """Fetches the headers of a hub's checkpoint and plans it."""
    from edgemoe.hub.outline import choose, outline
    from edgemoe.hub.pull import open_repository, saying_what_is_here

    with saying_what_is_here(name):
        repository = open_repository(name)
        chosen = choose(repository, name)
    if chosen.note:
        note(f"# {name}: {chosen.note}")
    largest = max(file.size for file in chosen.weights)
    note(
        f"# {name}: {size_text(chosen.size)} in {len(chosen.weights)} files to fetch; while edgemoe pull converts "
        f"them, the disk holds the .moe file and one of them, {size_text(largest)} at most"
    )
    with tempfile.TemporaryDirectory(prefix="edgemoe-plan-") as folder:
        with saying_what_is_here(name):
            path = outline(repository, chosen, Path(folder) / name.repo.replace("/", "-"))
        if args.bits is None:
            args.bits = name.bits
        args.name = str(name)
        return _of_checkpoint(args, path)


def _of_checkpoint(args: argparse.Namespace, source: Path) -> int:
    """Writes a `.moe` file with holes for weights, and plans it in another process, which has not read the checkpoint.

    Memory that was used for the checkpoint would count against the budget.
    """
    from edgemoe.cli.apart import run_apart
    from edgemoe.convert.checkpoint import sections
    from edgemoe.convert.open import open_checkpoint
    from edgemoe.convert.source import SourceModel
    from edgemoe.file.hollow import write_hollow
    from edgemoe.quant import SCHEMES

    if "auto" in (args.cache_type_k, args.cache_type_v):
        raise ValueError(
            "-ctk and -ctv: auto is for a .moe file, whose table of types it takes; a checkpoint has none"
        )
    if args.kv_table is not None:
        raise ValueError("--kv-table: is for a .moe file, with -ctk auto and -ctv auto")
    checkpoint = open_checkpoint(source)
    model = SourceModel(checkpoint, are_there=False)
    name = args.name or checkpoint.name
    for line in model.notes:
        note(f"# {name}: {line}")
    if args.trace is not None:
        args.trace = args.trace.absolute()
    with tempfile.TemporaryDirectory(prefix="edgemoe-plan-") as folder:
        path = Path(folder) / "plan.moe"
        write_hollow(path, model.config, scheme=SCHEMES["nested"], sections=sections(checkpoint))
        flags = [str(path), "--name", name, "-ctk", args.cache_type_k, "-ctv", args.cache_type_v]
        for flag in ("ram", "ctx_size", "bits", "trace"):
            if getattr(args, flag) is not None:
                flags += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        flags += ["--json"] if args.json else []
        flags += ["--no-probe"] if args.no_probe else []
        flags += ["--verbose"] if args.verbose else []
        return run_apart("plan", *flags)


def _tell(args: argparse.Namespace) -> int:
    # `edgemoe-run` has these in memory too, so that the forecast must count them.
    import edgemoe.cli.run
    import edgemoe.runtime.chat  # noqa: F401
    from edgemoe.errors import OutOfBudget
    from edgemoe.runtime.budget import default_ram
    from edgemoe.runtime.forecast import Forecast
    from edgemoe.runtime.options import EngineOptions

    options = EngineOptions(
        cache_type_k=args.cache_type_k, cache_type_v=args.cache_type_v, kv_table=args.kv_table
    )  # fmt: skip
    forecast = Forecast(args.model, context=args.ctx_size, options=options)
    levels = forecast.levels[::-1] if args.bits is None else (args.bits,)
    for bits in levels:
        forecast.moe.level(bits)  # a ValueError names the levels there are
    free = default_ram()
    rams = [free, free // 2, free // 4] if args.ram is None else [args.ram]
    rows: list[Row] = []
    for ram in rams:
        for bits in levels:
            try:
                rows.append(forecast.row(ram, bits))
            except OutOfBudget as error:
                if args.ram is not None and bits == levels[-1]:
                    note(f"{_PROG}: {bits} bits: {error}")
            else:
                if rows[-1].resident == 1:
                    break  # with fewer bits everything fits too
    smallest = forecast.smallest(levels[-1])
    name = args.name or args.model.name
    speed = speeds(args, forecast, rows)
    costs = _costs(args)
    if args.json:
        say_json(_values(forecast, name, levels, rows, smallest, speed, costs))
    else:
        say(*_lines(forecast, name, levels, rows, smallest, speed, costs))
    return 0 if rows else 3


def _costs(args: argparse.Namespace) -> Mapping[int | str, Mapping[str, Any]]:
    """Returns the measured quality of each level, by bits, as far as the file holds it."""
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.quality.choice import plain_rows

    moe = open_moe(args.model)
    types = (args.cache_type_k, args.cache_type_v)
    return plain_rows(moe, dense_bits=moe.dense_ladder[-1], cache_types=types)


def _lines(
    forecast: Forecast, name: str, levels: Sequence[int], rows: Sequence[Row], smallest: Row, speed: Speeds,
    costs: Mapping[int | str, Mapping[str, Any]],
) -> Iterator[str]:  # fmt: skip
    c = forecast.moe.config
    yield (
        f"{name}: {c.family}, {c.num_layers} layers, {len(c.moe_layers)} with {c.num_experts} experts, "
        f"{c.experts_per_token} per token"
    )
    files = ", ".join(f"{bits} bits {size_text(forecast.file_bytes(bits))}" for bits in levels)
    yield f"  size of the .moe file: {files}"
    if rows:
        yield ""
        yield (
            "      --ram  --bits  context  experts in memory  read per token           tok/s  bound by"
            + ("   perplexity" if costs else "")
        )
    for row, band in zip(rows, speed.bands, strict=True):
        b = row.budget
        bound = band.bound if band else "?"
        cost = f"  {_change(costs.get(row.bits))}" if costs else ""
        reads = size_text(row.token_bytes) if row.token_bytes else "nothing"
        tokens = f"{rate_text(band.low)} … {rate_text(band.high)}" if band else "?"
        yield (
            f"{size_text(b.ram):>11}  {row.bits:>6}  {b.context:>7}  {100 * row.resident:>16.0f}%  "
            f"{reads:>14}  {tokens:>14}  {bound:<9}{cost}".rstrip()
        )
    yield ""
    yield from measured(speed)
    b = smallest.budget
    yield f"  smallest that works: --ram {b.ram >> 20}MiB --bits {smallest.bits}, {b.context} tokens of context"


def _change(row: Mapping[str, Any] | None) -> str:
    """Returns how much a level was measured to change perplexity, as text."""
    if row is None:
        return "?"
    return "reference" if row["kl"] is None else change(row)


def _values(
    forecast: Forecast, name: str, levels: Sequence[int], rows: Sequence[Row], smallest: Row, speed: Speeds,
    costs: Mapping[int | str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    def values(row: Row) -> dict[str, Any]:
        b = row.budget
        return {
            "ram": b.ram, "bits": row.bits, "context": b.context, "resident": row.resident, "lent": forecast.lent(row),
            "token_bytes": row.token_bytes, "process": b.process, "dense": b.dense, "kv": b.kv,
            "scratch": b.scratch, "slots": b.slots, "experts": b.experts, "expert": b.expert,
        }  # fmt: skip

    def said(band: Band | None) -> dict[str, Any]:
        return {
            "tokens_per_s": None if band is None else [band.low, band.high],
            "bound": None if band is None else band.bound,
        }

    return {
        "name": name,
        "family": forecast.moe.config.family,
        "files": {str(bits): forecast.file_bytes(bits) for bits in levels},
        "rows": [
            {**values(row), **said(band)} for row, band in zip(rows, speed.bands, strict=True)
        ],
        "smallest": values(smallest),
        "machine": None if speed.pace is None else asdict(speed.pace),
        "loss_change": {
            str(bits): 0.0 if row["kl"] is None else row["loss_change"]
            for bits, row in costs.items()
        },
        "disk": {str(size): rate for size, rate in speed.disks.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Show how a model would fit this machine, before it is converted.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add_model(parser, help="a .moe file, a name, a checkpoint, a GGUF file or a hub's user/repo")
    free = "memory for the whole process (default: what is free, a half and a quarter of it)"
    add("--ram", type=ram_size, metavar="SIZE", help=free)
    fits = "tokens of context that must fit (default: as many as fit)"
    add("-c", "--ctx-size", type=whole(1), metavar="N", help=fits)
    add("--bits", type=whole(1), metavar="N", help="bits of the experts (default: all levels)")
    types = f"in the KV cache: {CACHE_TYPES_TEXT}; auto: each layer's own (default: %(default)s)"
    add("-ctk", "--cache-type-k", default="f16", metavar="TYPE", help=f"keys {types}")
    add("-ctv", "--cache-type-v", default="f16", metavar="TYPE", help=f"values {types}")
    table = "for auto: a file of edgemoe allocate --kv (default: the model file's)"
    add("--kv-table", type=Path, metavar="FILE", help=table)
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="a file of edgemoe-run --trace, which tells how often experts are absent",
    )
    add("--no-probe", action="store_true", help="do not read from the disk to measure it")
    add("--name", help=argparse.SUPPRESS)
    add("--json", action="store_true", help="print JSON instead, with sizes in bytes")
    add("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser
