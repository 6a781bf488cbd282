"""The sampler equals a slow, obvious version of llama.cpp's chain."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import RangeError
from edgemoe.text.logprobs import token_logprobs
from edgemoe.text.sampler import Sampler, SamplingParams


def reference(
    logits: np.ndarray, history: Sequence[int], p: SamplingParams
) -> list[tuple[int, float]]:
    """Returns (token, probability) pairs after all filters in order, most likely first."""
    values = [float(v) for v in logits]
    recent = list(history) if p.repeat_last_n == -1 else list(history)[::-1][: p.repeat_last_n]
    for token, count in Counter(recent).items():
        v = values[token]
        v = v / p.repeat_penalty if v > 0 else v * p.repeat_penalty
        values[token] = v - count * p.frequency_penalty - p.presence_penalty
    tokens = sorted(range(len(values)), key=lambda i: (-values[i], i))
    tokens = tokens[: p.top_k or None]
    if p.temperature == 0:
        return [(tokens[0], 1.0)]
    top = values[tokens[0]]
    weights = [math.exp(values[t] - top) for t in tokens]
    if p.typical_p < 1:
        chances = [w / sum(weights) for w in weights]
        entropy = -sum(c * math.log(c) for c in chances if c > 0)
        order = sorted(
            range(len(tokens)),
            key=lambda i: abs(-math.log(chances[i]) - entropy) if chances[i] > 0 else math.inf,
        )
        typical, mass = [], 0.0
        for i in order:
            typical.append(i)
            mass += chances[i]
            if mass >= p.typical_p:
                break
        tokens = [tokens[i] for i in sorted(typical)]
        top = values[tokens[0]]
        weights = [math.exp(values[t] - top) for t in tokens]
    kept, mass = [], 0.0
    for token, weight in zip(tokens, weights, strict=True):
        kept.append(token)
        mass += weight
        if p.top_p < 1 and mass >= p.top_p * sum(weights):
            break
    if p.min_p > 0:
        kept = [t for t in kept if values[t] - top >= math.log(p.min_p)]
    weights = [math.exp((values[t] - top) / p.temperature) for t in kept]
    return [(t, w / sum(weights)) for t, w in zip(kept, weights, strict=True)]


def draw(logits: np.ndarray, history: Sequence[int], p: SamplingParams, at: float) -> int:
    """Samples with the random number `at`."""
    sampler = Sampler(p)
    sampler._random.random = lambda: at  # type: ignore[method-assign]
    return sampler.sample(logits, history)


def logits_of(size: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    # Not on a grid, so that rounding cannot make the two versions differ at a threshold.
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


@settings(deadline=None, max_examples=300)
@given(
    size=st.sampled_from([1, 2, 31, 128, 1000, 5000]),
    seed=st.integers(0, 1000),
    history=st.lists(st.integers(0, 30), max_size=30),
    temperature=st.sampled_from([0.0, 0.3, 0.8, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 900, 6000]),
    top_p=st.sampled_from([0.0, 0.3, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repeat_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    repeat_last_n=st.sampled_from([-1, 0, 3, 64]),
    presence=st.sampled_from([0.0, 0.7]),
    typical_p=st.sampled_from([1.0, 0.9, 0.2]),
    frequency=st.sampled_from([0.0, 0.4, -0.2]),
)
def test_it_equals_the_reference(
    size, seed, history, temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n,
    presence, frequency, typical_p,
) -> None:  # fmt: skip
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n,
        presence_penalty=presence, frequency_penalty=frequency, typical_p=typical_p,
    )  # fmt: skip
    logits = logits_of(size, seed)
    before = logits.copy()
    history = [t for t in history if t < size]
    expected = reference(logits, history, params)
    edge = 0.0
    for token, chance in expected[:5]:
        if chance > 1e-6:
            middle = edge + chance / 2
            # Without top_p or top_k tokens are not sorted, and a random number may then draw another token.
            if params.top_p < 1 or 0 < params.top_k < size:
                assert draw(logits, history, params, middle) == token
        edge += chance
    allowed = {t for t, _ in expected}
    assert {draw(logits, history, params, u) for u in (0.0, 0.21, 0.5, 0.83, 1 - 1e-12)} <= allowed
    assert (logits == before).all()


def test_without_filters_the_draws_follow_softmax() -> None:
    params = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0, seed=3)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(params)
    counts = Counter(sampler.sample(logits) for _ in range(20_000))
    for token, chance in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(counts[token] / 20_000 - chance) < 0.015


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([1, 5, 5, 2], dtype=np.float32)
    assert Sampler(SamplingParams(temperature=0)).sample(logits) == 1
    assert Sampler(SamplingParams(top_k=1)).sample(logits) == 1


def test_equals_at_the_edge_of_top_k_are_taken_by_id() -> None:
    params = SamplingParams(temperature=1, top_k=3, top_p=1, min_p=0)
    for size in (10, 5000):
        logits = np.zeros(size, dtype=np.float32)
        assert {draw(logits, [], params, u) for u in (0.1, 0.5, 0.9)} == {0, 1, 2}


def test_a_flat_nucleus_is_as_wide_as_it_must() -> None:
    params = SamplingParams(temperature=1, top_k=0, top_p=0.5, min_p=0)
    logits = np.zeros(40_000, dtype=np.float32)
    assert draw(logits, [], params, 1 - 1e-12) == 19_999
    assert draw(logits, [], params, 0.0) == 0


def test_extreme_values_do_no_harm() -> None:
    logits = logits_of(1000)
    best = int(logits.argmax())
    tiny = SamplingParams(temperature=5e-324, top_k=0, top_p=1, min_p=0)
    assert draw(logits, [], tiny, 0.999) == best
    equal = np.full(1001, 0.1, dtype=np.float32)
    assert draw(equal, [], SamplingParams(top_k=0, top_p=0.0), 0.999) == 0


def test_penalties_move_the_greedy_choice() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    greedy = SamplingParams(temperature=0)
    for change in ({"repeat_penalty": 1.2}, {"presence_penalty": 0.2}, {"frequency_penalty": 0.2}):
        params = dataclasses.replace(greedy, **change)
        assert Sampler(params).sample(logits, [0]) == 1
        assert Sampler(params).sample(logits, [0] + [2] * 64) == 0
        assert Sampler(dataclasses.replace(params, repeat_last_n=0)).sample(logits, [0]) == 0
        assert Sampler(dataclasses.replace(params, repeat_last_n=-1)).sample(
            logits, [0] + [2] * 64
        ) == 1  # fmt: skip


def test_a_seed_fixes_the_draws() -> None:
    logits = logits_of(1000, scale=1)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, temperature=2))
        return [sampler.sample(logits) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(-1) != draws(-1)
    # The numbers themselves may not change from one version to the next.
    assert draws(0)[:5] == [48, 164, 764, 259, 79]


@pytest.mark.parametrize("top_k", [40, 0])
def test_a_large_vocabulary_is_fast(top_k: int) -> None:
    logits = logits_of(150_000)
    sampler = Sampler(SamplingParams(top_k=top_k, seed=1))
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        sampler.sample(logits, [1, 2, 3])
        best = min(best, time.perf_counter() - start)
    assert best < (0.005 if top_k else 0.05)  # 0.2 and 1.5 ms where this was written


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": "warm"},
        {"temperature": True}, {"top_k": -1}, {"top_k": 2.0}, {"top_p": 1.1}, {"top_p": -0.1},
        {"min_p": 2}, {"repeat_penalty": 0}, {"repeat_penalty": math.inf}, {"repeat_last_n": -2},
        {"presence_penalty": math.nan}, {"frequency_penalty": None}, {"seed": -2}, {"seed": 1.5},
        {"max_tokens": -2}, {"stop": "text"}, {"repeat_penalty": 1e-39}, {"typical_p": 2},
        {"suppress_tokens": 3}, {"suppress_tokens": [1.5]}, {"bad_words_ids": [[]]}, {"bad_words_ids": [3]},
        {"no_repeat_ngram_size": -1}, {"begin_suppress_tokens": ["x"]}, {"stop": ("",)}, {"stop": [1]},
        {"ignore_eos": 1},
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_field(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=rf"^sampling: {name}: expected [^\n]{{1,200}}$"):
        SamplingParams(**change)


def test_numbers_and_lists_of_numpy_are_taken() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(7), top_p=1, stop=["a", "b"], seed=np.uint8(3),
        ignore_eos=np.bool_(True), suppress_tokens=np.arange(3), bad_words_ids=[[1, np.int32(2)]],
        min_p=np.array(0.25),
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, top_k=7, top_p=1.0, stop=("a", "b"), seed=3, ignore_eos=True,
        suppress_tokens=(0, 1, 2), bad_words_ids=((1, 2),), min_p=0.25,
    )  # fmt: skip
    kinds = {type(v) for v in dataclasses.asdict(params).values()}
    assert kinds == {float, int, bool, tuple}
    hash(params)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("seed", "other"), [(5, 7), (-1, -1)])
def test_a_choice_has_a_seed_of_its_own_and_shares_the_rest(seed: int, other: int) -> None:
    params = SamplingParams(seed=seed, stop=("x",), logit_bias=((3, 0.5),), suppress_tokens=(4,))
    made = params.of_choice(2)
    assert made == replace(params, seed=other, stop=())
    assert made.logit_bias is params.logit_bias
    assert (params.seed, params.stop) == (seed, ("x",))


def test_the_largest_penalties_keep_logits_finite() -> None:
    logits = logits_of(300, scale=30)
    for change in (
        {"repeat_penalty": 0.01}, {"repeat_penalty": 100}, {"presence_penalty": 1000},
        {"frequency_penalty": -1000},
    ):  # fmt: skip
        Sampler(SamplingParams(repeat_last_n=-1, **change)).sample(logits, list(range(300)) * 9)
    with pytest.raises(ValueError, match=r"repeat_penalty: expected 0\.01 to 100, got 1e-39"):
        SamplingParams(repeat_penalty=1e-39)


# --- tokens that are never sampled, compared with transformers' own processors


@settings(deadline=None, max_examples=200)
@given(
    history=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    words=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), max_size=3),
    suppressed=st.lists(st.integers(0, 7), max_size=3),
    begin=st.lists(st.integers(0, 7), max_size=3),
    size=st.integers(0, 4),
    prompt=st.integers(0, 20),
)
def test_what_is_never_taken_is_what_transformers_leaves_out(
    history, words, suppressed, begin, size, prompt
) -> None:
    import torch
    from transformers.generation import logits_process as theirs

    prompt = min(prompt, len(history))
    scores, ids = torch.zeros(1, 9), torch.tensor([history])
    if words:
        scores = theirs.NoBadWordsLogitsProcessor(words, eos_token_id=8)(ids, scores)
    if suppressed:
        scores = theirs.SuppressTokensLogitsProcessor(suppressed)(ids, scores)
    if begin:
        at = theirs.SuppressTokensAtBeginLogitsProcessor(begin, begin_index=prompt)
        scores = at(ids, scores)
    if size:
        scores = theirs.NoRepeatNGramLogitsProcessor(size)(ids, scores)
    params = SamplingParams(
        temperature=1, top_k=0, top_p=1, min_p=0, bad_words_ids=words, suppress_tokens=suppressed,
        begin_suppress_tokens=begin, no_repeat_ngram_size=size,
    )  # fmt: skip
    logits = np.zeros(9, dtype=np.float32)
    allowed = {i for i in range(9) if scores[0, i] == 0}
    assert 8 in allowed
    taken = set()
    for at in np.linspace(0, 1 - 1e-12, 4 * len(allowed)):
        again = Sampler(params)
        again._is_first = len(history) == prompt
        again._random.random = lambda at=at: float(at)
        taken.add(again.sample(logits, history))
    assert taken == allowed


def test_when_nothing_may_be_taken_it_says_so() -> None:
    params = SamplingParams(suppress_tokens=range(5))
    with pytest.raises(ValueError, match="no token is left that is not suppressed"):
        Sampler(params).sample(np.zeros(5, dtype=np.float32))


def test_broken_logits_are_the_models_error_and_a_wrong_shape_the_callers() -> None:
    sampler = Sampler(SamplingParams())
    for values in ([math.nan, 1], [1, math.inf], [-math.inf, -math.inf]):
        with pytest.raises(RangeError, match="not a finite number"):
            sampler.sample(np.array(values, dtype=np.float32))
    with pytest.raises(ValueError, match="expected logits"):
        sampler.sample(np.zeros((2, 2), dtype=np.float32))


def test_minus_infinity_is_never_drawn() -> None:
    logits = np.full(300, -np.inf, dtype=np.float32)
    logits[[7, 200]] = 1
    sampler = Sampler(SamplingParams(top_k=0, top_p=1, min_p=0, seed=5))
    assert {sampler.sample(logits) for _ in range(50)} == {7, 200}


def test_a_mask_and_biases_decide_what_may_come() -> None:
    logits = np.linspace(-1, 1, 70, dtype=np.float32)
    mask = np.zeros(3, np.int32)
    mask[[0, 2]] = 1 << 5, 1 << 1  # tokens 5 and 65
    for temperature in (0.0, 5.0):
        params = SamplingParams(temperature=temperature, top_k=0, top_p=1, min_p=0, seed=1)
        drawn = [Sampler(replace(params, seed=i)).sample(logits, allowed=mask) for i in range(40)]
        assert set(drawn) == ({65} if temperature == 0 else {5, 65})
        biased = replace(params, logit_bias={5: 50, 900: 50})
        assert Sampler(biased).sample(logits) == 5
        assert Sampler(replace(biased, suppress_tokens=(5,))).sample(logits, allowed=mask) == 65
    with pytest.raises(ValueError, match="no token is left"):
        Sampler(params).sample(logits, allowed=np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="a mask of 70 tokens, got 64"):
        Sampler(params).sample(logits, allowed=np.zeros(2, np.int32))
    assert logits[5] == np.linspace(-1, 1, 70, dtype=np.float32)[5]


def test_a_mask_of_all_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        logits = rng.normal(0, 3, 500).astype(np.float32)
        params = SamplingParams(seed=seed, typical_p=0.9)
        every = np.full(16, -1, np.int32)
        assert Sampler(params).sample(logits) == Sampler(params).sample(logits, allowed=every)


@pytest.mark.parametrize("bias", [5, [1], {"a": 1}, {1: "x"}, {1: math.nan}, [(1, 2, 3)], {-1: 2}])
def test_wrong_biases_are_refused(bias: object) -> None:
    with pytest.raises(ValueError, match="sampling: logit_bias"):
        SamplingParams(logit_bias=bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "logits", "history"),
    [
        ({"repeat_penalty": 2.0}, [-1.0, -1.5], [0]),  # a negative logit is multiplied
        ({"repeat_penalty": 2.0}, [2.0, 1.5], [0]),  # a positive one is divided
        ({"frequency_penalty": 0.4}, [1.0, 0.0], [0, 0, 0]),  # for each time
        ({"presence_penalty": 1.5}, [1.0, 0.0], [0]),
    ],
)
def test_penalties_move_what_came_before_down(params, logits, history):
    def best(history):
        sampler = Sampler(SamplingParams(temperature=0, **params))
        return sampler.sample(np.array(logits, np.float32), history)

    assert best([]) == 0
    assert best(history) == 1


def test_penalties_are_of_the_size_that_is_said():
    cases = (
        ({"frequency_penalty": 0.4}, [1.0, 0.0], [0, 0], 0),
        ({"presence_penalty": 0.7}, [1.0, 0.0], [0, 0, 0], 0),  # once
        ({"repeat_penalty": 1.4}, [-1.0, -1.5], [0], 0),
        ({"repeat_penalty": 1.2}, [2.0, 1.5], [0, 0, 0], 0),  # once
    )
    for params, logits, history, expected in cases:
        sampler = Sampler(SamplingParams(temperature=0, **params))
        assert sampler.sample(np.array(logits, np.float32), history) == expected, params


@pytest.mark.parametrize("top", [0, 1, 3, 5, 9])
def test_log_probabilities_come_likeliest_first(top: int) -> None:
    (found,) = token_logprobs(np.array([[1, 3, 0, 3, 2]], np.float32), [4], top)
    assert [i for i, _ in found.top] == [1, 3, 4, 0, 2][:top]
    assert sum(math.exp(p) for _, p in found.top) == pytest.approx(1, abs=1e-6) or top < 5
