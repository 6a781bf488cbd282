"""Writes replies and results to stdout and everything else to stderr, plainly where they are no terminals.

The one place that writes to them: whatever a model file, a trace or a checkpoint brings into a line passes `shown`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from edgemoe.errors import EdgemoeError, shortened

__all__ = [
    "argument_text",
    "ask",
    "check_output",
    "dim",
    "drop_stdout",
    "error_line",
    "is_terminal",
    "note",
    "passing",
    "replace_unwritable",
    "run_command",
    "say",
    "say_json",
    "shown",
    "traceback_lines",
    "write_aside",
    "write_reply",
]

_ERROR, _USAGE_ERROR, _INTERRUPTED = 1, 2, 130

_LONGEST_NOTE = 4000  # characters of a line on stderr

_CONTROLS = [*range(32), *range(127, 160), 0x2028, 0x2029]
_TURNS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Characters that change the direction of what is around them, so that a line reads as another."""

# A reply may have lines, tabs, and the marks of scripts that run from right to left, but turn nothing around.
_NOT_IN_REPLIES = dict.fromkeys(i for i in [*_CONTROLS, *_TURNS[3:]] if chr(i) not in "\n\t")


def _escape(char: int) -> str:
    if 0xDC80 <= char <= 0xDCFF:  # a byte of a name that is no UTF-8
        return f"\\x{char - 0xDC00:02x}"
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(
        char, f"\\x{char:02x}" if char < 256 else f"\\u{char:04x}"
    )


_ESCAPES = {char: _escape(char) for char in [*_CONTROLS, *_TURNS, *range(0xD800, 0xE000)]}


def shown(text: str) -> str:
    """Returns a text as one line that a terminal takes for nothing else: controls as Python writes them."""
    return text.translate(_ESCAPES)


def is_terminal(stream: object) -> bool:
    """Returns whether a standard stream is open and a terminal."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):  # None, or closed
        return False


def note(*lines: str) -> None:
    """Writes lines to stderr, dim on a terminal; a closed stderr swallows them."""
    if sys.stderr is None:  # print would take stdout instead
        return
    text = "\n".join(shown(shortened(line, _LONGEST_NOTE)) for line in lines)
    with contextlib.suppress(OSError):
        print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def dim(text: str, stream: object) -> str:
    """Returns a text that a terminal shows dimmed; as it is for anything else, and for who wants no colours."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb")
    return text if is_plain or not text or not is_terminal(stream) else f"\x1b[2m{text}\x1b[0m"


def passing(line: str) -> None:
    """Writes a line to a terminal's stderr in place of the one before, without an end; an empty one clears it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"\r\x1b[K{shown(line)}", end="", file=sys.stderr, flush=True)


def ask(prompt: str) -> None:
    """Writes what stands before the user's line to stderr."""
    if sys.stderr is not None:
        print(prompt, end="", file=sys.stderr, flush=True)


def say(*lines: str) -> None:
    """Writes lines of a result to stdout, at once.

    Raises:
        BrokenPipeError: nobody reads stdout any more.
        OSError: stdout cannot be written; its name is in the error.
    """
    if sys.stdout is None:
        raise OSError("stdout is closed; expected somewhere to write the result")
    _put("".join(f"{shown(line)}\n" for line in lines))


def say_json(value: object) -> None:
    """Writes a result to stdout as JSON, in ASCII."""
    say(*json.dumps(value, indent=1).split("\n"))


def check_output(path: Path | None, *inputs: Path | None) -> None:
    """Refuses to write a result over a model, or over what the command reads: a slip of the hand may cost hours.

    Raises:
        FileNotFoundError: there is no such directory.
        PermissionError: it cannot be written.
        FileExistsError: `path` is a `.moe` file, or one of `inputs`.
        OSError: it cannot be looked into.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory")
    is_plain = not path.is_symlink() and (path.is_file() or not path.exists())
    target = path.absolute().parent if is_plain else path
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{path}: cannot be written")
    if not path.is_file():
        return
    if any(given.exists() and path.samefile(given) for given in inputs if given is not None):
        raise FileExistsError(f"{path}: is read by this command; expected another file to write")
    from edgemoe.file.format import MAGIC

    with open(path, "rb") as old:
        if old.read(len(MAGIC)) == MAGIC:
            raise FileExistsError(f"{path}: is a .moe file; expected another file to write")


def write_reply(pieces: Iterable[str]) -> None:
    """Writes a reply to stdout as it comes, and ends its line however it ends.

    Raises:
        BrokenPipeError: nobody reads stdout any more.
        OSError: stdout cannot be written; its name is in the error.
    """
    is_tty = is_terminal(sys.stdout)
    last = ""
    try:
        for piece in pieces:
            text = piece.translate(_NOT_IN_REPLIES) if is_tty else piece
            last = text or last  # first, as Ctrl-C may come while it is written
            _put(text)
    finally:
        if last and not last.endswith("\n"):
            _put("\n")


def write_aside(text: str) -> None:
    """Writes what is beside a reply, such as its reasoning, dimmed, to a stdout that is a terminal."""
    _put(dim(text.translate(_NOT_IN_REPLIES), sys.stdout))


def _put(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from None


def error_line(error: BaseException) -> str:
    """Returns an error in one line, without the program's name."""
    if isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return name + error.strerror
    text = " ".join(str(error).split())
    if (
        isinstance(error, MemoryError)
        and not isinstance(error, EdgemoeError)
        and "ulimit" not in text
    ):
        return "out of memory; is `ulimit -v` too small?"
    if isinstance(error, (EdgemoeError, ValueError, OSError, MemoryError, ImportError)) and text:
        return text
    kind = type(error).__name__
    return f"internal error, {kind}{': ' * bool(text)}{text}; -v shows where"


def traceback_lines(error: BaseException) -> list[str]:
    """Returns an error with where it was raised, as Python itself would write it."""
    import traceback

    return "".join(traceback.format_exception(error)).splitlines()


def decode_text(content: bytes, name: object) -> str:
    """Returns a text that the user gave.

    Raises:
        ValueError: not UTF-8; names `name`, the byte and where it is.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"{name}: expected UTF-8 text, got byte 0x{byte:02x} at offset {error.start}"
        ) from None


def argument_text(text: str, name: str) -> str:
    """Returns a text that was given on the command line or typed, whatever the locale took its bytes for.

    Raises:
        ValueError: its bytes are not UTF-8; names `name`, the byte and where it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return decode_text(os.fsencode(text), name)
    return text


def replace_unwritable() -> None:
    """Makes stdout write "?" for what its encoding lacks, instead of failing in the middle of a result."""
    with contextlib.suppress(AttributeError):  # not so where a caller put a stream of its own
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def drop_stdout() -> None:
    """Forgets what a broken stdout still holds, or Python would complain about it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def run_command(
    name: str,
    body: Callable[[], int | None],
    *,
    verbose: bool = False,
    interrupted: Callable[[], str] | None = None,
    blames_arguments: bool = False,
) -> int:
    """Runs what a command does and turns however it ends into an exit code.

    Args:
        name: what errors begin with.
        verbose: write an error's traceback instead of its line.
        interrupted: says what to say after Ctrl-C.
        blames_arguments: a plain ValueError is wrong usage; those of files are EdgemoeErrors too.

    Returns:
        What `body` returns, 0 for None; 1 for an error, which is one line on stderr, or 2 for wrong usage; 1 when
        nobody reads stdout any more; 130 after Ctrl-C.
    """
    try:
        code = body()
        print(end="", flush=True)  # not sys.stdout.flush(): it may be closed
        return code or 0
    except KeyboardInterrupt:
        if interrupted is not None:
            note(f"{name}: {interrupted()}")
        return _INTERRUPTED
    except BrokenPipeError:
        return _ERROR
    except Exception as error:
        note(*(traceback_lines(error) if verbose else [f"{name}: {error_line(error)}"]))
        is_usage = isinstance(error, ValueError) and not isinstance(error, EdgemoeError)
        return _USAGE_ERROR if blames_arguments and is_usage else _ERROR
    finally:
        drop_stdout()
