"""Tasks with right and wrong answers: which choice a model finds likeliest, or whether it would write the answer.

As in EleutherAI's lm-evaluation-harness: nothing is sampled. A choice's likelihood is the sum over its tokens; an
answer is right where each of its tokens is the likeliest after those before it, which is what greedy decoding writes.
So both kinds are one evaluation of what is known, and a reference is compared with item by item.
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
    """Is one question. Either one of `choices` is right, or `answer` is what should be written."""

    task: str
    prompt: str
    answer: str
    """The text that is right; of a choice too."""
    choices: tuple[str, ...] = ()
    """Texts that may follow the prompt, `answer` among them; none where the answer is written."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Says how a model did at one item."""

    task: str
    is_right: bool
    logprob: float
    """Of the right answer's text after the prompt, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums up a task's items, ± standard errors over items; changes are from the reference's same items."""

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
    """Reads items, one JSON object a line: `prompt`, and `answer`, which is a text, or the number of one of `choices`.

    `task`, if there, is what the item is counted under; else the file's name.

    Raises:
        ValueError: a line is not such an object; names it.
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
    """Runs one trial and returns how each item went.

    Raises:
        ValueError: an item is longer than the model's context, or its answer has no tokens; and what `load` raises.
    """
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
    """Returns the tokens that prompt and text begin with whatever follows, and those that the text decides."""
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
    """Returns the log-likelihood of tokens after others, and whether each of them is the likeliest."""
    if before[:-1]:  # what several choices share is computed once
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
    """Returns a score for each task, in the order in which they come.

    Args:
        reference: of the same items; None for no changes.
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
