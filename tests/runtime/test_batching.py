"""Requests that run together have the replies that they have alone."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
from engines import with_slots
from test_sequences import Broken, broken, slots  # noqa: F401 (a fixture)

import edgemoe
from edgemoe.errors import DeviceError
from edgemoe.file.reader import open_moe
from edgemoe.runtime.batching import Batcher, QueueFull
from edgemoe.runtime.errands import Errands
from edgemoe.runtime.model import Model
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.runtime.prefix_store import PrefixStore
from edgemoe.runtime.requests import Request
from edgemoe.text.logprobs import log_softmax
from edgemoe.text.sampler import SamplingParams

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 250, n).tolist() for n in (3, 40, 17, 90, 1, 61, 25, 33)]
PARAMS = [
    SamplingParams(temperature=t, seed=i, max_tokens=n, ignore_eos=True, repeat_penalty=p)
    for i, (t, n, p) in enumerate(
        [(0, 12, 1), (1, 20, 1), (2, 7, 1.2), (0.8, 1, 1), (1, 16, 1), (0, 9, 1), (1, 0, 1), (1, 25, 1)]
    )
]  # fmt: skip


class Asked:
    """A request and its outcome."""

    def __init__(self, ids, params, *, most=None, **more):
        self.tokens, self.said, self.outcome = [], [], None
        self.most = most
        self.request = Request(ids=ids, params=params, take=self.take, end=self.end, **more)

    def take(self, token, said):
        assert self.outcome is None
        self.tokens.append(token)
        self.said.append(said)
        return len(self.tokens) != self.most

    def end(self, outcome):
        assert self.outcome is None
        self.outcome = outcome


def opened(path, sequences=3, **options):
    found = open_model(path, EngineOptions(sequences=sequences, **options))
    return Batcher(found.model, found.text.eos_ids), found.model


def run(batcher, *asked):
    for one in asked:
        batcher.submit(one.request)
    while batcher.step():
        pass
    assert not any(view.is_busy for view in batcher.views)
    return [one.tokens for one in asked]


@pytest.fixture(scope="module")
def alone(tiny_moe):
    """The replies that an engine alone gives to each prompt."""
    found = []
    for ids, params in zip(PROMPTS, PARAMS, strict=True):
        with edgemoe.load(tiny_moe) as engine:
            found.append((list(engine.generate(ids, params)), engine.stats.logits_hash))
    return found


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_every_reply_is_the_one_that_it_is_alone(tiny_moe, alone, monkeypatch, share, sequences):
    with_slots(monkeypatch, slots(tiny_moe, share), chunk=16)
    batcher, model = opened(tiny_moe, sequences)
    asked = [Asked(ids, params) for ids, params in zip(PROMPTS, PARAMS, strict=True)]
    run(batcher, *asked)
    for one, (tokens, logits_hash), params in zip(asked, alone, PARAMS, strict=True):
        assert one.tokens == tokens
        outcome = one.outcome
        assert outcome.reason == "length"
        assert outcome.error is None
        assert outcome.figures.new_tokens == params.max_tokens
        if params.max_tokens:  # an engine does not hash logits that it does not sample from
            assert outcome.figures.logits_hash == logits_hash
    assert max(one.outcome.figures.beside for one in asked) == min(sequences, 5) - 1
    model.store.cache.check_integrity()


def test_requests_may_come_at_any_time(tiny_moe, alone):
    batcher, _ = opened(tiny_moe)
    asked = [Asked(ids, params) for ids, params in zip(PROMPTS, PARAMS, strict=True)]
    for one in asked:
        batcher.submit(one.request)
        batcher.step()
        batcher.step()
    run(batcher)
    assert [one.tokens for one in asked] == [tokens for tokens, _ in alone]


def test_a_prefix_is_taken_from_the_sequence_that_shares_most_of_it(tiny_moe):
    batcher, _ = opened(tiny_moe, 2)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    talks = [PROMPTS[3], PROMPTS[5]]
    for turn in range(4):  # two users in turns
        for i, talk in enumerate(talks):
            one = Asked(talk, params)
            run(batcher, one)
            cached = one.outcome.figures.cached_tokens
            assert cached == (0 if turn == 0 else len(talk) - 4)
            talks[i] = [*talk, *one.tokens, 7, 8, 9]
    title = Asked([*talks[0][:5], 1, 2, 3], params)  # a question that shares a little
    run(batcher, title)
    both = [Asked(talk, params) for talk in talks]
    run(batcher, both[1])
    assert both[1].outcome.figures.cached_tokens == len(talks[1]) - 4


def test_the_same_prompt_again_is_computed_but_for_its_last_token(tiny_moe):
    batcher, _ = opened(tiny_moe, 2)
    one, two = (Asked(PROMPTS[1], PARAMS[1]) for _ in range(2))
    run(batcher, one)
    run(batcher, two)
    assert two.tokens == one.tokens
    assert two.outcome.figures.cached_tokens == len(PROMPTS[1]) - 1


def test_who_leaves_is_not_computed_for(tiny_moe, alone, monkeypatch):
    with_slots(monkeypatch, 1 << 20, chunk=16)
    batcher, _ = opened(tiny_moe, 2)
    stays, leaves, waits = (Asked(PROMPTS[i], PARAMS[i]) for i in (1, 3, 2))
    for one in (stays, leaves, waits):
        batcher.submit(one.request)
    for _ in range(4):
        batcher.step()
    leaves.request.is_cancelled = waits.request.is_cancelled = True
    run(batcher)
    assert stays.tokens == alone[1][0]
    assert [leaves.outcome.reason, waits.outcome.reason] == ["cancelled"] * 2
    assert leaves.tokens == waits.tokens == []
    again = Asked(PROMPTS[3], PARAMS[3])  # what it had computed is kept
    run(batcher, again)
    assert again.tokens == alone[3][0]
    assert again.outcome.figures.cached_tokens >= 15


def test_a_prompt_is_left_between_two_layers(tiny_moe, alone):
    batcher, model = opened(tiny_moe, 2)
    seen = []

    class Layers(edgemoe.experts.Observer):
        def planned(self, routing, plan, residency):
            seen.append(routing.layer)
            one.request.is_cancelled = True

    one = Asked(PROMPTS[3], PARAMS[3])
    model.experts.observer = Layers()
    run(batcher, one)
    assert seen == [0]
    assert one.outcome.reason == "cancelled"
    model.experts.observer = None
    two = Asked(PROMPTS[3], PARAMS[3])
    run(batcher, two)
    assert two.tokens == alone[3][0]


def test_only_who_needs_what_cannot_be_read_fails(broken, monkeypatch):  # noqa: F811
    moe = open_moe(broken)
    with_slots(monkeypatch, slots(broken, 0.25), chunk=16)
    with edgemoe.load(broken) as engine:
        expected = [list(engine.generate(ids, replace(PARAMS[1], seed=3))) for ids in PROMPTS[:3]]
    batcher, model = opened(broken, 3, options={"look_ahead": False})
    asked = [Asked(ids, replace(PARAMS[1], seed=3)) for ids in PROMPTS[:3]]
    for one in asked:
        batcher.submit(one.request)
    for _ in range(8):
        batcher.step()
    file = Broken(broken)
    file.cut(int(np.sort(moe.experts.offsets.reshape(8, -1)[7])[4]))
    for _ in range(40):
        batcher.step()
    file.mend()
    run(batcher)
    failed = [one for one in asked if one.outcome.reason == "error"]
    assert failed
    for one, tokens in zip(asked, expected, strict=True):
        if one in failed:
            assert isinstance(one.outcome.error, edgemoe.ReadError)
            assert one.tokens == tokens[: len(one.tokens)]
        else:
            assert one.tokens == tokens
    again = [Asked(ids, replace(PARAMS[1], seed=3)) for ids in PROMPTS[:3]]
    assert run(batcher, *again) == expected
    model.store.cache.check_integrity()


def test_log_probabilities_are_those_of_the_logits(tiny_moe):
    batcher, _ = opened(tiny_moe, 2)
    parts = []
    one = Asked(PROMPTS[3], PARAMS[1], top=3, prompt_logprobs=parts.append)
    beside = Asked(PROMPTS[1], PARAMS[0])
    run(batcher, beside, one)
    said = [*(x for part in parts for x in part), *one.said]
    ids = [*PROMPTS[3], *one.tokens]
    with edgemoe.load(tiny_moe) as engine:
        rows = log_softmax(engine.logits(ids))
    assert [x.token for x in said] == ids[1:]
    for row, x in zip(rows, said, strict=False):
        assert x.logprob == row[x.token]
        assert [i for i, _ in x.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert all(p == row[i] for i, p in x.top)


class Only:
    """A constraint that allows a single token at each step."""

    def __init__(self, tokens, size):
        self.tokens, self.size, self.at = tokens, size, 0

    def allowed(self):
        mask = np.zeros(-(-self.size // 32), np.uint32)
        token = self.tokens[self.at]
        mask[token // 32] |= np.uint32(1 << (token % 32))
        return mask.view(np.int32)

    def take(self, token):
        assert token == self.tokens[self.at]
        self.at += 1
        return self.at == len(self.tokens)


def test_a_constraint_decides_and_ends_a_reply(tiny_moe, alone):
    batcher, model = opened(tiny_moe, 2)
    wanted = [31, 32, 263, 0, 64]
    one = Asked(PROMPTS[0], PARAMS[1], constraint=Only(wanted, model.config.vocab_size))
    other = Asked(PROMPTS[1], PARAMS[1])
    run(batcher, one, other)
    assert one.tokens == wanted
    assert one.outcome.reason == "stop"
    assert other.tokens == alone[1][0]


def test_a_reply_ends_where_its_taker_says(tiny_moe, alone):
    batcher, _ = opened(tiny_moe, 2)
    one = Asked(PROMPTS[1], PARAMS[1], most=5)
    run(batcher, one)
    assert one.tokens == alone[1][0][:5]
    assert one.outcome.reason == "stop"


def test_what_a_taker_raises_is_its_own(tiny_moe, alone):
    batcher, _ = opened(tiny_moe, 2)
    one, other = Asked(PROMPTS[0], PARAMS[1]), Asked(PROMPTS[1], PARAMS[1])
    one.request.take = lambda *_: 1 / 0
    run(batcher, one, other)
    assert isinstance(one.outcome.error, ZeroDivisionError)
    assert other.tokens == alone[1][0]


def test_what_a_taker_of_scores_raises_is_its_own(tiny_moe, alone):
    batcher, _ = opened(tiny_moe, 2)
    one = Asked(PROMPTS[3], PARAMS[3], top=1, prompt_logprobs=lambda _: 1 / 0)
    other = Asked(PROMPTS[1], PARAMS[1])
    run(batcher, one, other)
    assert isinstance(one.outcome.error, ZeroDivisionError)
    assert one.tokens == []
    assert other.tokens == alone[1][0]


def test_wrong_requests_are_refused_and_change_nothing(tiny_moe):
    batcher, _ = opened(tiny_moe, 1)
    batcher._most_waiting = 1
    for ids, message in (
        ([], "at least one token"),
        ([264], "tokens from 0 to 263"),
        ([1] * 512, "fit"),
    ):
        with pytest.raises(ValueError, match=message):
            batcher.submit(Asked(ids, PARAMS[0]).request)
    first, second = (Asked(PROMPTS[0], PARAMS[0]) for _ in range(2))
    batcher.submit(first.request)
    with pytest.raises(QueueFull, match="1 requests wait"):
        batcher.submit(second.request)
    batcher.end(RuntimeError("over"))
    assert first.outcome.reason == "error"
    with pytest.raises(RuntimeError, match="has ended"):
        batcher.submit(second.request)


def test_who_is_given_a_sequence_is_told_what_fails_meanwhile(tiny_moe, tmp_path, monkeypatch):
    found = open_model(tiny_moe, EngineOptions(sequences=1))
    store = PrefixStore(tmp_path, found.model, most_bytes=1 << 20)
    batcher = Batcher(found.model, found.text.eos_ids, prefixes=store)
    one = Asked(PROMPTS[0], PARAMS[0])

    def fails(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(PrefixStore, "exchange", fails)
    batcher.submit(one.request)
    with pytest.raises(MemoryError, match="no room"):
        batcher.step()
    batcher.end(RuntimeError("over"))  # as the server's thread does
    assert one.outcome.reason == "error"


def test_logits_that_fail_end_the_replies_that_wait_for_them(tiny_moe, alone, monkeypatch):
    batcher, _ = opened(tiny_moe, 2)
    real, left = Model.logits, [DeviceError("broken")]

    def logits(self, *args):
        if left:
            raise left.pop()
        real(self, *args)

    monkeypatch.setattr(Model, "logits", logits)
    first, second = (Asked(PROMPTS[i], PARAMS[i]) for i in (0, 1))
    run(batcher, first)
    assert str(first.outcome.error) == "broken"
    run(batcher, second)
    assert second.tokens == alone[1][0]


def test_an_errand_that_ends_the_thread_leaves_nobody_waiting():
    errands = Errands(threading.Condition())

    def fails():
        raise RuntimeError("a fault of ours")

    first = errands.add(lambda: 1, when=lambda: True)
    second = errands.add(fails, when=lambda: True)
    third = errands.add(lambda: 3, when=lambda: True)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        errands.run()
    errands.end(RuntimeError("over"))
    assert first.result(0) == 1
    for one in (second, third):
        with pytest.raises(RuntimeError, match="the batcher has ended"):
            one.result(0)


def test_a_reply_ends_with_the_context(tiny_moe):
    batcher, _ = opened(tiny_moe, 2, context=64)
    one = Asked(PROMPTS[1], replace(PARAMS[0], max_tokens=1000))
    run(batcher, one)
    assert len(one.tokens) == 24
    assert one.outcome.reason == "length"


def test_many_threads_ask_and_nothing_is_left_behind(tiny_moe, alone):
    batcher, model = opened(tiny_moe, 4)
    asked = [
        (i, Asked(PROMPTS[i], PARAMS[i])) for _ in range(4) for i in range(len(PROMPTS))
    ]  # fmt: skip
    todo = iter(asked)
    lock = threading.Lock()

    def ask():
        while True:
            with lock:
                one = next(todo, None)
            if one is None:
                return
            batcher.submit(one[1].request)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads) or batcher.step():
        batcher.step()
    for i, one in asked:
        assert one.tokens == alone[i][0]
    assert len(model.room.states) == 4


def test_a_batcher_that_is_dropped_gives_its_sequences_back(tiny_moe):
    batcher, model = opened(tiny_moe, 4)
    run(batcher, Asked(PROMPTS[0], PARAMS[0]))
    del batcher
    gc.collect()
    assert len(model.room.states) == 0
