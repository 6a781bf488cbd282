"""`edgemoe serve`: answers the requests of OpenAI's, Anthropic's and llama.cpp's clients."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.cli.console import error_line, note, run_command, say
from edgemoe.cli.engine import engine_flags, sampling_flags
from edgemoe.cli.measured import check, cost, pick
from edgemoe.cli.names import choose_model, fetched, model_path
from edgemoe.cli.options import serve_parser
from edgemoe.cli.run import set_up_logging
from edgemoe.cli.scheduling import options_text, read_settings
from edgemoe.errors import OutOfBudget, size_text

if TYPE_CHECKING:
    from argparse import Namespace

    from edgemoe.file.format import MoeFile
    from edgemoe.runtime.options import EngineOptions
    from edgemoe.serve.service import Service
    from edgemoe.serve.settings import Settings

__all__ = ["main"]

_NEEDED = ("starlette", "uvicorn", "sse_starlette", "msgspec", "llguidance")
_LARGEST_KEYS = 64 << 10  # bytes
_PER_SEQUENCE = 1 << 20  # bytes that a connection and its texts take, besides the engine
_SMALLEST_CONTEXT = 256
_SAVED_BYTES = 8 << 30  # the default of --slot-save-size


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 after SIGTERM or Ctrl-C; 1 for an error, or when the engine was lost.

    Raises:
        SystemExit: with code 2 at wrong usage.
    """
    parser = serve_parser()
    args = parser.parse_args(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        note('edgemoe serve: expected the extra: pip install "edgemoe[serve]"')
        return 1
    try:
        choose_model(parser, args)
        if "help" in args.set:
            say(*options_text(args.scheduler).split("\n"))
            return 0
        args.set = read_settings(args.set)
        if args.max_quality_loss is not None:
            check(args)
        if args.slot_save_path is not None and args.device != "cpu":
            raise ValueError("--slot-save-path: prefixes are not saved where a device holds them")
        if args.slot_save_path is None and args.slot_save_size is not None:
            raise ValueError("--slot-save-size: expected --slot-save-path DIR, which it bounds")
        if args.cache_ram and args.device != "cpu":
            raise ValueError("--cache-ram: prefixes are not kept where a device holds them")
        if args.no_grammar and args.reasoning_budget >= 0:
            raise ValueError(
                "--reasoning-budget: a grammar keeps it, and --no-grammar reserves no memory for any"
            )
        if args.warm and args.profile is None:
            raise ValueError("--warm: expected --profile FILE, which says what to load")
        settings = _settings(args)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        note(f"edgemoe serve: {error_line(error)}")
        return 1
    return run_command("edgemoe serve", lambda: _run(args, settings), verbose=args.verbose)


def _settings(args: Namespace) -> Settings:
    from edgemoe.arguments import number, whole
    from edgemoe.serve.settings import Settings, seconds

    try:
        keep_alive = seconds(args.keep_alive)
    except ValueError as error:
        raise ValueError(f"--keep-alive: {error}") from None
    keys = list(args.api_key)
    if args.api_key_file is not None:
        with open(args.api_key_file, encoding="utf-8") as file:
            keys += [line.strip() for line in file.read(_LARGEST_KEYS).splitlines() if line.strip()]
        if not keys:
            raise ValueError(f"--api-key-file: {args.api_key_file} has no key")
    if not all(keys) or not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError("--api-key: expected letters, digits and signs")
    return Settings(
        host=args.host, port=whole("--port", args.port, 0, 65535), keys=tuple(keys),
        no_auth=args.no_auth, aliases=tuple(args.alias), queue=whole("--queue", args.queue, 0, 100_000),
        timeout=number("--timeout", args.timeout, 1, 1e9), ping=number("--sse-ping", args.sse_ping, 0.1, 3600),
        origins=tuple(args.cors_origins), hosts=tuple(args.allowed_hosts),
        is_strict=args.strict, has_metrics=args.metrics, has_page=not args.no_page, has_grammar=not args.no_grammar,
        reasoning_budget=whole("--reasoning-budget", args.reasoning_budget, -1),
        prefixes=args.slot_save_path, prefix_bytes=args.slot_save_size or _SAVED_BYTES, pool_bytes=args.cache_ram,
        keep_alive=keep_alive,
    )  # fmt: skip


def _run(args: Namespace, settings: Settings) -> int:
    set_up_logging(verbose=args.verbose)
    from edgemoe.file.reader import open_moe
    from edgemoe.runtime.budget import default_ram
    from edgemoe.runtime.opening import open_model
    from edgemoe.serve.loading import Loading
    from edgemoe.serve.server import listen, serve
    from edgemoe.text.sampler import SamplingParams

    dataclasses.replace(SamplingParams(), **sampling_flags(args))  # before the model is loaded
    door = listen(settings)
    with door, Loading(door, settings) as loading:
        args.model = model_path(fetched(args), converts=True)
        if args.max_quality_loss is not None:
            note(f"# {pick(args, context=args.ctx_size or None)}")
        known = None if args.max_quality_loss is not None else cost(args)
        moe = open_moe(args.model)
        settings = dataclasses.replace(settings, reserved=_reserved(args, moe))
        try:
            loading.tell(0.0)
            options = _options(args, moe, settings.reserved)
            opened = open_model(args.model, options, told=loading.tell)
        except OutOfBudget as error:
            ram = default_ram() if args.ram is None else args.ram
            raise error.beside(settings.reserved, "the server itself", ram=ram) from None
        model = opened.model
        for line in (*model.notes, *opened.text.notes):
            note(f"# {line}")
        if model.notes and known:
            note(f"# {known}")
        if args.cache_ram > model.room.spare:
            left = size_text(max(model.room.spare, 0))
            note(
                f"# --cache-ram: {left} for certain, as one expert and full contexts may need the rest"
            )
        if args.warm:
            note(f"# warm: {model.warm() / 2**20:.0f} MiB of experts")
        sampling = dataclasses.replace(opened.text.sampling, **sampling_flags(args))

        def ready(service: Service, port: int, _: object) -> None:
            _welcome(args, settings, service, port)

        loading.close()
        return serve(
            opened, settings, door, name=Path(args.model).stem, sampling=sampling, ready=ready
        )


def _reserved(args: Namespace, moe: MoeFile) -> int:
    """Returns the bytes of the budget that the server itself takes."""
    from edgemoe.serve.desk import AT_HAND
    from edgemoe.serve.grammar import grammar_bytes

    masks = 0 if args.no_grammar else grammar_bytes(moe.config.vocab_size)
    parallel: int = args.parallel
    return _PER_SEQUENCE * parallel + masks + AT_HAND


def _options(args: Namespace, moe: MoeFile, reserved: int) -> EngineOptions:
    """Returns the engine's options; its budget leaves room for what the server itself takes."""
    from edgemoe.runtime.budget import default_ram
    from edgemoe.runtime.options import EngineOptions

    ram = default_ram() if args.ram is None else args.ram
    given: dict[str, Any] = {
        "sequences": args.parallel, "ram": max(ram - reserved, 1), "trace": args.trace, "profile": args.profile,
        "context": args.ctx_size or None,
    }  # fmt: skip
    options = EngineOptions(**engine_flags(args, **given))
    if args.ctx_size:
        return options
    return dataclasses.replace(options, context=_context(moe, options))


def _context(moe: MoeFile, options: EngineOptions) -> int | None:
    """Returns the longest context, in tokens, with which all sequences fit into a quarter of the room for experts.

    It is that long because agents begin with long prompts. None if not even the shortest context fits.
    """
    from edgemoe.errors import OutOfBudget
    from edgemoe.model import state_bytes
    from edgemoe.runtime.context import longest_context
    from edgemoe.runtime.opening import room_for_experts
    from edgemoe.runtime.precisions import with_kv_table

    options, most = with_kv_table(moe, options), moe.config.context_length
    least = min(_SMALLEST_CONTEXT, most)
    try:
        room = room_for_experts(moe, dataclasses.replace(options, context=least))
    except OutOfBudget:
        return None  # the engine says what is missing
    each = room // 4 // options.sequences
    return longest_context(
        least, most, each, lambda n: state_bytes(moe.config, n, options.kv_types)
    )


def _welcome(args: Namespace, settings: Settings, service: Service, port: int) -> None:
    budget, count = service.model.budget, service.model.options.sequences
    kind = "lossy" if service.model.notes else "exact"
    note(
        f"# {count} sequence{'' if count == 1 else 's'} of {budget.context} tokens (KV {budget.kv / 2**20:.0f} MiB), "
        f"{budget.slots / 2**20:.0f} of {budget.experts / 2**20:.0f} MiB of experts, {kind}; "
        f"agents need about 24000 tokens; calls of tools: {service.tool_words()}"
    )
    if settings.no_auth and not settings.keys:
        note("# anyone who reaches this machine may ask: --no-auth")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    note(f"# {service.names[0]} at http://{host}:{port}/v1; Ctrl-C ends")


if __name__ == "__main__":
    raise SystemExit(main())
