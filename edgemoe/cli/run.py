"""`edgemoe-run`: chats with a model, or answers one prompt."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.cli.console import (
    argument_text,
    drop_stdout,
    error_line,
    is_terminal,
    note,
    replace_unwritable,
    say,
    traceback_lines,
    write_reply,
)
from edgemoe.cli.engine import engine_flags, sampling_flags
from edgemoe.cli.foreign import without_foreign
from edgemoe.cli.form import keep_to, opened_beside, schema_of
from edgemoe.cli.measured import check, cost, pick
from edgemoe.cli.names import choose_model, demo_model, fetched, model_path
from edgemoe.cli.options import run_parser, unknown_variables
from edgemoe.cli.prompt import read_text
from edgemoe.cli.reasoning import apart, set_reasoning
from edgemoe.cli.scheduling import options_text, read_settings
from edgemoe.errors import OutOfBudget, size_text

if TYPE_CHECKING:
    from argparse import Namespace

    from edgemoe.runtime.chat import Chat
    from edgemoe.runtime.engine import Engine
    from edgemoe.text.sampler import SamplingParams

__all__ = ["main", "set_up_logging"]

# Bytes that are read at any budget: where they are too many, the model's own error says more.
_SMALL_PROMPT = 4 << 20


def main(argv: Sequence[str] | None = None, *, prog: str = "edgemoe-run") -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.
        prog: what the program was called.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    replace_unwritable()
    args = None
    try:
        parser = run_parser(prog)
        try:
            argv, notes = without_foreign(sys.argv[1:] if argv is None else argv)
        except ValueError as error:
            parser.error(str(error))
        args = parser.parse_args(argv)
        for line in (*notes, *unknown_variables()):
            note(f"# {line}")
        try:
            choose_model(parser, args)
            from edgemoe.text.sampler import SamplingParams

            _sampling(args, SamplingParams())  # before the model is loaded
            if "help" in args.set:
                say(*options_text(args.scheduler).split("\n"))
                return 0
            args.set = read_settings(args.set)
            if args.max_quality_loss is not None:
                check(args)
            if args.warm and args.profile is None:
                raise ValueError("--warm: expected --profile FILE, which says what to load")
            schema = None if args.json_schema is None else schema_of(args.json_schema)
        except ValueError as error:
            parser.error(str(error))
        code = _run(args, schema)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone: nothing to say
        return 1
    except Exception as error:
        is_verbose = args is not None and args.verbose
        note(*(traceback_lines(error) if is_verbose else [f"{prog}: {error_line(error)}"]))
        return 1
    finally:
        drop_stdout()


def _run(args: Namespace, schema: object) -> int:
    if sys.stdout is None:
        raise ValueError("stdout is closed; expected somewhere to write the reply")
    set_up_logging(verbose=args.verbose)
    prompt = _texts(args)
    session = None
    held: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if args.session is not None:
        from edgemoe.cli.sessions import hold, session_path

        session = session_path(args.session)
        held = hold(session)
    if args.verbose:
        _describe_machine()
    if args.max_quality_loss is not None:
        note(f"# {pick(args, context=args.ctx_size or None)}")
    known = None if args.max_quality_loss is not None else cost(args)
    from edgemoe.runtime.engine import Engine
    from edgemoe.runtime.options import EngineOptions

    given = {"context": args.ctx_size or None, "trace": args.trace, "profile": args.profile}
    flags = engine_flags(args, **given)
    with (
        held,
        (
            Engine(args.model, EngineOptions(**flags))
            if schema is None
            else opened_beside(flags, args.model, schema)
        ) as engine,
    ):
        _note_engine(engine, args, known)
        return _talk(engine, args, prompt, schema, session)


def _texts(args: Namespace) -> str | None:
    """Reads the given texts and finds the model before it is loaded, so that a mistake costs no time.

    Returns:
        The one prompt to answer, None for an interactive chat.
    """
    args.prompt, args.system_prompt = (
        text and argument_text(text, name)
        for text, name in ((args.prompt, "-p"), (args.system_prompt, "-sys"))
    )
    args.stop = [argument_text(text, "-r") for text in args.stop]
    args.model = fetched(args)
    if args.model is not None:  # before the prompt is read, which someone may be typing
        args.model = model_path(args.model, converts=True)
    prompt = _prompt(args)
    if args.model is None:
        args.model = demo_model()
    return prompt


def _note_engine(engine: Engine, args: Namespace, known: str | None) -> None:
    """Tells which settings change answers or speed; with --warm, loads the experts that were used most.

    Args:
        known: a line about the measured cost in quality, if there is one.
    """
    _note_threads(args.threads)
    for line in engine.notes:
        note(f"# {line}")
    bits = engine.expert_bits
    if (
        not any(line.startswith("lossy: experts") for line in engine.notes)
        and bits.min() < bits.max()
    ):
        note(
            f"# the file's experts: {bits.mean():.2f} bits on average, {bits.min()} to {bits.max()}"
        )
    if engine.notes and known:
        note(f"# {known}")
    if engine.adapter:
        note(f"# adapter: {engine.adapter}")
    if args.warm:
        _warm(engine, args.profile)
    for line in engine.sampling_notes:
        note(f"# {line}")


def _talk(
    engine: Engine, args: Namespace, prompt: str | None, schema: object, session: Path | None
) -> int:
    """Answers the prompt, or chats where there is none; keeps the session."""
    from edgemoe.runtime.chat import Chat

    params = _sampling(args, engine.sampling)
    chat = Chat(engine, system=args.system_prompt, params=params, raw=args.raw)
    if chat.note:
        note(f"# {chat.note}")
    if schema is not None:
        keep_to(engine, chat, schema)
    if chat.is_raw and not args.raw:
        note("# the model has no chat template: it continues your text instead of answering it")
    if session is not None:
        from edgemoe.cli.sessions import keep, resume

        note(f"# {resume(chat, session)}")
        if args.system_prompt:
            chat.instruct(args.system_prompt)
    set_reasoning(chat, args.reasoning)
    if prompt is None:
        from edgemoe.cli.repl import interact

        return interact(
            engine, chat, name=Path(args.model).stem, stats=args.stats, reasoning=args.reasoning,
            keep=None if session is None else lambda: keep(chat, session),
            keeps_history=not args.no_history,
        )  # fmt: skip
    code = _answer(engine, chat, prompt, stats=args.stats, reasoning=args.reasoning)
    if session is not None:
        keep(chat, session)
    return code


def _warm(engine: Engine, profile: str) -> None:
    import time

    start = time.perf_counter()
    size = engine.warm()
    if size:
        note(f"# warm: {size / 2**20:.0f} MiB of experts in {time.perf_counter() - start:.2f} s")
    else:
        note(f"# nothing to warm from yet: {profile} is written at the end")


def _answer(engine: Engine, chat: Chat, prompt: str, *, stats: str, reasoning: str) -> int:
    from edgemoe.cli.stats import say_stats, too_long
    from edgemoe.cli.waiting import watched
    from edgemoe.runtime.chat import TooLong

    try:
        write_reply(apart(watched(engine, chat.pieces(prompt)), reasoning))
    except TooLong as error:
        raise too_long(engine, error) from None
    say_stats(engine, stats)
    if chat.finish == "context":
        note("# the context is full: -c makes it larger")
    if chat.finish == "length" and chat.params.max_tokens == engine.sampling.max_tokens:
        note(
            f"# the model's settings end replies after {chat.params.max_tokens} tokens: -n changes it"
        )
    return 0


def _note_threads(threads: int | None) -> None:
    from edgemoe import hardware

    cores = hardware.num_threads()
    if threads is not None and threads > cores:
        note(f"# {threads} threads on {cores} cores: most likely slower than -t {cores}")


def _describe_machine() -> None:
    from edgemoe import devices, hardware

    note(
        f"# machine: {hardware.num_threads()} cores, {hardware.available_bytes() / 2**30:.1f} GiB of memory free"
    )
    for line in devices.found():
        note(f"# {line}")


def _sampling(args: Namespace, base: SamplingParams) -> SamplingParams:
    """Returns `base` with the values of the flags."""
    import dataclasses

    return dataclasses.replace(
        base,
        **sampling_flags(args),
        seed=args.seed,
        stop=(*base.stop, *args.stop),
        ignore_eos=args.ignore_eos,
    )


def _prompt(args: Namespace) -> str | None:
    """Returns the one prompt to answer, None for an interactive chat.

    Standard input is read only where no flag gives a prompt: it may be that of a shell's loop, or a pipe that nobody
    closes.
    """
    from edgemoe import hardware

    def lend(size: int) -> None:
        left = sys.maxsize if args.ram is None else args.ram - hardware.process_bytes()
        if size > max(left, _SMALL_PROMPT):
            raise OutOfBudget(f"reading the prompt takes {size_text(size)}, more than --ram leaves")

    if args.prompt is None and args.file is None:
        return None if is_terminal(sys.stdin) else _piped(lend)
    parts = []
    if args.prompt is not None:
        parts.append(_not_empty(args.prompt, "-p"))
    if args.file == "-":
        parts.append(_piped(lend))
    elif args.file is not None:
        with open(args.file, "rb") as file:
            parts.append(_not_empty(read_text(file, args.file, lend=lend), args.file))
    return "\n".join(parts)


def _piped(lend: Callable[[int], None]) -> str:
    text = "" if sys.stdin is None else read_text(sys.stdin.buffer, "stdin", lend=lend)
    return _not_empty(text, "stdin")


def _not_empty(text: str, where: str) -> str:
    if not text.strip():
        raise ValueError(f"{where}: expected a prompt, got nothing")
    return text


def set_up_logging(*, verbose: bool) -> None:
    """Writes what the package logs to stderr, as notes."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"# {record.getMessage()}")

    logging.basicConfig(handlers=[Notes()])
    if verbose:
        logging.getLogger("edgemoe").setLevel(logging.DEBUG)


if __name__ == "__main__":
    sys.exit(main())
