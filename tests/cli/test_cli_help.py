"""Every command has a help text with all of its arguments."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from edgemoe.cli.main import COMMANDS, main

WORDS = [[name] for name in COMMANDS]
WORDS += [["profile", name] for name in ("trace", "report", "replay", "plot")]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: edgemoe")


def test_alone_it_says_how_to_begin(capsys):
    for words in ([], ["help"], ["--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "edgemoe pull allenai/OLMoE-1B-7B-0924" in text
        assert all(f"  {name} " in text for name in COMMANDS)


def test_what_peers_call_it(capsys):
    for words in (["help", "bench"], ["chat", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    assert main(["chat", "absent.moe", "-p", "Hi"]) == 1
    assert capsys.readouterr().err == "edgemoe chat: absent.moe: no such file\n"
    assert main(["profile"]) == 0
    assert "replay" in capsys.readouterr().out
    for typed, meant in (
        ("inspct", "inspect"),
        ("chta", "chat"),
        ("ls", "list"),
        ("download", "pull"),
    ):
        assert main([typed]) == 2
        assert capsys.readouterr().err == (
            f"edgemoe: no command '{typed}'; did you mean edgemoe {meant}?; edgemoe help lists the commands\n"
        )


@pytest.mark.parametrize(
    "words",
    [["run"], ["plan"], ["serve"], ["rm"], ["doctor"], ["quality"], ["convert"], ["run", "-f"], ["run", "--trace"],
     ["run", "--json-schema"], ["serve", "--slot-save-path"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_empty_is_no_path(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, ""])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "expected a value, got ''; edgemoe" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["run", "serve"])
def test_the_first_screen_has_the_flags_of_every_day(name, capsys):
    def shown(flag):
        with pytest.raises(SystemExit) as end:
            main([name, flag])
        assert end.value.code == 0
        return capsys.readouterr().out

    first, every = shown("--help"), shown("--help-all")
    for flag in ("--ram", "--bits", "-c N", "-hf"):
        assert f"\n  {flag}" in first
    assert "--scheduler" not in first
    assert "--scheduler" in every
    assert first.count("\n") < 60 < every.count("\n")
    assert f"edgemoe {name} --help-all lists the other flags: experts and memory; " in first
    # Everything in the short help is in the full one too.
    assert set(first.split("\n\n")[:-1]) <= set(every.split("\n\n")) | {
        every.split("\n\n")[-1].rstrip()
    }


def test_python_m_is_the_program():
    command = [sys.executable, "-m", "edgemoe", "help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: edgemoe COMMAND")


def test_no_such_command(capsys):
    assert main(["fly"]) == 2
    assert capsys.readouterr().err == "edgemoe: no command 'fly'; edgemoe help lists the commands\n"


@pytest.mark.parametrize("where", ["closed", "full"])
def test_help_that_cannot_be_written_is_an_error(where, monkeypatch, capsys):
    with contextlib.ExitStack() as files:
        full = files.enter_context(open("/dev/full", "w")) if where == "full" else None
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as end:
            main(["inspect", "--help"])
        assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgemoe inspect: stdout")
