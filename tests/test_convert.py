"""`edgemoe convert` writes every tensor once, goes on after a stop, and fails in one line."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest

import edgemoe.convert.convert as module
from edgemoe.cli import convert as cli
from edgemoe.cli import main as edgemoe_cli
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a dense layer, shared experts and some of a tokenizer's files."""
    path = families.make("qwen2_moe-mlp-only", tmp_path_factory.mktemp("tiny-qwen2"))
    (path / "tokenizer.json").write_text("{}")
    return path


class Recorder:
    """Stands for `edgemoe.format.Writer` and remembers what it is given."""

    done: tuple[str, ...] = ()

    def __init__(self, path, config, *, bits, sections, source) -> None:
        self.path, self.config, self.bits = path, config, bits
        self.sections, self.source = dict(sections), source
        self.names: list[str] = []
        self.finished = False
        self.written_bytes, self.total_bytes = 0, 100
        Recorder.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def is_done(self, name: str) -> bool:
        return name in self.done

    def add(self, name: str, values: np.ndarray) -> None:
        assert values.shape == dense_tensors(self.config)[name].shape
        assert values.dtype == np.float32
        self.names.append(name)
        self.written_bytes += 1

    def add_expert(self, layer: int, index: int, gate, up, down) -> None:
        d, h = self.config.hidden_size, self.config.expert_hidden
        assert (gate.shape, up.shape, down.shape) == ((h, d), (h, d), (d, h))
        self.names.append(f"experts.{layer}.{index}")
        self.written_bytes += 2

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(module, "Writer", Recorder)
    monkeypatch.setattr(Recorder, "done", ())
    return Recorder


def every_name(config: ModelConfig) -> list[str]:
    experts = [f"experts.{i}.{j}" for i in config.moe_layers for j in range(config.num_experts)]
    return [*dense_tensors(config), *experts]


def test_gives_the_writer_everything_in_file_order(checkpoint, recorder, tmp_path) -> None:
    reports: list[tuple[int, int]] = []
    convert(
        HFCheckpoint(checkpoint), tmp_path / "x.moe", bits=4, progress=lambda *r: reports.append(r)
    )
    writer = recorder.last
    assert writer.finished
    assert writer.bits == 4
    assert writer.names == every_name(writer.config)
    assert writer.sections.keys() == {"tokenizer.json", "generation_config.json"}
    assert writer.source["name"] == checkpoint.name
    assert writer.source["family"] == "qwen2_moe"
    json.dumps(writer.source)
    assert reports[0] == (0, 100)
    assert reports == sorted(reports)
    assert len(reports) == 1 + len(writer.names)


def test_leaves_out_what_is_done(checkpoint, recorder, tmp_path, monkeypatch) -> None:
    done = ("embed", "layers.1.router", "experts.1.0")
    monkeypatch.setattr(recorder, "done", done)
    convert(HFCheckpoint(checkpoint), tmp_path / "x.moe")
    writer = recorder.last
    assert writer.names == [name for name in every_name(writer.config) if name not in done]


def run(*argv: object) -> int:
    return edgemoe_cli.main([str(a) for a in argv])


def test_command_reports_in_lines_where_there_is_no_terminal(
    checkpoint, recorder, tmp_path, capsys, monkeypatch
) -> None:
    out = tmp_path / "x.moe"
    monkeypatch.setattr(recorder, "finish", lambda self: out.write_bytes(b"x" * (1 << 20)))
    assert run("convert", checkpoint, out) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert f"edgemoe convert: wrote {out}: 1.0 MiB" in output.err
    assert "edgemoe convert: writing x.moe: 10%\n" in output.err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ((), 2, "edgemoe: a command is missing; commands: convert, run"),
        (("fly",), 2, "edgemoe: no command 'fly'; commands: convert, run"),
        (("convert", "absent", "x.moe"), 1, "edgemoe convert: absent: no such directory"),
        (("convert", "x.gguf", "x.moe"), 2, "a .gguf file is read with --carve only"),
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


def test_refuses_to_replace_a_file_unasked(checkpoint, recorder, tmp_path, capsys) -> None:
    out = tmp_path / "x.moe"
    out.write_bytes(b"precious")
    assert run("convert", checkpoint, out) == 1
    assert f"{out}: exists; --overwrite replaces it" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
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
        with pytest.raises(type(error)):
            cli.main([str(checkpoint), str(tmp_path / "x.moe"), "-v"])


def test_help_names_every_command(capsys) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in edgemoe_cli.COMMANDS)
