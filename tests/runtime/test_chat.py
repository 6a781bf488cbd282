"""A chat keeps the conversation, streams whole characters, and never shows a part of a stop text."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import CHATML, tiny_checkpoint

import edgemoe
from edgemoe.cli.prompt import read_text
from edgemoe.convert.convert import convert
from edgemoe.errors import FormatError, OutOfBudget, ReadError
from edgemoe.runtime.chat import Chat, TooLong
from edgemoe.text.jinja.meter import Meter
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_moe: Path) -> Iterator[edgemoe.Engine]:
    with edgemoe.load(tiny_moe) as engine:
        yield engine


@pytest.fixture
def chat(engine: edgemoe.Engine) -> Chat:
    return engine.chat(params=GREEDY)


def with_stop(*stop: str) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop=stop)


def test_a_reply_is_what_the_engine_generates(engine: edgemoe.Engine, chat: Chat) -> None:
    reply = "".join(chat.say("Hello"))
    messages = [{"role": "user", "content": "Hello"}]
    ids = engine.tokenizer.encode_chat(messages)
    assert reply == engine.tokenizer.decode(list(engine.generate(ids, GREEDY)))
    assert chat.messages == [*messages, {"role": "assistant", "content": reply}]
    assert chat.finish == "length"


def test_the_next_turn_sees_the_one_before(engine: edgemoe.Engine, chat: Chat) -> None:
    list(chat.say("Hello"))
    before = chat.messages
    reply = "".join(chat.say("And you?"))
    ids = engine.tokenizer.encode_chat([*before, {"role": "user", "content": "And you?"}])
    assert reply == engine.tokenizer.decode(list(engine.generate(ids, GREEDY)))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_what_was_computed_is_not_computed_again(engine: edgemoe.Engine, chat: Chat) -> None:
    list(chat.say("Hello"))
    prompt = engine.stats.prompt_tokens + engine.stats.cached_tokens
    list(chat.say("And you?"))
    # The reply's text may be tokenised otherwise than it was generated; the prompt's may not.
    assert engine.stats.cached_tokens >= prompt


def test_a_system_message_stays(engine: edgemoe.Engine) -> None:
    chat = engine.chat(system="Be brief.", params=GREEDY)
    list(chat.say("Hello"))
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_messages_are_a_copy(chat: Chat) -> None:
    list(chat.say("Hello"))
    chat.messages[0]["content"] = "changed"
    chat.messages.clear()
    assert chat.messages[0]["content"] == "Hello"


def test_a_closed_reply_keeps_what_was_said(engine: edgemoe.Engine, chat: Chat) -> None:
    reply = chat.say("Hello")
    first = next(reply)
    reply.close()
    assert chat.messages[1:] == [{"role": "assistant", "content": first}]
    assert chat.finish is None
    ids = engine.tokenizer.encode_chat([*chat.messages, {"role": "user", "content": "Go on"}])
    expected = engine.tokenizer.decode(list(engine.generate(ids, GREEDY)))
    assert "".join(chat.say("Go on")) == expected


def test_ctrl_c_in_the_consumer_keeps_what_was_said(chat: Chat) -> None:
    shown: list[str] = []

    def show() -> None:
        for piece in chat.say("Hello"):
            shown.append(piece)
            if len(shown) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show()
    assert chat.messages[1:] == [{"role": "assistant", "content": "".join(shown)}]
    assert "".join(chat.say("Again"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ReadError("x.moe: read failed at 4096")])
@pytest.mark.parametrize("after", [0, 6])
def test_an_error_in_the_engine_keeps_what_was_said(
    engine: edgemoe.Engine,
    chat: Chat,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    after: int,
) -> None:
    generate = type(engine).generate

    def failing(self: edgemoe.Engine, *args: object) -> Iterator[int]:
        for i, token in enumerate(generate(self, *args)):
            if i == after:
                raise error
            yield token

    list(chat.say("Hello"))
    before = chat.messages
    pieces: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "generate", failing)
        with pytest.raises((KeyboardInterrupt, ReadError)):
            pieces.extend(chat.say("Go on"))
    shown = "".join(pieces)
    said = [{"role": "user", "content": "Go on"}, {"role": "assistant", "content": shown}]
    assert bool(shown) == bool(after)
    assert chat.messages == (before + said if shown else before)
    assert "".join(chat.say("Again"))


def test_a_new_question_ends_the_reply_before(chat: Chat) -> None:
    old = chat.say("Hello")
    first = next(old)
    assert "".join(chat.say("Go on"))
    assert list(old) == []
    assert chat.messages[1]["content"] == first
    old = chat.say("More")
    next(old)
    chat.reset()
    assert list(old) == []
    assert chat.messages == []


def test_a_conversation_that_does_not_fit_changes_nothing(
    engine: edgemoe.Engine, chat: Chat
) -> None:
    list(chat.say("Hello"))
    before = chat.messages
    with pytest.raises(ValueError, match=rf"too long .* less than {engine.context} tokens, got \d"):
        list(chat.say("word " * engine.context))
    assert chat.messages == before
    assert "".join(chat.say("Again"))


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgemoe.Engine]:
    """A model whose template repeats what was reasoned."""
    checkpoint = tiny_checkpoint()
    config = json.loads(checkpoint.files["tokenizer_config.json"])
    config["chat_template"] = CHATML.replace(
        "{{ message['content'] }}", "{{ message['reasoning_content'] }}{{ message['content'] }}"
    )
    text = json.dumps(config).encode()
    checkpoint.files = {**checkpoint.files, "tokenizer_config.json": text}
    path = tmp_path_factory.mktemp("reasoner") / "x.moe"
    convert(checkpoint, path)
    with edgemoe.load(path) as engine:
        yield engine


@pytest.mark.parametrize("thought", ["hmm, " * 5, "äh 🙂 " * 20, "word " * 4000], ids=len)
def test_what_was_reasoned_is_a_part_of_the_conversation(
    reasoner: edgemoe.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thought: str
) -> None:
    lent: list[int] = []
    monkeypatch.setattr(type(reasoner), "lend", lambda _, size: lent.append(size))
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "reasoning_content": thought},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"messages": messages}))
    chat = reasoner.chat(params=GREEDY)
    chat.load(tmp_path / "a.json")
    if len(thought) > 1000:  # and it is refused as what it is, with the remedy for that
        with pytest.raises(TooLong):
            list(chat.say("Go on"))
        assert chat.messages == messages
    else:
        list(chat.say("Go on"))
    asked = [*messages, {"role": "user", "content": "Go on"}]
    assert max(lent) >= Meter.most_bytes(len(json.dumps(asked)))


@pytest.mark.parametrize("raw", [False, True])
def test_room_is_made_for_tokenizing(
    raw: bool, engine: edgemoe.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[int] = []
    monkeypatch.setattr(edgemoe.Engine, "lend", lambda _, size: lent.append(size))
    text = "é" * 20_000
    with pytest.raises(ValueError, match="too long for the context"):
        list(Chat(engine, raw=raw).say(text))
    assert lent[1] >= Tokenizer.most_bytes(text[: 8 * engine.context])
    assert len(lent) == 2


def test_a_reply_ends_where_the_context_does(engine: edgemoe.Engine) -> None:
    chat = engine.chat(params=SamplingParams(temperature=0, ignore_eos=True))
    list(chat.say("Hello"))
    assert chat.finish == "context"
    assert engine.stats.new_tokens + engine.stats.prompt_tokens + engine.stats.cached_tokens == (
        engine.context
    )


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_stop_text_is_never_seen(chat: Chat, length: int) -> None:
    whole = "".join(chat.say("Hello"))
    for start in range(0, len(whole) - length, 3):
        stop = whole[start : start + length]
        chat.reset()
        chat.params = with_stop("nowhere to be found", stop)
        expected = whole[: whole.find(stop)]
        assert "".join(chat.say("Hello")) == expected
        assert chat.messages[1]["content"] == expected
        assert chat.finish == "stop"


def test_a_half_stop_text_at_the_end_is_text(chat: Chat) -> None:
    whole = "".join(chat.say("Hello"))
    chat.reset()
    chat.params = with_stop(whole[-4:] + "!")
    assert "".join(chat.say("Hello")) == whole


@pytest.mark.parametrize("stop", ["<|im_start|>", "im_st", "><|im", "t|><|im_start|>"])
def test_a_special_token_that_is_not_shown_stops_a_reply(engine: edgemoe.Engine, stop: str) -> None:
    start = engine.tokenizer.encode("<|im_start|>")[0]
    others = [i for i in range(engine.config.vocab_size) if i != start]
    only = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, suppress_tokens=others)
    chat = engine.chat(params=only)
    assert "".join(chat.say("Hello")) == ""
    assert (chat.finish, engine.stats.new_tokens) == ("length", 9)
    chat.params = replace(only, stop=(stop,))
    assert "".join(chat.say("Hello")) == ""
    assert (chat.finish, engine.stats.new_tokens) == ("stop", 1 if stop in "<|im_start|>" else 2)


def test_a_stop_text_ends_what_is_generated_at_its_last_token(engine: edgemoe.Engine) -> None:
    ids = engine.tokenizer.encode("Hello")
    tokens = list(engine.generate(ids, GREEDY))
    texts = [engine.tokenizer.decode(tokens[:n], skip_special=False) for n in range(17)]
    stop = texts[9][-3:]
    first = next(n for n, text in enumerate(texts) if stop in text)
    assert list(engine.generate(ids, with_stop("absent", stop))) == tokens[:first]


def test_a_chat_is_sampled_as_the_model_says(engine: edgemoe.Engine) -> None:
    assert Chat(engine).params == engine.sampling


def test_the_end_token_of_the_template_ends_a_reply(engine: edgemoe.Engine) -> None:
    assert set(engine.config.eos_ids) <= set(engine.tokenizer.eos_ids)
    chat = engine.chat(params=SamplingParams(seed=1, temperature=3, top_k=0, top_p=1, min_p=0))
    for _ in range(3):  # at a high temperature a random model soon draws an end token
        chat.reset()
        ids = engine.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
        tokens = []
        for token in engine.generate(ids, chat.params):
            if token in engine.tokenizer.eos_ids:
                break
            tokens.append(token)
        assert "".join(chat.say("Hello")) == engine.tokenizer.decode(tokens)


def test_raw_text_is_continued(engine: edgemoe.Engine) -> None:
    chat = Chat(engine, params=GREEDY, raw=True)
    assert chat.is_raw
    first = "".join(chat.say("Once upon"))
    ids = engine.tokenizer.encode("Once upon")
    assert first == engine.tokenizer.decode(list(engine.generate(ids, GREEDY)))
    second = "".join(chat.say(" a time"))
    ids = engine.tokenizer.encode("Once upon" + first + " a time")
    assert second == engine.tokenizer.decode(list(engine.generate(ids, GREEDY)))
    with pytest.raises(ValueError, match="expected some text"):
        list(Chat(engine, raw=True).say(""))


def test_save_and_load(engine: edgemoe.Engine, tmp_path: Path) -> None:
    chat = engine.chat(system="Be kind. Ünïcödé", params=GREEDY)
    list(chat.say("Hello"))
    path = tmp_path / "chat.json"
    path.write_text("older")
    chat.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
    other = engine.chat(params=GREEDY)
    other.load(path)
    assert other.messages == chat.messages
    assert "".join(other.say("Go on")) == "".join(chat.say("Go on"))
    other.reset()
    assert other.messages == chat.messages[:1]


def test_a_saved_file_keeps_its_mode(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text("older")
    path.chmod(0o664)
    chat.save(path)
    assert path.stat().st_mode & 0o777 == 0o664


def test_a_failed_save_leaves_the_file(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.json"
    path.write_text("older")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgemoe.runtime.chat.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        chat.save(path)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        chat.save(tmp_path / "no" / "where.json")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [3]}',
        b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": "wolf", "content": ""}]}',
        b'{"messages": [{"role": "user", "content": 3}]}', b"[" * 100_000,
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
        b'{"messages": [{"role": "assistant", "content": "", "reasoning_content": 3}]}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_chat_changes_nothing(chat: Chat, tmp_path: Path, content: bytes) -> None:
    list(chat.say("Hello"))
    before = chat.messages
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"chat\.json: not a saved chat"):
        chat.load(path)
    assert chat.messages == before


def test_a_saved_chat_is_plain(chat: Chat, tmp_path: Path) -> None:
    list(chat.say("Grüße"))
    chat.save(tmp_path / "chat.json")
    text = (tmp_path / "chat.json").read_text(encoding="utf-8")
    assert "Grüße" in text
    assert json.loads(text) == {"messages": chat.messages}


def test_a_model_without_tokenizer_cannot_chat(
    engine: edgemoe.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "tokenizer", None)
    with pytest.raises(FormatError, match="no tokenizer"):
        engine.chat()


def test_saving_follows_a_link_and_leaves_what_is_no_file(chat: Chat, tmp_path: Path) -> None:
    list(chat.say("Hello"))
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    chat.save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    saved = (tmp_path / "real.json").read_bytes()
    assert json.loads(saved)["messages"] == chat.messages
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        chat.save(tmp_path / "pipe")
        assert os.read(reader, 1 << 16) == saved
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["nowhere/chat.json", "."])
def test_an_error_of_saving_names_the_file(chat: Chat, tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        chat.save(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["a", "\u00e4", "\u4e2d", "\U0001f600", "a" * 99 + "\U0001f600"], ids=ascii
)
@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_what_is_said_takes_no_more_than_was_lent(engine, chat, monkeypatch, tmp_path, text, size):
    path = tmp_path / "said.txt"
    path.write_text(text * (size // len(text.encode())) + "\n", encoding="utf-8")
    chat.instruct("short")
    list(chat.say("x"))  # what is made once
    chat.reset()
    tracemalloc.start()
    try:
        lent = []
        monkeypatch.setattr(engine, "lend", lambda size: lent.append((size, *traced())))
        with path.open("rb") as file:
            said = read_text(file, "said.txt", lend=engine.lend)
        with pytest.raises(TooLong):
            list(chat.say(said))
        engine.lend(0)
    finally:
        tracemalloc.stop()
    first = lent[0][1]
    for (size, _, _), (_, _, peak) in pairwise(lent[1:]):
        assert peak - first <= size + (64 << 10)


@pytest.mark.parametrize("text", ["a", "\u00e4", "\U0001f600", None], ids=ascii)
def test_a_saved_chat_takes_no_more_than_was_lent(engine, chat, monkeypatch, tmp_path, text):
    path = tmp_path / "saved.json"
    if text is None:  # what takes the most memory for its size
        path.write_text('{"messages": [' + "[[]]," * 50_000 + "[]]}")
    else:
        said = {"role": "user", "content": text * (200_000 // len(text.encode()))}
        path.write_text(json.dumps({"messages": [said] * 2}, ensure_ascii=False), "utf-8")
    tracemalloc.start()
    try:
        lent = []
        monkeypatch.setattr(engine, "lend", lambda size: lent.append((size, *traced())))
        with nullcontext() if text else pytest.raises(FormatError):
            chat.load(path)
        engine.lend(0)
    finally:
        tracemalloc.stop()
    first = lent[0][1]
    for (size, _, _), (_, _, peak) in pairwise(lent):
        assert peak - first <= size + (64 << 10)


def test_a_saved_chat_that_there_is_no_room_for_leaves_this_one(
    engine, chat, tmp_path, monkeypatch
):
    chat.instruct("short")
    path = tmp_path / "saved.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}))

    def lend(size):
        raise OutOfBudget("this takes more than --ram leaves")

    monkeypatch.setattr(engine, "lend", lend)
    with pytest.raises(OutOfBudget, match=f"^{path}: this takes"):
        chat.load(path)
    assert [m["content"] for m in chat.messages] == ["short"]


def traced():
    """Returns what is allocated, and its peak since the last call."""
    found = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    return found
