"""The flags of `edgemoe-run` and `edgemoe serve`, their defaults and their environment variables."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
from collections.abc import Callable
from typing import Any, NoReturn

import edgemoe
from edgemoe.cli.console import say
from edgemoe.cli.measured import MAX_LOSS_HELP
from edgemoe.cli.parser import NUMBERS, Parser
from edgemoe.cli.scheduling import SET_HELP
from edgemoe.cli.values import bits_or_auto, ram_size, reasoning_kind, stats_kind

__all__ = ["run_parser", "serve_parser", "unknown_variables", "version_line"]

_DAILY, _DOOR = "every day", "who may ask"  # groups that --help shows
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

_EPILOG = """\
With no MODEL, a small demo model is built once and kept in the cache folder.

Replies go to stdout, everything else to stderr. Without -p and -f, the prompt
is read from standard input if that is no terminal. With -p or -f it is not
read, except by -f -, which appends it to the text of -p:

    echo "What is the capital of France?" | %(prog)s model.moe
    git diff | %(prog)s model.moe -p "Sum this up:" -f -

Every flag takes its default from the environment: EDGEMOE_ and its long name,
such as EDGEMOE_RAM=4GiB or EDGEMOE_CTX_SIZE=4096; 1 or 0 if it has no value.
"""


_SERVE_EPILOG = """\
With no MODEL, a small demo model is built once and kept in the cache folder.

A reply is the same, bit for bit, alone or among others, at any budget. Try:

    %(prog)s model.moe --ram 8GiB
    curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages":
        [{"role": "user", "content": "Hello"}]}'

Only this machine may connect, unless --host says otherwise; then clients need a
key. Every flag takes its default from the environment, such as EDGEMOE_PORT=8081.
"""


_EXAMPLES = """\
Chat with a Mixture-of-Experts model, inside a memory budget.

    %(prog)s model.moe                            chat
    %(prog)s model.moe --ram 8GiB --bits 4        inside 8 GiB, experts of 4 bits
    %(prog)s model.moe -p "Why is the sky blue?"  answer and exit
"""


def run_parser(prog: str = "edgemoe-run") -> argparse.ArgumentParser:
    """Returns the parser of `edgemoe-run`. On wrong usage it ends the program with one line and exit code 2."""
    parser = Parser(
        prog=prog, usage="%(prog)s [MODEL] [flags]", description=_EXAMPLES, epilog=_EPILOG,
        first=[_DAILY],
    )  # fmt: skip
    return _filled(parser, _add_flags)


def serve_parser() -> argparse.ArgumentParser:
    """Returns the parser of `edgemoe serve`. It ends the program as that of `run_parser` does."""
    parser = Parser(
        prog="edgemoe serve",
        usage="%(prog)s [MODEL] [flags]",
        description="Serve a model over the APIs of OpenAI, Anthropic and llama.cpp, inside a memory budget.",
        epilog=_SERVE_EPILOG,
        first=[_DAILY, _DOOR],
    )
    return _filled(parser, _add_serve_flags)


def version_line(prog: str) -> str:
    """Returns a program's version and what it runs on, for bug reports."""
    import platform

    from edgemoe import hardware

    return (
        f"{prog} {edgemoe.__version__} ({hardware.core()}; Python {platform.python_version()}; "
        f"{platform.system()} {platform.release()} {platform.machine()})"
    )


def _filled(
    parser: argparse.ArgumentParser, add: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    try:
        add(parser)
    except ValueError as error:  # the value of an environment variable
        parser.error(str(error))
    return parser


# fmt: off
def _add_temp(group: argparse._ActionsContainer) -> None:
    """Adds the one sampling flag that is used every day."""
    _add(group, "--temp", type=float, metavar="N",
         help="temperature: 0 always takes the likeliest token, 1 follows the model (default: the model's, else 0.8)")


def _add_sampling_flags(sampling: argparse._ActionsContainer) -> None:
    """Adds the other sampling flags."""
    _add(sampling, "--top-k", type=int, metavar="N",
         help="keep the N likeliest tokens, 0 for all (default: the model's, else 40)")
    _add(sampling, "--top-p", type=float, metavar="N",
         help="keep the likeliest tokens that together have this probability (default: the model's, else 0.95)")
    _add(sampling, "--min-p", type=float, metavar="N",
         help="keep tokens at least this likely, relative to the likeliest (default: the model's, else 0.05)")
    _add(sampling, "--typical", type=float, metavar="N",
         help="keep the most typical tokens that together have this probability (default: the model's, else 1)")
    _add(sampling, "--repeat-penalty", type=float, metavar="N",
         help="what the logits of recent tokens are divided by (default: the model's, else 1: no penalty)")
    _add(sampling, "--repeat-last-n", type=int, metavar="N",
         help="how many tokens count as recent, -1 for all (default: all for the model's own penalty, else 64)")
    _add(sampling, "--presence-penalty", type=float, metavar="N",
         help="what is subtracted from the logits of recent tokens (default: the model's, else 0)")
    _add(sampling, "--frequency-penalty", type=float, metavar="N",
         help="the same, but subtracted for each time that a token occurred (default: the model's, else 0)")


def _add_path(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument that names the model."""
    parser.add_argument("path", nargs="?", metavar="MODEL",
                        help="a .moe file, a name of edgemoe list, or a folder or .gguf file to convert")


def _add_daily_flags(daily: argparse._ActionsContainer) -> None:
    """Adds the flags that matter most for memory and speed, to either program."""
    _add(daily, "--ram", type=ram_size, metavar="SIZE",
         help="memory for the whole process: 4GiB, 512MB, 50%% of what is free "
         "(default: what is free, less a margin)")
    _add(daily, "--bits", type=bits_or_auto, metavar="N",
         help="bits of the experts' weights: fewer are faster and worse, and more experts fit; `edgemoe inspect` lists "
         "them; auto: as allocated to each expert (default: all that the file has)")
    _add(daily, "-c", "--ctx-size", type=int, default=0, metavar="N",
         help="most tokens of prompt and reply (default: 0, what fits)")
    _add(daily, "-hf", "-hfr", "--hf-repo", metavar="REPO",
         help="a model on the Hugging Face hub, user/repo[:BITS|:QUANT]: fetched once, as by edgemoe pull")


def _add_model_flags(model: argparse._ActionsContainer) -> None:
    """Adds the other flags about the model, to either program."""
    _add(model, "--allocation", metavar="FILE",
         help="for --bits or --dense-bits auto: a file of edgemoe allocate (default: the model file's own)")
    _add(model, "--adapter", action=_Collect, default=[], metavar="[NAME=]FILE",
         help="a fine-tune of the model, made by edgemoe convert --base; may be repeated")
    _add(model, "--dense-bits", type=bits_or_auto, metavar="N",
         help="bits of all but the experts; auto: as allocated to each matrix (default: all that the file has)")
    _add(model, "--max-quality-loss", metavar="X", help=MAX_LOSS_HELP)
    _add(model, "--experts", type=int, metavar="K",
         help="experts per token (default: the model's); fewer are faster and worse")
    _add(model, "-ctk", "--cache-type-k", default="f16", metavar="TYPE",
         help="type of keys in the KV cache: f16; f32, of twice the size; or, not exact, q8_0, of half the size, q4_0, "
         "of less than a third, q3_0, q2_0; auto: each layer's own (default: %(default)s)")
    _add(model, "-ctv", "--cache-type-v", default="f16", metavar="TYPE",
         help="the same for values (default: %(default)s)")
    _add(model, "--kv-table", metavar="FILE",
         help="for -ctk and -ctv auto: a file of edgemoe allocate --kv (default: the model file's own)")
    _add(model, "-t", "--threads", type=int, metavar="N", help="threads (default: all cores)")
    _add(model, "--device", default="cpu", metavar="NAME",
         help="cpu, or cuda:0 for the first NVIDIA device; the answer is the same (default: %(default)s)")
    _add(model, "--vram", type=ram_size, metavar="SIZE",
         help="the most device memory to use (default: what is free, less a margin)")
    model.add_argument("--list-devices", action=_Devices, help="list the devices, or say why there are none, and exit")
    _add(model, "--scheduler", default="on-demand", metavar="NAME",
         help="what decides which experts are loaded when (default: %(default)s); `edgemoe schedulers` lists them")
    _add(model, "--set", action=_Collect, default=[], metavar="KEY=VALUE", help=SET_HELP)
    _add_switch(model, "--no-verify", help="do not check the checksums of weights as they are read")
    _add(model, "--trace", metavar="FILE", help="record which experts the router chose")
    _add(model, "--profile", metavar="FILE",
         help="learn from run to run: loaded if it exists, saved at the end")
    _add_switch(model, "--warm", help="first load the experts that the profile says are used most")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    daily = parser.add_argument_group(_DAILY)
    _add(daily, "-p", "--prompt", metavar="TEXT", help="answer this and exit")
    _add(daily, "-f", "--file", metavar="FILE", help="answer this file's text and exit; - for standard input")
    _add(daily, "-sys", "--system-prompt", metavar="TEXT", help="what the model is told first")
    _add(daily, "-n", "--predict", type=int, metavar="N",
         help="most tokens of a reply, -1 until it ends (default: the model's, else -1)")
    _add_temp(daily)
    _add_daily_flags(daily)
    _add(daily, "--stats", type=stats_kind, default="short", metavar="KIND",
         help="the line after a reply: short, full or off (default: %(default)s)")
    _add(daily, "--session", metavar="NAME", help="continue the conversation of that name, and keep it")
    _add_version(daily)

    model = parser.add_argument_group("experts and memory")
    _add(model, "-m", "--model", metavar="FILE", help="the same as MODEL")
    _add_model_flags(model)

    text = parser.add_argument_group("text")
    _add_switch(text, "--no-history", help="do not keep what is typed in a chat for the next one")
    _add(text, "--json-schema", metavar="FILE|TEXT", help="replies are JSON that follows this schema, with any model")
    _add(text, "--reasoning", type=reasoning_kind, default="dim", metavar="KIND",
         help="reasoning before an answer: dim, fold: one line in its place, or off: none (default: %(default)s)")
    _add_switch(text, "--raw", help="no chat template: the model continues the text")
    _add_switch(text, "--ignore-eos", help="continue where the model would end its reply")
    _add(text, "-r", "--stop", "--reverse-prompt", action=_Collect, default=[], metavar="TEXT",
         help="a text that ends the reply; may be repeated")

    sampling = parser.add_argument_group("sampling")
    _add_sampling_flags(sampling)
    _add(sampling, "-s", "--seed", type=int, default=-1, metavar="N",
         help="the same seed gives the same reply (default: -1, random)")


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    daily = parser.add_argument_group(_DAILY)
    _add_daily_flags(daily)
    _add(daily, "-np", "--parallel", type=int, default=4, metavar="N",
         help="conversations that are kept and run at once, each with its own context (default: %(default)s)")
    _add_version(daily)

    model = parser.add_argument_group("experts and memory")
    _add(model, "-m", "--model", metavar="FILE", help="the same as MODEL")
    _add(model, "--slot-save-path", metavar="DIR",
         help="save the state of conversations there, and restore it when their prompts come back")
    _add(model, "--slot-save-size", type=ram_size, metavar="SIZE",
         help="the most that is kept there (default: 8GiB)")
    _add(model, "--cache-ram", type=ram_size, default=0, metavar="SIZE",
         help="the most of --ram for state that conversations lose, before it goes to disk or is forgotten "
         "(default: 0, as experts are worth more)")
    _add_model_flags(model)
    _add_switch(model, "--no-grammar", help="reserve no memory for JSON schemas and grammars, and refuse them")

    door = parser.add_argument_group(_DOOR)
    _add(door, "--host", default="127.0.0.1", metavar="ADDRESS",
         help="where to listen (default: %(default)s, this machine alone)")
    _add(door, "--port", type=int, default=8080, metavar="N", help="the port, 0 for a free one (default: %(default)s)")
    _add(door, "--api-key", action=_Collect, default=[], metavar="KEY",
         help="a key that clients must send; may be repeated. EDGEMOE_API_KEY does not show in the list of processes")
    _add(door, "--api-key-file", metavar="FILE", help="a file of keys, one per line")
    _add_switch(door, "--no-auth", help="let other machines connect without a key")
    _add(door, "--allowed-hosts", action=_Collect, default=[], metavar="NAME",
         help="a further name under which clients reach the server; may be repeated")
    _add(door, "--cors-origins", action=_Collect, default=[], metavar="ORIGIN",
         help="an origin of web pages whose scripts may ask, * for all; may be repeated (default: none)")

    requests = parser.add_argument_group("requests")
    _add(requests, "--alias", action=_Collect, default=[], metavar="NAME",
         help="a name of the model for clients; may be repeated (default: the file's name)")
    _add(requests, "--queue", type=int, default=64, metavar="N",
         help="requests that may wait; more are refused (default: %(default)s)")
    _add(requests, "--timeout", type=float, default=3600.0, metavar="SECONDS",
         help="give up a request after this time (default: %(default)g)")
    _add(requests, "--keep-alive", default="-1", metavar="TIME",
         help="after this time without a request (5m, 30s) experts leave memory; the state of conversations stays "
         "(default: -1, never)")
    _add(requests, "--sse-ping", type=float, default=5.0, metavar="SECONDS",
         help="time between pings in a stream (default: %(default)g)")
    _add(requests, "--reasoning-budget", type=int, default=-1, metavar="N",
         help="most tokens of reasoning, where the model marks its end with one token (default: -1, no limit)")
    _add_switch(requests, "--strict", help="refuse fields that have no effect, instead of reporting them")
    _add_switch(requests, "--metrics", help="serve figures for Prometheus at /metrics")
    _add_switch(requests, "--no-page", help="serve no page at /, and take no POST /settings")

    sampling = parser.add_argument_group("sampling, where a request says nothing")
    _add_temp(sampling)
    _add_sampling_flags(sampling)
    _add(sampling, "-n", "--predict", type=int, metavar="N",
         help="most tokens of a reply, -1 until it ends (default: the model's, else -1)")
# fmt: on


def _add_version(parser: argparse._ActionsContainer) -> None:
    """Adds --verbose and --version."""
    _add_switch(parser, "-v", "--verbose", help="more messages, and tracebacks of errors")
    parser.add_argument("--version", action=_Version, help="print the version and exit")


class _Version(argparse.Action):
    """The action of --version, which looks the version up only when asked, since that takes a while."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        say(version_line(parser.prog))
        parser.exit()


class _Devices(argparse.Action):
    """The action of --list-devices."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        from edgemoe.devices import found

        say(*found())
        parser.exit()


class _Collect(argparse.Action):
    """An action that collects the values of a repeated flag; the first one replaces the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: object
    ) -> None:
        values = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if values is self.default else values), value])


def _add(
    group: argparse._ActionsContainer,
    *names: str,
    type: Callable[[str], Any] = str,
    default: Any = None,
    **rest: Any,
) -> None:
    """Adds a flag with a value; its default is the value of its environment variable, else `default`."""
    variable = _variable(names)
    if text := os.environ.get(variable):
        try:
            value = type(text)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{variable}: {error}") from None
        except ValueError:
            expected = NUMBERS.get(type, "another value")
            raise ValueError(f"{variable}: expected {expected}, got {text!r}") from None
        default = [value] if isinstance(default, list) else value
    group.add_argument(*names, type=type, default=default, **rest)


def _add_switch(group: argparse._ActionsContainer, *names: str, **rest: Any) -> None:
    """Adds a flag without a value, which its environment variable may switch on."""
    variable = _variable(names)
    text = os.environ.get(variable, "").lower()
    if text not in (*_NO, *_YES):
        raise ValueError(f"{variable}: expected 1 or 0, got {text!r}")
    group.add_argument(*names, action="store_true", default=text in _YES, **rest)


def unknown_variables() -> list[str]:
    """Returns a line for every environment variable EDGEMOE_... that no program reads."""
    names = [name for name in sorted(os.environ) if name.startswith(_PREFIX)]
    if all(name in _known for name in names):
        return []
    for add in (_add_flags, _add_serve_flags):  # another program may read it
        with contextlib.suppress(ValueError):
            add(argparse.ArgumentParser())
    lines = []
    for name in names:
        if name not in _known:
            near = difflib.get_close_matches(name, _known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            lines.append(f"{name} in the environment means nothing{meant}")
    return lines


_PREFIX = "EDGEMOE_"
_known: set[str] = {"EDGEMOE_MODELS"}
"""The variables of the flags added so far, and those that are read elsewhere."""


def _variable(names: tuple[str, ...]) -> str:
    name = _PREFIX + next(n for n in names if n.startswith("--"))[2:].upper().replace("-", "_")
    _known.add(name)
    return name
