"""Tasks with right and wrong answers: which choice a model finds likeliest, or whether it would write the answer.

As in EleutherAI's lm-evaluation-harness, nothing is sampled. A choice's log-likelihood is the sum over its tokens. A
written answer is right if each of its tokens is the likeliest after those before it, as greedy decoding would write it.
So both kinds need only an evaluation of known tokens, and a reference can be compared item by item.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.errors import quoted
from edgemoe.lab.quality.quality import Trial, first_token
from edgemoe.runtime.engine import Engine
from edgemoe.text.logprobs import log_softmax
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.tokenizer import Tokenizer

__all__ = ["Item", "Outcome", "Score", "judge", "read_items", "scores"]

Progress = Callable[[int, int], None]

_LARGEST = 64 << 20  # bytes of a file of items


@dataclass(frozen=True, slots=True)
class Item:
    """One question. Either one of `choices` is right, or `answer` should be written."""

    task: str
    """What the item is counted under."""
    prompt: str
    answer: str
    """The right text, to be written or chosen."""
    choices: tuple[str, ...] = ()
    """Texts that may follow the prompt, including `answer`; empty if the answer is to be written."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a model did on one item."""

    task: str
    is_right: bool
    logprob: float
    """The log-likelihood of the right answer's text after the prompt, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Mean results of a task with standard errors over items. Changes are from the reference, on the same items."""

    task: str
    items: int
    right: float
    right_error: float
    right_change: float | None = None
    right_change_error: float | None = None
    logprob: float
    logprob_change: float | None = None
    logprob_change_error: float | None = None


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Reads items from a file with one JSON object per line.

    An object has `prompt` and `answer`. The answer is a text or, if there are `choices`, one of them or its index from
    0. `task`, if present, is what the item is counted under; otherwise that is the file's name without its ending.

    Raises:
        ValueError: a line is not such an object (the message names it), or the file is empty or too large.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path}: expected at most {_LARGEST >> 20} MiB")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                items.append(_item(json.loads(line), path.stem))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not items:
        raise ValueError(f"{path}: expected items, one a line; got none")
    return items


def _item(value: Any, name: str) -> Item:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {quoted(str(value))}")
    prompt, answer, task = value.get("prompt"), value.get("answer"), value.get("task", name)
    choices = value.get("choices")
    if not isinstance(prompt, str) or not prompt or not isinstance(task, str):
        raise ValueError("prompt: expected a text")
    if choices is None:
        if not isinstance(answer, str) or not answer:
            raise ValueError("answer: expected a text, or choices")
        return Item(task, prompt, answer)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices: expected a list of texts")
    if len(choices) < 2 or len(set(choices)) != len(choices):
        raise ValueError("choices: expected at least two, all different")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer: expected a number from 0 to {len(choices) - 1}, or one of them")
    return Item(task, prompt, choices[answer], tuple(choices))


def judge(
    path: str | os.PathLike[str],
    trial: Trial,
    items: Sequence[Item],
    tokenizer: Tokenizer,
    *,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Runs one trial and returns the outcome of each item.

    Args:
        path: a `.moe` file.
        tokenizer: of this model.
        progress: called with the items done and all items.

    Raises:
        ValueError: there are no items, one is longer than the model's context, or its answer has no tokens; and what
            `load` raises.
    """
    if not items:
        raise ValueError("items: expected at least 1, got none")
    tokens = [
        [_split(tokenizer, item, text) for text in item.choices or (item.answer,)] for item in items
    ]
    longest = max(len(before) + len(after) for each in tokens for before, after in each)
    outcomes = []
    with Engine(path, replace(trial, context=longest)) as engine:
        for item, each in zip(items, tokens, strict=True):
            found = [_logprob(engine, before, after, decode=trial.decode) for before, after in each]
            if item.choices:
                sums = [total for total, _ in found]
                at = item.choices.index(item.answer)
                outcomes.append(Outcome(item.task, int(np.argmax(sums)) == at, sums[at]))
            else:
                ((total, is_greedy),) = found
                outcomes.append(Outcome(item.task, is_greedy, total))
            if progress is not None:
                progress(len(outcomes), len(items))
    return outcomes


def _split(tokenizer: Tokenizer, item: Item, text: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of prompt and text in two parts: those shared with the prompt alone, and the rest.

    Raises:
        ValueError: one of the two parts is empty.
    """
    first = first_token(tokenizer)
    start = [] if first is None else [first]
    before, whole = (
        start + tokenizer.encode(t, add_special=False) for t in (item.prompt, item.prompt + text)
    )
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    if shared == len(whole) or shared == 0:
        raise ValueError(f"{item.task}: expected tokens before and in {quoted(text)}, got none")
    return whole[:shared], whole[shared:]


def _logprob(
    engine: Engine, before: list[int], after: list[int], *, decode: bool
) -> tuple[float, bool]:
    """Returns the log-likelihood, in nats, of the tokens `after` given `before`, and whether each is the likeliest."""
    if before[:-1]:  # the prompt, which several choices share, is computed only once
        for _ in engine.generate(before[:-1], SamplingParams(max_tokens=0)):
            pass
        fed = [before[-1], *after[:-1]]
        step = 1 if decode else len(fed)
        rows = [engine.extend(fed[i : i + step], last_only=False) for i in range(0, len(fed), step)]
        logits = np.concatenate(rows)
    else:
        logits = engine.logits([*before, *after[:-1]])
    mine = log_softmax(logits)[np.arange(len(after)), after]
    return float(mine.sum()), bool((logits.argmax(axis=1) == after).all())


def scores(outcomes: Sequence[Outcome], reference: Sequence[Outcome] | None) -> list[Score]:
    """Returns a score for each task, in the order of their first items.

    Args:
        reference: the outcomes of a reference on the same items; None for no changes.
    """
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    found = []
    for task in tasks:
        at = [i for i, outcome in enumerate(outcomes) if outcome.task == task]
        right, logprobs = _columns([outcomes[i] for i in at])
        score = Score(
            task=task, items=len(at), right=float(right.mean()), right_error=_error(right),
            logprob=float(logprobs.mean()),
        )  # fmt: skip
        if reference is not None:
            was_right, was = _columns([reference[i] for i in at])
            score = replace(
                score,
                right_change=float((right - was_right).mean()),
                right_change_error=_error(right - was_right),
                logprob_change=float((logprobs - was).mean()),
                logprob_change_error=_error(logprobs - was),
            )
        found.append(score)
    return found


def _columns(outcomes: Sequence[Outcome]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    right = np.array([outcome.is_right for outcome in outcomes], np.float64)
    return right, np.array([outcome.logprob for outcome in outcomes], np.float64)


def _error(values: NDArray[np.float64]) -> float:
    """Returns the standard error of a mean."""
    return float(values.std() / np.sqrt(len(values)))
