"""Writes replies and results to stdout and everything else to stderr, as plain text where they are no terminals.

Only this module writes to them: a line with text from a model file, a trace or a checkpoint passes through `shown`.
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
"""Characters that change the direction of the text around them, so that a line can be made to read differently."""

# A reply may have newlines, tabs and right-to-left marks, but nothing that reverses the text around it.
_NOT_IN_REPLIES = dict.fromkeys(i for i in [*_CONTROLS, *_TURNS[3:]] if chr(i) not in "\n\t")


def _escape(char: int) -> str:
    if 0xDC80 <= char <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{char - 0xDC00:02x}"
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(
        char, f"\\x{char:02x}" if char < 256 else f"\\u{char:04x}"
    )


_ESCAPES = {char: _escape(char) for char in [*_CONTROLS, *_TURNS, *range(0xD800, 0xE000)]}


def shown(text: str) -> str:
    """Returns a text as one line that a terminal only shows: control characters are escaped as Python writes them."""
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
    """Returns a text that a terminal shows dimmed; unchanged for other streams, NO_COLOR, or TERM dumb or unset."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb")
    return text if is_plain or not text or not is_terminal(stream) else f"\x1b[2m{text}\x1b[0m"


def passing(line: str) -> None:
    """Replaces the last line of stderr, a terminal, and writes no newline; an empty line clears it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"\r\x1b[K{shown(line)}", end="", file=sys.stderr, flush=True)


def ask(prompt: str) -> None:
    """Writes the prompt of an input line to stderr."""
    if sys.stderr is not None:
        print(prompt, end="", file=sys.stderr, flush=True)


def say(*lines: str) -> None:
    """Writes lines of a result to stdout and flushes it.

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
    """Refuses to write a result over a model, or over a file that the command reads: a typo could cost hours of work.

    Raises:
        FileNotFoundError: the directory of `path` does not exist.
        PermissionError: `path` cannot be written.
        FileExistsError: `path` is a `.moe` file, or one of `inputs`.
        OSError: `path` cannot be read, to see what it is.
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
    """Writes a reply to stdout as it comes, and ends its last line even after an error or Ctrl-C.

    Raises:
        BrokenPipeError: nobody reads stdout any more.
        OSError: stdout cannot be written; its name is in the error.
    """
    is_tty = is_terminal(sys.stdout)
    last = ""
    try:
        for piece in pieces:
            text = piece.translate(_NOT_IN_REPLIES) if is_tty else piece
            last = text or last  # before the write, during which Ctrl-C may come
            _put(text)
    finally:
        if last and not last.endswith("\n"):
            _put("\n")


def write_aside(text: str) -> None:
    """Writes the part of a reply that is not its answer, such as reasoning: dimmed, to a stdout that is a terminal."""
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
    """Returns an error with its traceback, as Python itself would write it."""
    import traceback

    return "".join(traceback.format_exception(error)).splitlines()


def decode_text(content: bytes | bytearray, name: object) -> str:
    """Returns a text that the user gave as bytes.

    Raises:
        ValueError: not UTF-8; names `name`, the byte and its offset.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(
            f"{name}: expected UTF-8 text, got byte 0x{byte:02x} at offset {error.start}"
        ) from None


def argument_text(text: str, name: str) -> str:
    """Returns a text from the command line or the keyboard, decoded as UTF-8 whatever the locale says.

    Raises:
        ValueError: its bytes are not UTF-8; names `name`, the byte and its offset.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return decode_text(os.fsencode(text), name)
    return text


def replace_unwritable() -> None:
    """Makes stdout write "?" for what its encoding lacks, instead of failing in the middle of a result."""
    with contextlib.suppress(AttributeError):  # a caller may have replaced the stream
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def drop_stdout() -> None:
    """Discards what a broken stdout still holds; otherwise Python would report an error at exit."""
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
    """Runs the body of a command and turns every way it can end into an exit code.

    Args:
        name: the program's name, with which error lines begin.
        verbose: write an error's traceback instead of its line.
        interrupted: returns the text of the line after Ctrl-C; None for no line.
        blames_arguments: a plain ValueError is wrong usage; one about a file is an EdgemoeError too, and is not.

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
