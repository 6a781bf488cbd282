"""Shell completion and the manual have every argument, as both are made from the parsers."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgemoe.cli.main import COMMANDS, main
from edgemoe.cli.parser import parser_of
from edgemoe.cli.shells import PROGRAMS, SHELLS, actions, completion, program
from edgemoe.cli.values import CACHE_TYPES
from edgemoe.model import KV_TYPES

ROOT = Path(__file__).parents[2]

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\).*/\\1/')" "$1" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Does what bash does at Tab: calls the function that the script has registered."""

AT_TAB = [
    ("edgemoe ser", {"serve"}),
    ("edgemoe serve --po", {"--port"}),
    ("edgemoe chat --ra", {"--ram", "--raw"}),
    ("edgemoe run x.moe --stats ", {"short", "full", "off"}),
    ("edgemoe bench --scheduler hob", {"hobbit"}),
    ("edgemoe profile re", {"replay", "report"}),
    ("edgemoe help ben", {"bench"}),
    ("edgemoe inspect mod", {"model.moe"}),
    ("edgemoe-run --max-q", {"--max-quality-loss"}),
    ("edgemoe-run mod", {"model.moe"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with every script, and a model whose name can be completed."""
    folder = tmp_path_factory.mktemp("shells")
    (folder / "model.moe").touch()
    for shell in SHELLS:
        for name in PROGRAMS:
            (folder / f"{name}.{shell}").write_text(completion(name, shell) + "\n")
    return folder


@pytest.mark.parametrize(("line", "expected"), AT_TAB)
def test_bash_completes(line, expected, scripts):
    words = line.split(" ")
    command = ["bash", "-c", COMPLETE, "bash", f"{words[0]}.bash", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts)
    assert set(done.stdout.split()) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("line", "expected"), AT_TAB)
def test_fish_completes(line, expected, scripts):
    code = f'source {line.split(" ")[0]}.fish; complete -C "{line}"'
    done = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, check=True,
                          cwd=scripts, env={"HOME": str(scripts), "PATH": os.environ["PATH"]})  # fmt: skip
    assert {found.split("\t")[0] for found in done.stdout.splitlines()} == expected


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("shell", SHELLS)
def test_every_flag_is_known(name, shell, scripts):
    text = (scripts / f"{name}.{shell}").read_text()
    flags = {flag for action in actions(program(name)) for flag in action.option_strings}
    assert len(flags) > 30
    assert not [flag for flag in flags if (_in_fish(flag) if shell == "fish" else flag) not in text]


def _in_fish(flag: str) -> str:
    if flag.startswith("--"):
        return f" -l {flag[2:]} "
    return f" -s {flag[1:]} " if len(flag) == 2 else f" -o {flag[1:]} "


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize("name", PROGRAMS)
def test_zsh_reads_its_script(name, scripts):
    subprocess.run(["zsh", "-f", "-n", f"{name}.zsh"], check=True, cwd=scripts)
    begin = f'autoload -U compinit && compinit -D; eval "$(cat {name}.zsh)"; echo $_comps[{name}]'
    loaded = subprocess.run(["zsh", "-f", "-c", begin], check=True, capture_output=True, text=True,
                            cwd=scripts)  # fmt: skip
    assert (loaded.stdout, loaded.stderr) == (f"_shtab_{name.replace('-', '_')}\n", "")


def test_the_command_prints_the_script(scripts, capsys):
    assert main(["completion", "bash", "edgemoe-run"]) == 0
    assert capsys.readouterr().out == (scripts / "edgemoe-run.bash").read_text()
    with pytest.raises(SystemExit) as end:
        main(["completion", "csh"])
    assert end.value.code == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err


def test_every_command_has_a_page_with_every_flag(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "man-pages", tmp_path], check=True)
    contents = (tmp_path / "edgemoe.1").read_text().replace("\\", "")
    for command, (module, line) in COMMANDS.items():
        name = "edgemoe-run" if command == "run" else f"edgemoe-{command}"
        page = (tmp_path / f"{name}.1").read_text().replace("\\", "")
        assert f"{name} - {line}" in page
        parser = parser_of(importlib.import_module(module).main)
        flags = {flag for action in actions(parser) for flag in action.option_strings}
        assert not [flag for flag in flags - {"-h", "--help"} if f"fB{flag}fR" not in page]
        assert f"    {command} " in contents


def test_the_types_of_the_cache_that_complete_are_those_that_load() -> None:
    assert CACHE_TYPES == KV_TYPES
