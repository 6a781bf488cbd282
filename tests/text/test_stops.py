"""Stop texts end a reply whatever tokens they consist of, and no part of them is shown."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, tokenizer_files

from edgemoe.text.stops import ReplyText, StopFilter
from edgemoe.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_files(tokenizer_files())  # a token for each byte, and three special ones


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_the_filter_equals_a_search_of_the_whole_text(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    watch = StopFilter(stops)
    shown = ""
    for start, end in itertools.pairwise(edges):
        shown += watch.push(text[start:end])
        assert text.startswith(shown)
        assert not any(s in shown for s in stops)
        # No more is held back than the longest stop text could need.
        assert watch.is_stopped or end - len(shown) < max(map(len, stops), default=1)
    assert watch.is_stopped == any(s in text for s in stops)
    if watch.is_stopped:
        assert any(text.startswith(s, len(shown)) for s in stops)
        assert watch.push("more") + watch.flush() == ""
    else:
        assert shown + watch.flush() == text


PIECES = st.sampled_from(["a", "b", " ", "é", "日", "<", "|", "im", *SPECIAL])


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(PIECES, max_size=24),
    stops=st.lists(st.lists(PIECES, min_size=1, max_size=3).map("".join), max_size=3),
)
def test_stop_texts_are_found_in_all_text_and_shown_in_none(
    pieces: list[str], stops: list[str]
) -> None:
    tokens = [t for piece in pieces for t in TOKENIZER.encode(piece, add_special=False)]
    every = [(char, TOKENIZER.special_text(t) == "") for t, text in texts(tokens) for char in text]
    whole = "".join(char for char, _ in every)
    assert whole == TOKENIZER.decode(tokens, skip_special=False)
    ends = [(at + len(s), at) for s in stops if (at := whole.find(s)) >= 0]
    reply = ReplyText(TOKENIZER, stops, continues=True)
    shown = ""
    for token in tokens:
        shown += reply.push(token)
    shown += reply.flush()
    assert reply.is_stopped == bool(ends)
    expected = every[: min(ends)[1]] if ends else every
    assert shown == "".join(char for char, is_shown in expected if is_shown)


def texts(tokens: list[int]) -> list[tuple[int, str]]:
    """Returns tokens and the text that each completes."""
    out, stream = [], TOKENIZER.stream(skip_special=False, continues=True)
    for token in tokens:
        out.append((token, stream.push(token)))
    return out


def test_a_special_token_written_as_plain_text_stops_too() -> None:
    reply = ReplyText(TOKENIZER, ["<|im_end|>"], continues=True)
    tokens = [t for char in "no <|im_end|> more" for t in TOKENIZER.encode(char)]
    assert len(tokens) > 10
    assert "".join(map(reply.push, tokens)) + reply.flush() == "no "
    assert reply.is_stopped
