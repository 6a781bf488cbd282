"""`edgemoe convert` reports plainly, fails in one line and leaves other files alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import families
import pytest

import edgemoe.convert.convert as module
from edgemoe.cli import convert as cli
from edgemoe.cli import main as edgemoe_cli
from edgemoe.cli import progress
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.file.writer import Writer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.make("olmoe", tmp_path_factory.mktemp("tiny-olmoe"))


def run(*argv: object) -> int:
    return edgemoe_cli.main([str(a) for a in argv])


def test_command_reports_in_lines_where_there_is_no_terminal(checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "x.moe"
    assert run("convert", checkpoint, out, "--bits", 3) == 0
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    tenths = [f"# writing x.moe: {n}0%" for n in range(1, 11)]
    assert [line for line in lines if line in tenths] == tenths
    assert lines[-1].startswith(f"edgemoe convert: wrote {out}: ")
    assert open_moe(out).ladder[-1] == (3, 3, 3)


def test_a_long_task_says_how_long_it_takes(monkeypatch, capsys):
    clock = iter([0.0, 1080.0, 4000.0, 8970.0, 9000.0])
    monkeypatch.setattr(progress.time, "monotonic", clock.__next__)
    with progress.Progress("searching", unit="layer") as tell:
        for done in (40, 136, 520, 997, 1000):  # 40 were done before
            tell(done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "# searching: 10%, 2 h 42 min left",
        "# searching: 50%, 1 h 7 min left",
        "# searching: 90%",
        "# searching: 100%",
    ]


def test_what_is_no_checkpoint_is_named(tiny_moe, tmp_path, capsys) -> None:
    assert run("convert", tiny_moe, tmp_path / "x.moe") == 1
    assert capsys.readouterr().err.endswith(
        "tiny.moe: is a .moe file already; expected a checkpoint's directory or a GGUF file\n"
    )
    assert run("convert", __file__, tmp_path / "x.moe") == 1
    assert "is not a directory; expected a checkpoint's directory" in capsys.readouterr().err
    assert not (tmp_path / "x.moe").exists()


def test_the_full_search_is_asked_for_and_kept_in_the_file(checkpoint, tmp_path, capsys) -> None:
    quick, thorough = tmp_path / "quick.moe", tmp_path / "thorough.moe"
    assert run("convert", checkpoint, quick, "--no-column-scales") == 0
    assert "--no-column-scales changes nothing" in capsys.readouterr().err
    assert run("convert", checkpoint, thorough, "--thorough") == 0
    assert "thorough" not in open_moe(quick).source
    assert open_moe(thorough).source["thorough"] is True
    assert open_moe(quick).tensors != open_moe(thorough).tensors  # their checksums


def test_command_says_what_of_a_scaling_is_not_used(tmp_path, capsys) -> None:
    source = families.make("olmoe-bias-dynamic", tmp_path / "dynamic")
    assert run("convert", source, tmp_path / "x.moe") == 0
    said = "edgemoe convert: dynamic: dynamic RoPE scaling: contexts of up to 64 tokens"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("fly",), 2, "edgemoe: no command 'fly'; edgemoe help lists the commands"),
        (
            ("convert", "absent", "x.moe"),
            1,
            "edgemoe convert: absent: no such folder or file; expected a checkpoint",
        ),
        (
            ("convert", "Qwen/Qwen3", "x.moe"),
            1,
            "edgemoe pull Qwen/Qwen3 fetches and converts that model",
        ),
        (("convert", "absent", "no/x.moe"), 1, "edgemoe convert: no: no such directory"),
        (("convert", "absent", "x.moe", "--bits", "5"), 2, "--bits: expected one of 2, 3, 4, 6"),
        (
            ("convert", "absent", "x.moe", "--allocation", "no.json"),
            1,
            "edgemoe convert: no.json: No such file",
        ),
        (
            ("convert", "absent", "x.moe", "--allocation", __file__),
            1,
            "not an allocation of edgemoe",
        ),
        (
            ("convert", "absent", "x.moe", "--correction", "many"),
            2,
            "--correction: expected auto, none or a rank, got many",
        ),
        (
            ("convert", "absent", "x.moe", "--correction", "8"),
            2,
            "correction: expected a calibration that was made with --full or --layers",
        ),
        (
            ("convert", "absent", "x.moe", "--bits", "4", "--favour", "6"),
            2,
            "--favour: expected one of 2, 3, 4, got 6",
        ),
        (
            ("convert", "absent", "x.moe", "--scheme", "mwq", "--thorough"),
            2,
            "--thorough: not for the scheme mwq",
        ),
        (
            ("convert", "absent", "x.moea"),
            2,
            "x.moea: is the name of an adapter; expected --base BASE.moe too",
        ),
        (
            ("convert", "absent", "x.moea", "--base", "b.moe", "--no-column-scales"),
            2,
            "--no-column-scales: with --base all is made as the base was; leave it out",
        ),
        (("convert", "absent", "x.moe", "--carve"), 1, "absent: no such folder or file"),
        (("convert", "x.gguf", "x.moe"), 1, "x.gguf: no such file"),
    ],
)
def test_command_fails_in_one_line(argv, code, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [(), ("a", "b", "c"), ("a", "b", "--bits", "x")])
def test_wrong_flags_end_with_usage(argv, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run("convert", *argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_refuses_to_replace_a_file_unasked(checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "x.moe"
    out.write_bytes(b"precious")
    assert run("convert", checkpoint, out) == 1
    assert f"{out}: exists; --overwrite replaces it" in capsys.readouterr().err
    assert run("convert", checkpoint, out, "--overwrite") == 1
    assert "not a .moe file" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert run("convert", checkpoint, checkpoint / "config.json", "--overwrite") == 1
    assert run("convert", checkpoint, "/dev/null", "--overwrite") == 1
    out.unlink()
    assert run("convert", checkpoint, out) == 0
    assert run("convert", checkpoint, out, "--overwrite") == 0


def test_a_dense_model_is_told_about_carving(tmp_path, capsys, checkpoint) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    assert run("convert", tmp_path, tmp_path / "x.moe") == 2
    assert "--carve cuts it into experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (FormatError("bad file"), 1),
        (OSError(28, "No space left on device", "x.moe"), 1),
        (ValueError("bits must be one of 2, 3, 4, 6, 8"), 2),
        (RuntimeError("a bug"), 1),
    ],
)
def test_exit_codes(error, code, checkpoint, monkeypatch, tmp_path, capsys) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, "convert", fail)
    assert cli.main([str(checkpoint), str(tmp_path / "x.moe")]) == code
    assert capsys.readouterr().err.startswith("edgemoe convert: ")
    if code == 1:
        assert cli.main([str(checkpoint), str(tmp_path / "x.moe"), "-v"]) == code
        assert "\nTraceback (most recent call last):\n" in capsys.readouterr().err


def test_help_names_every_command(capsys) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in edgemoe_cli.COMMANDS)


def test_ctrl_c_leaves_a_part_that_the_next_run_finishes(
    checkpoint, tmp_path, capsys, monkeypatch
) -> None:
    def interrupt(self: Writer) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "x.moe"
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", interrupt)
        assert run("convert", checkpoint, out) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    assert not out.exists()
    assert run("convert", checkpoint, out) == 0
    assert "writing x.moe: 50%" not in capsys.readouterr().err  # It was written before.


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), ""),
        (("vocab.json",), ""),
        (
            ("vocab.json", "merges.txt"),
            "; transformers makes one of its vocab.json and merges.txt: ",
        ),
        (("tokenizer.model",), "; transformers makes one of its tokenizer.model: AutoTokenizer."),
    ],
)
def test_a_missing_tokenizer_is_said_and_how_to_get_one(
    names, words, checkpoint, tmp_path, capsys
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    for name in names:
        (source / name).write_text("x")
    assert run("convert", source, tmp_path / "x.moe", "--bits", 2) == 0
    first = capsys.readouterr().err.splitlines()[0]
    said = "no tokenizer.json; the file will take and give token ids only"
    assert first.startswith(f"edgemoe convert: source: {said}{words}")
    assert ("transformers" in first) == bool(words)
