"""Every command in the documentation has the names, flags and values that the program takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from edgemoe.cli.main import ALIASES, COMMANDS
from edgemoe.cli.parser import Parser, parser_of

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "csrc" / "README.md"]
ENDS = {"|", "&&", "||", ";", "&", ">", ">>", "2>", "<", ")"}


def lines_of(page: Path) -> list[str]:
    """Returns the commands of a page's shell blocks, without their line breaks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands_of(line: str) -> list[list[str]]:
    """Returns the words of each call of edgemoe in a line of shell."""
    words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    words.whitespace_split = True
    found: list[list[str]] = []
    is_call = True
    for word in words:
        if word in ENDS:
            is_call = True
        elif is_call and word in ("edgemoe", "edgemoe-run"):
            found.append([word])
            is_call = False
        elif is_call and "=" in word:  # a variable of the environment
            pass
        else:
            if not is_call and found:
                found[-1].append(word)
            is_call = False
    return found


def parser_and_rest(words: list[str]) -> tuple[Parser, list[str]]:
    """Returns the parser of a call, and the arguments that it is given."""
    name, rest = ("run", words[1:]) if words[0] == "edgemoe-run" else (words[1], words[2:])
    return parser_of(importlib.import_module(COMMANDS[ALIASES.get(name, name)][0]).main), rest


BLOCKS = sorted(
    {
        (page.name, shlex.join(words))
        for page in PAGES
        for line in lines_of(page)
        for words in commands_of(line)
    }
)
SPANS = sorted(
    {
        (page.name, span)
        for page in PAGES
        for span in re.findall(r"`(edgemoe(?:-run| [a-z][a-z-]+)[^`\n]*)`", page.read_text())
    }
)


@pytest.mark.parametrize(("page", "command"), BLOCKS)
def test_a_command_is_taken_as_it_is_written(page: str, command: str) -> None:
    parser, rest = parser_and_rest(shlex.split(command))
    try:
        parser.parse_args(rest)
    except SystemExit as end:
        assert end.code in (None, 0), f"{page}: {command}"


@pytest.mark.parametrize(("page", "span"), SPANS)
def test_a_command_in_a_sentence_has_flags_that_there_are(page: str, span: str) -> None:
    words = span.split()
    name = "run" if words[0] == "edgemoe-run" else words[1]
    assert name in COMMANDS or name in ALIASES, f"{page}: {span}"
    flags = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", " ".join(words[1:])))
    assert flags <= options(parser_and_rest(words)[0]) | {"-h"}, f"{page}: {span}"


def options(parser: Parser) -> set[str]:
    """Returns all flags of a command and of its subcommands."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                found |= options(inner)
    return found
