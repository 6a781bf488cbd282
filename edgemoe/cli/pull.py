"""`edgemoe pull`: fetches a model from the Hugging Face hub, converting it as it arrives."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from edgemoe.cli.console import note, run_command
from edgemoe.cli.parser import Parser
from edgemoe.cli.progress import Progress
from edgemoe.cli.values import whole
from edgemoe.errors import size_text

__all__ = ["main"]

_PROG = "edgemoe pull"

_EPILOG = """\
    %(prog)s Qwen/Qwen3-30B-A3B              all levels, of 8 bits at most
    %(prog)s Qwen/Qwen3-30B-A3B:4            a smaller file, of 4 bits at most
    %(prog)s unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M   made of GGUF files
    edgemoe plan Qwen/Qwen3-30B-A3B          first see how it would fit

The weights come one file at a time, and each is converted and removed before the
next: the disk needs room for the model and one file of its source. After any
interruption, the same command continues. Every file's checksum is checked. Files
in Hugging Face's cache are used, and left there.

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE have their usual meanings.
EDGEMOE_MODELS says where models are kept.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0; 1 for an error, which is one line on stderr; 2 for wrong usage; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    return run_command(
        _PROG,
        lambda: _run(args),
        verbose=args.verbose,
        blames_arguments=True,
        interrupted=lambda: "interrupted; the same command goes on where it stopped",
    )


def _run(args: argparse.Namespace) -> None:
    from edgemoe.hub.name import HubName

    name = HubName.parse(args.name)
    if args.bits is not None and name.bits is not None:
        raise ValueError(f"--bits: {args.name} says {name.bits} already")
    name = name.with_bits(args.bits)
    if name.bits is not None:
        from edgemoe.quant import SCHEMES

        SCHEMES["nested"].ladder(name.bits, "bits")  # before anything is asked of a hub
    from edgemoe.hub.pull import pull

    with Progress(f"pulling {name}", unit="B") as progress:
        path = pull(name, say=lambda line: note(f"# {line}"), progress=progress)
    note(f"# {name.kept}: {size_text(path.stat().st_size)} in {path}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_PROG,
        description="Fetch a model from the Hugging Face hub and convert it as it arrives.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "name", metavar="USER/REPO[@REVISION][:BITS|:QUANT]", help="the model's name on the hub"
    )
    parser.add_argument(
        "--bits",
        type=whole(1),
        metavar="N",
        help="the most bits that the file can be run at; fewer make a smaller file (default: 8)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
