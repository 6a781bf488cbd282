"""`edgemoe quality`: measures what each level of a file, or each scheduler, costs in quality."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemoe.cli.console import check_output, note, run_command, say
from edgemoe.cli.engine import ONE_ADAPTER_HELP, engine_flags, one_adapter
from edgemoe.cli.names import add_model, model_path
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.reference import CHUNK, EXACT, reference
from edgemoe.cli.scheduling import SET_HELP, options_text, read_settings
from edgemoe.cli.table import QUALITY_HEAD, quality_line, run_name
from edgemoe.cli.tasks import add_flags, check_tasks, run_tasks
from edgemoe.cli.values import CACHE_TYPES_TEXT, bits_or_auto, ram_size
from edgemoe.file.whole import write_whole

if TYPE_CHECKING:
    from edgemoe.file.format import MoeFile
    from edgemoe.lab.quality.quality import Quality, Sample, Trial
    from edgemoe.lab.report.levels import Level

__all__ = ["main"]

_PROG = "edgemoe quality"

_FEW = 10
"""Fewer chunks than this leave the errors of their means very uncertain: a fourth for ten."""

_EPILOG = """\
The text is cut into chunks and the second half of each is scored, as llama.cpp's
llama-perplexity does. KL is the mean divergence from the reference's predictions,
in nats per token, ± its standard error; change is that of the perplexity from the
reference's, ± the standard error over pairs of the same tokens. Errors are from the
means of chunks, since a chunk's tokens are not independent; 30 chunks are enough.

A setting whose effect depends on what is in memory is measured token by token,
with the memory that it is meant for, and with an exact run to compare with:
  --ram 2GiB --decode --run on-demand --run hobbit --run on-demand miss_bits=4 --store

With --tasks, a line of FILE.jsonl is {"prompt": TEXT, "answer": TEXT}, which is right
if greedy decoding would write that text, or {"prompt": TEXT, "choices": [TEXT, …],
"answer": N}, which is right if choice N (0 is the first) is the likeliest. "task"
is the name that a line is counted under. The reference is then BITS or FILE.moe.

--reference is one of
  BITS        a level of the same file (default: the highest)
  FILE.moe    another file, at its highest level
  SOURCE      the checkpoint that the file was converted from, a directory or a
              .gguf file, in float32; takes one pass over it in plain numpy
  FILE        log-probabilities that another program saved, with their tokens:
              llama-perplexity -m MODEL.gguf -f TEXT --kl-divergence-base FILE, or
              benchmarks/reference_logprobs.py CHECKPOINT TEXT FILE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    args = _parser().parse_args(argv)
    return run_command(_PROG, lambda: _run(args), verbose=args.verbose)


def _run(args: argparse.Namespace) -> int:
    from edgemoe.file.reader import open_moe
    from edgemoe.lab.quality.choice import reference_sum
    from edgemoe.lab.quality.quality import measure
    from edgemoe.lab.report.levels import bits_per_weight, levels
    from edgemoe.runtime.precisions import with_dense_bits

    if "help" in args.set:
        about = "\n\n".join(options_text(name) for name in args.scheduler or [EXACT])
        say(*about.split("\n"))
        return 0
    args.model = model_path(args.model)
    _check(args)  # before hours are spent
    for name in one_adapter(args):
        note(f"# adapter: {name}")
    moe = open_moe(args.model)
    sizes = levels(moe)
    trials = _trials(args, moe)
    if args.store and any(trial.dense_bits == "auto" for trial in trials):
        raise ValueError("--store: keeps no figures of --dense-bits auto")
    if args.tasks is not None:
        return run_tasks(args, moe, trials)
    rows: list[dict[str, Any]] = []
    code = 0
    with ExitStack() as stack:
        sample, about, log_probs, base, known = reference(args, moe, stack)
        report = {
            "model": args.model.name,
            "measured_on": about,
            "tokens": f"{zlib.crc32(sample.windows.tobytes()):08x}",
            "reference": None if known is None or base is None else [base.bits, base.dense_bits],
            "rows": rows,
        }
        report["reference_sections"] = reference_sum(moe, report["reference"])
        if args.adapter:
            report["adapter"] = args.adapter[0]
        if args.store:
            _warn_of_replaced(moe, report)
        say(*QUALITY_HEAD.split("\n"))
        for trial in trials:
            if known is not None and trial == base:
                quality = known
            else:
                try:
                    with Progress(f"{trial.bits} bits, {trial.scheduler}", unit="chunk") as bar:
                        quality = measure(
                            args.model, trial, sample, reference=log_probs, progress=bar
                        )
                except KeyboardInterrupt:
                    if not rows:
                        raise
                    note(f"{_PROG}: interrupted; the rows above are all")
                    code = 130
                    break
            average = _average_bits(moe, sizes, trial, quality)
            size = bits_per_weight(with_dense_bits(moe, trial), average, trial.dense_bits)
            rows.append(_row(trial, size, quality, moe))
            say(quality_line(rows[-1]))
    _note_sample(about, sample)
    if args.json is not None:
        text = json.dumps({"command": sys.argv, **report}, indent=1)
        write_whole(args.json, f"{text}\n".encode())
    if args.store:
        from edgemoe.file.append import add_sections
        from edgemoe.lab.quality.choice import merged, stored

        now = open_moe(args.model)
        whole = merged(now.sections.get("quality"), report)
        add_sections(args.model, {"quality": json.dumps(whole).encode()})
        beside = len(whole["rows"]) - len(rows)
        more = f", beside {beside} rows of before" if beside else ""
        if (old := stored(now)) and any(old[n] != report[n] for n in ("tokens", "reference")):
            more = f", in place of {len(old['rows'])} rows of other tokens or another reference"
        note(f"# stored in {args.model}{more}; edgemoe inspect shows it")
    if args.plot is not None:
        from edgemoe.lab.report.plot import plot_quality

        named = [{**row, "scheduler": run_name(row)} for row in rows]
        plot_quality(named, args.plot, title=f"{args.model.stem}; {about}")
    return code


def _warn_of_replaced(moe: MoeFile, report: Mapping[str, Any]) -> None:
    """Warns, while Ctrl-C can still save them, that --store will replace rows that are not comparable with these."""
    from edgemoe.lab.quality.choice import stored

    before = stored(moe)
    if before is None and "quality" in moe.sections:
        note("# --store will replace what cannot be compared with these: it is of another time")
    if before and any(before[name] != report[name] for name in ("tokens", "reference")):
        note(
            f"# --store will replace {len(before['rows'])} rows that cannot be compared with these: "
            f"{before['measured_on']}"
        )


def _note_sample(about: str, sample: Sample) -> None:
    note(f"# {about}; {sample.positions} positions")
    if (count := len(sample.windows)) < _FEW:
        chunks = "1 chunk is" if count == 1 else f"{count} chunks are"
        note(f"# {chunks} too few to trust the standard errors")


def _check(args: argparse.Namespace) -> None:
    from edgemoe.runtime.options import EngineOptions

    if one_adapter(args) and args.store:
        raise ValueError(
            "--store: keeps what was measured of the model alone; expected no --adapter"
        )
    EngineOptions(cache_type_k=args.cache_type_k, cache_type_v=args.cache_type_v)
    if args.tasks is not None:
        check_tasks(args)
    for path in (args.json, args.plot):
        check_output(path, args.model, args.text, args.reference and Path(args.reference))
    if args.store and args.model.exists() and not os.access(args.model, os.W_OK):
        raise PermissionError(f"--store: {args.model} cannot be written")
    if args.plot is not None:
        from edgemoe.lab.report.plot import check_plot

        check_plot(args.plot)


def _bits(args: argparse.Namespace, moe: MoeFile) -> list[int | Literal["auto"]]:
    """Returns the levels to measure, highest first, and the allocation last."""
    given = args.bits or [rung[0] for rung in moe.ladder]
    levels = {b for b in given if b != "auto"}
    for b in levels:
        moe.level(b)  # a ValueError names the levels there are
    return [*sorted(levels, reverse=True), *(["auto"] if "auto" in given else [])]


def _whole(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None


def _trials(args: argparse.Namespace, moe: MoeFile) -> list[Trial]:
    """Returns what to measure: each of --run, or --scheduler, at each of --bits."""
    shared = read_settings(args.set)
    trials = [
        _trial(args, moe, scheduler, bits, shared)
        for scheduler in args.scheduler or ([] if args.run else [EXACT])
        for bits in _bits(args, moe)
    ]
    for scheduler, *texts in args.run or []:
        own = read_settings(texts)
        wanted: list[int | Literal["auto"]]
        if "bits" in own:
            bits = own.pop("bits")
            wanted = ["auto" if bits == "auto" else _whole("bits", bits)]
        else:
            wanted = _bits(args, moe) if args.bits else [moe.ladder[-1][0]]
        trials += [_trial(args, moe, scheduler, bits, {**shared, **own}) for bits in wanted]
    return trials


def _trial(
    args: argparse.Namespace,
    moe: MoeFile,
    scheduler: str,
    bits: int | Literal["auto"],
    options: Mapping[str, Any],
) -> Trial:
    from edgemoe.lab.quality.quality import Trial
    from edgemoe.lab.report.levels import dense_bits_at
    from edgemoe.runtime.precisions import with_dense_bits
    from edgemoe.scheduler import SCHEDULERS, check_options

    if scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler}")
    options = dict(options)  # a copy, as several trials share the options of --set
    given = options.pop("dense_bits", args.dense_bits)
    check_options(scheduler, options)  # before other runs take hours
    differ = (moe.experts.rungs != len(moe.ladder)).any()
    if bits == "auto" and "allocation" not in moe.sections and not differ:
        raise ValueError(f"--bits auto: {moe.path} holds no allocation; edgemoe allocate makes one")
    dense: int | Literal["auto"] = dense_bits_at(moe, None if bits == "auto" else bits)
    if given == "auto":
        dense = "auto"
    elif given is not None:
        dense = _whole("dense_bits", given)
        moe.dense_level(dense)
    said = engine_flags(args, bits=bits, dense_bits=dense, scheduler=scheduler, options=options)
    trial = Trial(**said, decode=args.decode)
    with_dense_bits(moe, trial)  # an error says what is missing
    return trial


# ------------------------------------------------------------ results


def _average_bits(moe: MoeFile, sizes: list[Level], trial: Trial, quality: Quality) -> float:
    """Returns the mean bits of an expert: over all experts where all run as stored, else over those that ran."""
    plain = trial.scheduler == EXACT and not trial.options  # else some may run at fewer bits
    if plain and (trial.bits != "auto" or "allocation" not in moe.sections):
        return next(
            size.average_bits for size in reversed(sizes) if trial.bits in ("auto", size.bits)
        )
    return quality.average_bits


def _row(trial: Trial, size: float, quality: Quality, moe: MoeFile) -> dict[str, Any]:
    from edgemoe.lab.quality.choice import sections_sum

    options, caches = dict(trial.options), [trial.cache_type_k, trial.cache_type_v]
    chosen = {"bits": trial.bits, "dense_bits": trial.dense_bits}
    return {
        "scheduler": trial.scheduler,
        "options": options,
        "sections": sections_sum(
            moe, **chosen, scheduler=trial.scheduler, options=options, cache_types=caches
        ),
        **chosen,
        "cache_types": caches,
        "bits_per_weight": size,
        **dataclasses.asdict(quality),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Measure perplexity, and divergence from a reference, per level and scheduler.",
        epilog=_EPILOG,
    )
    add_model(parser)
    parser.add_argument("-f", "--text", type=Path, metavar="FILE",
                        help="text to predict (default: 66 KiB of Moby-Dick and speeches)")  # fmt: skip
    parser.add_argument("--reference", metavar="SOURCE", help="what to compare with; see below")
    parser.add_argument("--bits", type=bits_or_auto, nargs="+", metavar="N",
                        help="levels to measure, or auto, the file's allocation (default: all levels)")  # fmt: skip
    parser.add_argument("--dense-bits", type=bits_or_auto, metavar="N",
                        help="bits of all but the experts, or auto, as allocated (default: as --bits)")  # fmt: skip
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]FILE",
                        help=f"{ONE_ADAPTER_HELP}; a --reference FILE.moe is without it")  # fmt: skip
    parser.add_argument("--scheduler", action="append", metavar="NAME",
                        help="a scheduler to measure; may be repeated (default: on-demand)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    parser.add_argument("--run", action="append", nargs="+", metavar=("NAME", "KEY=VALUE"),
                        help="measure this scheduler with these options, bits and dense_bits among them "
                        "(default bits: those of --bits, else the highest); may be repeated")  # fmt: skip
    parser.add_argument("--decode", action="store_true",
                        help="run token by token, as replies are made: some schedulers act only then. Also "
                        "shows what was read, and so with --ram what a setting saves")  # fmt: skip
    for letter, what in (("k", "keys"), ("v", "values")):
        parser.add_argument(f"-ct{letter}", f"--cache-type-{letter}", default="f16", metavar="TYPE",
                            help=f"type of {what} in the KV cache: {CACHE_TYPES_TEXT} (default: f16)")  # fmt: skip
    parser.add_argument(
        "--chunk", type=int, metavar="N", help=f"tokens of each chunk (default: {CHUNK})"
    )
    parser.add_argument("--chunks", type=int, metavar="N", help="how many chunks (default: all)")
    add_flags(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="draw KL over bits per weight (needs the extra `lab`)")  # fmt: skip
    parser.add_argument("--store", action="store_true",
                        help="keep the figures in the .moe file, for `edgemoe inspect` and --max-quality-loss, "
                        "with earlier ones of the same tokens and reference")  # fmt: skip
    parser.add_argument(
        "-t", "--threads", type=int, metavar="N", help="threads (default: all cores)"
    )
    parser.add_argument("--ram", type=ram_size, metavar="SIZE", help="memory for the whole process")
    parser.add_argument("--no-verify", action="store_true", help="do not check weights' checksums")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
