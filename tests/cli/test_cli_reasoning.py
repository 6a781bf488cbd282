"""A model's reasoning is shown apart from its answer: dimmed, folded, or switched off."""

from __future__ import annotations

import json
import sys

import pytest
from tiny import thinking_checkpoint

import edgemoe
from edgemoe.cli.reasoning import apart, set_reasoning
from edgemoe.cli.repl import interact
from edgemoe.cli.run import main
from edgemoe.convert.convert import convert
from edgemoe.text.replies import Piece
from edgemoe.text.sampler import SamplingParams

CLOSE = 260
PARAMS = SamplingParams(seed=3, max_tokens=60, logit_bias={259: -1000, 261: -1000, CLOSE: 4.0})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("thinking") / "thinking.moe"
    convert(thinking_checkpoint(), found)
    return found


@pytest.fixture(scope="module")
def engine(path):
    with edgemoe.load(path) as found:
        yield found


def test_reasoning_is_apart_from_the_answer(engine):
    chat = engine.chat(params=PARAMS)
    pieces = list(chat.pieces("Go."))
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": "Go."}])
    tokens = list(engine.generate(ids, PARAMS))
    at = tokens.index(CLOSE)
    texts = {
        kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")
    }
    assert texts["reasoning"] == engine.tokenizer.decode(tokens[:at]).strip()
    assert texts["content"] == engine.tokenizer.decode(tokens[at + 1 :]).lstrip()
    assert chat.messages[-1] == {
        "role": "assistant", "content": texts["content"], "reasoning_content": texts["reasoning"]
    }  # fmt: skip
    chat.reset()
    assert "".join(chat.say("Go.")) == texts["content"]


def test_a_saved_conversation_keeps_it(engine, tmp_path):
    chat = engine.chat(params=PARAMS)
    list(chat.say("Go."))
    chat.save(tmp_path / "a.json")
    again = engine.chat()
    again.load(tmp_path / "a.json")
    assert again.messages == chat.messages
    assert again.messages[-1]["reasoning_content"]


def test_it_can_be_switched_off(engine):
    chat = engine.chat(params=PARAMS)
    set_reasoning(chat, "off")
    assert {piece.kind for piece in chat.pieces("Go.")} == {"content"}


def test_a_template_that_cannot_be_told_is_an_error(tiny_moe, engine, monkeypatch):
    with edgemoe.load(tiny_moe) as plain:
        set_reasoning(plain.chat(), "off")  # there is none
    chat = engine.chat()
    monkeypatch.setattr(type(engine.tokenizer), "chat_template", "<think>")
    with pytest.raises(ValueError, match="no word for switching it off"):
        set_reasoning(chat, "off")


PIECES = [Piece("reasoning", "so "), Piece("reasoning", "and so"), Piece("content", "Yes.")]


@pytest.mark.parametrize(
    ("kind", "is_tty", "out"),
    [
        ("dim", True, "\x1b[2mso \x1b[0m\x1b[2mand so\x1b[0m\x1b[2m\n\n\x1b[0m"), ("dim", False, ""),
        ("fold", True, ""),
    ],
)  # fmt: skip
def test_a_terminal_shows_it_dimmed_and_nothing_else_does(capsys, monkeypatch, kind, is_tty, out):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_tty)
    assert list(apart(iter(PIECES), kind)) == ["Yes."]
    said = capsys.readouterr()
    assert said.out == out
    assert ("# reasoned for" in said.err) == (not out)


def test_a_prompt_prints_the_answer_alone(path, capsys):
    assert main([str(path), "-p", "Go.", "-n", "40", "-s", "1", "--stats", "off"]) == 0
    said = capsys.readouterr()
    assert "# reasoned for" in said.err
    assert main([str(path), "-p", "Go.", "-n", "40", "-s", "1", "--reasoning", "off"]) == 0
    assert "# reasoned for" not in capsys.readouterr().err


def test_a_command_shows_the_last_and_says_how(engine, capsys, monkeypatch):
    chat = engine.chat(params=PARAMS)
    lines = iter(
        ["/reasoning", "Go.", "/reasoning", "/reasoning never", "/reasoning off", "Go.", "/quit"]
    )
    monkeypatch.setattr("edgemoe.cli.line.LineReader.read", lambda _: next(lines))
    assert interact(engine, chat, name="x", reasoning="fold", keeps_history=False) == 0
    said = capsys.readouterr().err
    assert "# the last reply has none" in said
    thought = chat.messages[1]["reasoning_content"]
    assert thought.split("\n")[0][:10].strip() in said
    assert "expected one of dim, fold, off, got 'never'" in said
    assert "reasoning_content" not in chat.messages[3]


def test_a_template_that_cannot_be_followed_is_said(tmp_path, capsys):
    checkpoint = thinking_checkpoint()
    config = json.loads(checkpoint.files["tokenizer_config.json"]) | {"response_template": {"a": 1}}
    checkpoint.files = {
        **checkpoint.files, "tokenizer_config.json": json.dumps(config).encode()
    }  # fmt: skip
    convert(checkpoint, tmp_path / "x.moe")
    assert main([str(tmp_path / "x.moe"), "-p", "Go.", "-n", "1"]) == 0
    assert "# replies are read as tagged: response_template: unknown 'a'" in capsys.readouterr().err
