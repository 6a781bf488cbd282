"""Every command tells what it takes."""

from __future__ import annotations

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


def test_no_such_command(capsys):
    assert main(["fly"]) == 2
    assert "no command 'fly'; commands: allocate, bench" in capsys.readouterr().err
