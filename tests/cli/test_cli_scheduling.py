"""The flags --scheduler and --set, and `edgemoe schedulers`."""

from __future__ import annotations

import io

import pytest

from edgemoe.cli.bench import main as bench
from edgemoe.cli.inspect import main as inspect
from edgemoe.cli.run import main as run
from edgemoe.cli.scheduling import main, options_text, read_settings
from edgemoe.scheduler import KINDS, SHARED
from edgemoe.scheduler.options import describe


def test_every_scheduler_is_told_with_its_paper_and_options(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for name, kind in KINDS.items():
        assert f"\n{name}\n" in f"\n{text}"
        for o in describe(kind.Options):
            assert f"    {o.name}=" in text
        if name not in ("on-demand", "auto"):
            assert kind.paper.split(",")[0] in text
    for kind in SHARED:
        for o in describe(kind):
            assert o.help
            assert f"    {o.name}=" in text
    assert max(map(len, text.splitlines())) <= 100
    assert main(["hobbit"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("hobbit\n")
    assert "d2moe" not in text


def test_an_unknown_scheduler_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as code:
        main(["hobit"])
    assert code.value.code == 2
    assert capsys.readouterr().err.startswith(
        "edgemoe schedulers: hobit: expected one of on-demand,"
    )


def test_set_help_needs_no_model(capsys):
    for program in (run, bench):
        assert program(["no.moe", "--scheduler", "mc", "--set", "help"]) == 0
        assert capsys.readouterr().out.strip() == options_text("mc")


def test_settings_come_from_flags_and_files_the_later_ones_first(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('t1 = 0.5\nstrict = false\neviction = "lru"\nlook-ahead = 2\n')
    assert read_settings([f"@{path}", "t1=0.3", "w-recency=1"]) == {
        "t1": "0.3", "strict": False, "eviction": "lru", "look_ahead": 2, "w_recency": "1",
    }  # fmt: skip
    assert read_settings(["t1=0.3", f"@{path}"])["t1"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("t1 = ", "not TOML"),
        ("[hobbit]\nt1 = 1", "hobbit: expected one value, got a table or list"),
        ("t1 = [1]", "t1: expected one value"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "s.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_settings([f"@{path}"])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["t1", "=3"])
def test_a_setting_is_key_and_value(text):
    with pytest.raises(ValueError, match="expected KEY=VALUE or @FILE.toml"):
        read_settings([text])


@pytest.fixture
def nothing_piped(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))


@pytest.mark.usefixtures("nothing_piped")
def test_run_refuses_a_wrong_option_and_says_which_there_are(tiny_moe, capsys):
    code = run([str(tiny_moe), "--scheduler", "mc", "--set", "betta=1", "-p", "x", "-n", "1"])
    assert code == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "edgemoe-run: option betta: there is no such; expected one of: prune, beta,"
    )
    assert err.count("\n") == 1


@pytest.mark.usefixtures("nothing_piped")
def test_run_announces_what_is_lossy_and_counts_it(tiny_moe, capsys):
    code = run(
        [
            str(tiny_moe),
            "--set",
            "skip_below=1",
            "-p",
            "hello",
            "-n",
            "8",
            "--temp",
            "0",
            "-c",
            "64",
        ]
    )
    assert code == 0
    err = capsys.readouterr().err
    assert "# lossy: experts below 1 of the largest gate are skipped" in err
    assert ", skipped 50.0%" in err


def test_bench_takes_the_same_flags(tiny_moe, capsys):
    code = bench(
        [
            str(tiny_moe),
            "-p",
            "0",
            "-n",
            "4",
            "-r",
            "1",
            "--scheduler",
            "hobbit",
            "--set",
            "low_bits=2",
        ]
    )
    assert code == 0
    out = capsys.readouterr()
    assert "| tg4 |" in out.out
    assert "read at 2 bits" in out.err


def test_a_stdout_that_cannot_be_written_is_one_line_at_most(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main([]) == 1
    err = capsys.readouterr().err
    assert err == "edgemoe schedulers: stdout: No space left on device\n"


def test_a_closed_stdout_is_an_error_in_one_line(tiny_moe, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    assert inspect([str(tiny_moe)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgemoe inspect: stdout is closed")
