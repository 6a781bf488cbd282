"""Faults that would make a converted file useless for text are reported in one line, before any work is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint
from tiny_llama import save_hf, tiny_llama
from tokenizers import AddedToken, Tokenizer

from edgemoe.convert.carve import carve as carving
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.errors import FormatError


def larger(tokenizer: bytes) -> bytes:
    """Adds tokens until there are more ids than rows in the tiny model's embedding."""
    backend = Tokenizer.from_str(tokenizer.decode())
    backend.add_tokens([AddedToken(f"<extra{i}>") for i in range(301 - backend.get_vocab_size())])
    return backend.to_str().encode()


def checkpoint(**files: Any) -> Any:
    found = tiny_checkpoint()
    for stem, content in files.items():
        name = f"{stem}.json"
        old = json.loads(found.files.get(name, b"{}"))
        new = (
            content(found.files[name]) if callable(content) else json.dumps(old | content).encode()
        )
        found.files = {**found.files, name: new}
    return found


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer": larger},
            "tiny: tokenizer.json: token '<extra41>' has id 300; the embedding has 264 rows (vocab_size)",
        ),
        (
            {"generation_config": {"eos_token_id": [258, 264]}},
            "tiny: generation_config.json: eos_token_id: 264 is outside the vocabulary of 264",
        ),
        (
            {"generation_config": {"eos_token_id": -1}},
            "tiny: generation_config.json: eos_token_id: -1 is outside the vocabulary of 264",
        ),
        (
            {"tokenizer_config": {"chat_template": "{% for m in messages %}\n{{ m."}},
            "tiny: chat template 'default', line 2: ",
        ),
        ({"tokenizer": lambda content: content[:-9]}, "tiny: tokenizer.json: "),
    ],
)
def test_is_found_at_conversion(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as error:
        convert(checkpoint(**files), tmp_path / "x.moe")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_end_tokens_of_config_json_are_named_too(tmp_path: Path) -> None:
    found = tiny_checkpoint()
    found.config = {**found.config, "eos_token_id": 2**40}
    with pytest.raises(FormatError, match=r"tiny: config\.json: eos_token_id: 1099511627776 is"):
        convert(found, tmp_path / "x.moe")


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_carving_finds_it_before_it_calibrates(name: str, tmp_path: Path, monkeypatch) -> None:
    path = save_hf(tiny_llama(), tmp_path / "llama")
    broken = {
        "generation_config.json": b'{"eos_token_id": 300}',
        "tokenizer.json": larger((path / "tokenizer.json").read_bytes()),
        "chat_template.jinja": b"{% if %}",
    }
    (path / name).write_bytes(broken[name])
    monkeypatch.setattr(carving, "_calibrated", lambda *_: pytest.fail("calibrates"))
    with pytest.raises(FormatError, match=r"^llama: "):
        carving.carve(HFCheckpoint(path))


def test_sections_that_no_reader_takes_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("edgemoe.file.writer.MAX_SECTIONS", 1000)
    with pytest.raises(FormatError, match="sections of .* bytes; expected at most 1000"):
        convert(tiny_checkpoint(), tmp_path / "x.moe")
    assert list(tmp_path.iterdir()) == []


def test_provenance_is_short(tmp_path: Path) -> None:
    from edgemoe.file.reader import open_moe

    found = tiny_checkpoint()
    found.config = {**found.config, "architectures": ["x" * 100_000], "dtype": "bfloat16"}
    convert(found, tmp_path / "x.moe")
    assert open_moe(tmp_path / "x.moe").source["config"] == {
        "model_type": "qwen2_moe", "dtype": "bfloat16"
    }  # fmt: skip
