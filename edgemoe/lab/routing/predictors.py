"""How well the next experts can be predicted, and how much of what is predicted would have arrived in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemoe.lab.routing.replay import Tape, replay, setting
from edgemoe.lab.routing.timing import Timing
from edgemoe.plan import Routing
from edgemoe.runtime.trace import NO_EXPERT, NO_TOKEN, Trace
from edgemoe.scheduler import OnDemand
from edgemoe.scheduler.paths import SECTION, PathPredictor

__all__ = ["Prediction", "predictions"]

Ids = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]

_PRIOR = 0.5  # a pseudocount, so that what was never seen is unlikely but not impossible


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How one predictor did on single tokens, when it guesses as many experts as a token uses."""

    name: str
    distance: int
    """Layers between the guess and its use; 0 for a guess that needs no layer of the same token."""
    when: str
    """When a guess of distance 0 can be made: "always", or once the "token" or the "token before" is known; else ""."""
    recall: float
    """The share of the experts used that were guessed."""
    useful: float
    """The share of the bytes read for its guesses that would have been used; nan if no guess was absent from memory."""
    in_time: float
    """The share of the bytes that had to be read that its guesses would have brought before they were wanted."""
    in_time_bytes: float
    """The bytes that its guesses would have brought in time, per token."""


def predictions(
    trace: Trace, timing: Timing | None, sections: Mapping[str, bytes] | None = None
) -> list[Prediction]:
    """Judges look-ahead by routers, tables and habit on the second half of a trace. Tables learn from the first half.

    Residency is that of reading on demand with the trace's own memory. A guess is made when layer l starts its experts.
    Its reads may use the disk from the end of that layer's own reads until the guessed layer is planned.

    Args:
        timing: the timing model of this machine; None leaves the fields about time at nan.
        sections: of the model's file. If there is a trained path predictor among them, and the trace has its tokens,
            the predictor is judged too.

    Raises:
        ValueError: the trace has fewer than 16 single tokens.
        FormatError: the path predictor is damaged, or belongs to another model.
    """
    header = trace.header
    experts = trace.by_token("experts", single=True).astype(np.int64)
    T, L, K = experts.shape
    if T < 16:
        raise ValueError(
            "predictors: expected a trace of at least 16 tokens computed one at a time"
        )
    half = T // 2
    uses = np.zeros((T, L, header.num_experts), bool)
    np.put_along_axis(uses, experts, True, axis=2)
    guesses: list[tuple[str, int | str, Ids]] = []
    if header.look_ahead:
        ahead = trace.by_token("ahead_experts", single=True).astype(np.int64)  # [T, L, p, K]
        for d in range(1, header.look_ahead + 1):
            guess: Ids = np.full((T, L, K), NO_EXPERT, np.int64)
            guess[:, d:] = ahead[:, : L - d, d - 1]
            guesses.append(("router ahead", d, guess))
    one, two = _transitions(uses, half)
    guesses.append(("transition table", 1, _best(one, K)))
    guesses.append(("two layers' table", 1, _best(two, K)))
    before = np.full((T, L, K), NO_EXPERT, np.int64)
    before[1:] = experts[:-1]
    guesses.append(("token before", "token before", before))
    counts = uses[:half].sum(axis=0).astype(np.float64)
    guesses.append(("frequency", "always", _best(np.broadcast_to(counts, uses.shape), K)))
    guesses += _trained(trace, (sections or {}).get(SECTION), K)
    absent, room = _room(trace, timing)
    out = []
    for name, ahead_of, guess in guesses:
        d, when = (0, ahead_of) if isinstance(ahead_of, str) else (ahead_of, "")
        test = slice(half, T)
        first = max(d, 1) if name != "two layers' table" else 2
        g, u, a = guess[test, first:], uses[test, first:], absent[test, first:]
        known = g != NO_EXPERT
        ids = np.where(known, g, 0)
        right = np.take_along_axis(u, ids, axis=2) & known
        missing = np.take_along_axis(a, ids, axis=2) & known
        recall = float(right.sum() / (known.any(axis=2).sum() * K)) if known.any() else float("nan")
        useful = float((right & missing).sum() / missing.sum()) if missing.any() else float("nan")
        if timing is None:
            in_time = arrived = float("nan")
        else:
            size = header.mean_bytes[-1]
            space = room[max(d, 1)][test, first:]
            fits = missing & (missing.cumsum(axis=2) * size <= space[..., None])
            brought = (fits & right).sum()
            wanted = (u & a).sum()
            in_time = float(brought / wanted) if wanted else float("nan")
            arrived = float(brought * size / (T - half))
        out.append(
            Prediction(
                name=name,
                distance=d,
                when=when,
                recall=recall,
                useful=useful,
                in_time=in_time,
                in_time_bytes=arrived,
            )
        )
    return out


def _trained(trace: Trace, section: bytes | None, K: int) -> list[tuple[str, str, Ids]]:
    """Returns a trained predictor's guesses when the token is known, and when only the token before it is known."""
    header, ids = trace.header, trace.by_token("id")[:, 0]
    if section is None or (ids == NO_TOKEN).any():
        return []
    predictor = PathPredictor.from_section(section, header.num_layers, header.num_experts)
    _, counts = trace.passes()
    is_single = np.repeat(counts == 1, counts)
    now, after = [], []
    starts = trace.by_token("token")[:, 0] == 0
    for i in range(len(ids)):
        if starts[i]:
            predictor.begin()
        if is_single[i]:
            after.append(predictor.next.copy())
        predictor.follow(ids[i : i + 1])
        if is_single[i]:
            now.append(predictor.now.copy())
    return [
        ("trained path", "token", _best(np.array(now), K)),
        ("trained path, token before", "token before", _best(np.array(after), K)),
    ]


def _best(scores: NDArray[Any], K: int) -> Ids:
    """Returns the indices of the K highest scores [T, L, E] in each layer, [T, L, K], best first."""
    best: Ids = np.argsort(-scores, axis=2, kind="stable")[:, :, :K]
    return best


def _transitions(uses: NDArray[np.bool_], half: int) -> tuple[Floats, Floats]:
    """Returns scores [T, L, E] of each expert, given the experts of the layer before and of the two layers before.

    The scores are log-probabilities up to a constant, learned from the first `half` tokens. They follow EdgeMoE's table
    (arXiv 2308.14352, 3.2). Its key, the experts of two layers, hardly ever repeats if a token uses many experts; so
    here each expert of the key contributes evidence of its own.
    """
    _, L, _ = uses.shape
    learn = uses[:half].astype(np.float64)
    everywhere = uses.astype(np.float64)
    one = np.zeros(uses.shape)
    two = np.zeros(uses.shape)
    for layer in range(L):
        base = (learn[:, layer].sum(axis=0) + _PRIOR) / (half + 2 * _PRIOR)
        one[:, layer] = two[:, layer] = np.log(base)
        for back in (1, 2):
            if layer < back:
                continue
            key = learn[:, layer - back]
            joint = key.T @ learn[:, layer]
            p = (joint + 2 * _PRIOR * base) / (key.sum(axis=0)[:, None] + 2 * _PRIOR)
            evidence = everywhere[:, layer - back] @ np.log(p / base)
            two[:, layer] += evidence
            if back == 1:
                one[:, layer] += evidence
    return one, two


def _room(trace: Trace, timing: Timing | None) -> tuple[NDArray[np.bool_], dict[int, Floats]]:
    """Returns which experts were absent when their layer was planned, [T, L, E] of single tokens, and the room for
    guesses: by distance d, the bytes [T, L] that could have been read since the layer d before it began."""
    header, tape = trace.header, Tape(trace)
    rows: list[NDArray[np.bool_]] = []

    def note(routing: Routing, residency: NDArray[np.int8]) -> None:
        if len(routing.experts) == 1:
            rows.append(residency[routing.layer] == 0)

    budget = max(header.slots_bytes, header.level_bytes[-1])
    scheduler = OnDemand(setting(header, budget), look_ahead=False)
    replay(tape, scheduler, budget_bytes=budget, each=note)
    absent = np.array(rows).reshape(-1, header.num_layers, header.num_experts)
    if timing is None:
        return absent, {}
    before = trace.by_token("before_us", single=True).astype(np.float64)
    experts = trace.by_token("experts_us", single=True).astype(np.float64)
    needed = np.take_along_axis(
        absent, trace.by_token("experts", single=True).astype(np.int64), axis=2
    ).sum(axis=2)
    spare = experts - needed * header.mean_bytes[-1] / timing.rate - timing.latency_us
    room: dict[int, Floats] = {}
    for d in range(1, max(header.look_ahead, 1) + 1):
        time_us = np.zeros(before.shape)
        for back in range(1, d + 1):
            time_us[:, d:] += (
                spare[:, d - back : -back] + before[:, d - back + 1 : before.shape[1] - back + 1]
            )
        room[d] = np.maximum(time_us, 0) * timing.rate
    return absent, room
