"""Measures of local routing consistency, as in "Not All Models Suit Expert Offloading" (arXiv 2505.16056).

Everything here takes the experts that each token was routed to, [T, L, K]: K experts in each of L layers, for T tokens
of one text in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RULES", "Rule", "SegmentCounts", "Srp", "entropy", "hit_rate", "merged", "segment_counts",
    "share_of_hottest", "shuffled", "srp", "srp_interval",
]  # fmt: skip

Ids = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]

Rule = Literal["lru", "lfu", "sch", "belady"]
RULES: tuple[Rule, ...] = ("lru", "lfu", "sch", "belady")

_LATER = 1 << 32  # above any time of use, so that times only break ties


@dataclass(frozen=True, slots=True)
class Srp:
    """Segment routing best performance: how well one on/off decision per window can replace the router's per token."""

    f1: float
    """SRP: the best F1 score over all thresholds; nan if no expert was ever active."""
    size: float
    """rho: how much the best segment router switches on, relative to what the real router does."""
    threshold: int
    """The best threshold: an expert is on in windows with at least this many uses of it."""


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """Counts of windows of `window` tokens, by how often they use each expert."""

    window: int
    counts: NDArray[np.int64]
    """[samples, L, E, window + 1]: how many windows of a sample use an expert 0 to `window` times."""


def segment_counts(
    experts: Ids, num_experts: int, *, window: int, sample: int = 512
) -> SegmentCounts:
    """Slides a window over samples of a text, one token at a time, and counts uses of experts.

    Args:
        experts: [T, L, K]
        window: m, in tokens.
        sample: tokens per sample, 512 in the paper; windows do not cross samples. A last, shorter sample counts if a
            window fits into it.

    Raises:
        ValueError: no window fits.
    """
    T, L, _ = experts.shape
    if not 1 <= window <= min(T, sample):
        raise ValueError(
            f"SRP: a window of {window} tokens does not fit {T} tokens in samples of {sample}"
        )
    out = []
    for start in range(0, T, sample):
        part = experts[start : start + sample]
        if len(part) < window:
            break
        uses = np.zeros((len(part) + 1, L, num_experts), np.int64)
        np.put_along_axis(uses[1:], part.astype(np.int64), 1, axis=2)
        total = uses.cumsum(axis=0)
        in_window = total[window:] - total[:-window]
        out.append(
            np.stack([(in_window == c).sum(axis=0) for c in range(window + 1)], axis=-1)
        )  # [L, E, window + 1]
    return SegmentCounts(window, np.array(out))


def _srp(histogram: Floats | NDArray[np.int64], window: int) -> Srp:
    """Returns the SRP for a histogram [window + 1] of windows by uses."""
    uses = np.arange(window + 1)
    match = (histogram * uses)[::-1].cumsum()[::-1][
        1:
    ]  # thresholds from 1: 0 only adds false alarms
    predicted = window * histogram[::-1].cumsum()[::-1][1:]
    active = match[0]
    if active == 0:
        return Srp(float("nan"), float("nan"), 0)
    f1 = 2 * match / (predicted + active)
    best = int(np.argmax(f1))
    return Srp(float(f1[best]), float(predicted[best] / active), best + 1)


def srp(counts: SegmentCounts, *, layer: int | None = None, expert: int | None = None) -> Srp:
    """Returns SRP(m) of an expert, of a layer or of the whole model, with one threshold for everything that it covers.

    Args:
        layer: None for the whole model.
        expert: of that layer; None for all experts of the layer.
    """
    h = counts.counts.sum(axis=0)
    if layer is None:
        h = h.sum(axis=(0, 1))
    elif expert is None:
        h = h[layer].sum(axis=0)
    else:
        h = h[layer, expert]
    return _srp(h, counts.window)


def srp_interval(
    counts: SegmentCounts, *, draws: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Returns the basic bootstrap interval of the model's SRP over samples: twice the value, less the quantiles.

    With one sample both ends are the value itself.
    """
    per_sample = counts.counts.sum(axis=(1, 2))  # [samples, window + 1]
    n = len(per_sample)
    rng = np.random.default_rng(seed)
    drawn = per_sample[rng.integers(0, n, (draws, n))].sum(axis=1)
    values = np.sort([_srp(h, counts.window).f1 for h in drawn])
    cut = round(draws * (1 - confidence) / 2)
    value = _srp(per_sample.sum(axis=0), counts.window).f1
    return float(2 * value - values[draws - 1 - cut]), float(2 * value - values[cut])


def merged(experts: Ids, num_experts: int) -> Ids:
    """Returns the same uses as [T, 1, L * K], those of a model whose layers share one pool of L * E experts."""
    T, L, K = experts.shape
    return (experts.astype(np.int64) + num_experts * np.arange(L)[:, None]).reshape(T, 1, L * K)


def shuffled(experts: Ids, *, seed: int = 0) -> Ids:
    """Returns the tokens in random order. What then remains of a hit rate comes from frequency, not locality."""
    return experts[np.random.default_rng(seed).permutation(len(experts))]


def hit_rate(experts: Ids, num_experts: int, slots: int, rule: Rule, *, window: int = 16) -> Floats:
    """Returns each layer's hit rate [L] with a cache of its own, into which every expert that a token needs is loaded.

    As in the paper and its code, an expert is a hit if it is cached when the token comes. The token's experts then
    enter one after the other, best first, each in place of the least valuable one in the cache. Misses of the cold
    start count as misses; the published code counts the first filling as hits. `merged` makes one pool of all layers.

    Args:
        experts: [T, L, K]
        slots: C, experts that fit each cache; the paper's rho is slots / K.
        rule: which expert is evicted. "lru": the least recently used. "lfu": the least often used so far. "sch",
            SCH(window): the least often used in the next `window` tokens. "belady": the one whose next use is farthest.
            Ties go to the least recently used.
        window: of "sch", in tokens.

    Raises:
        ValueError: there are fewer slots than a token needs.
    """
    T, L, K = experts.shape
    if slots < K:
        raise ValueError(f"hit rate: {slots} slots are fewer than the {K} experts of a token")
    hits = [
        _hits(experts[:, layer].tolist(), num_experts, slots, rule, window) for layer in range(L)
    ]
    return np.array(hits, np.float64) / float(T * K)


def _hits(tokens: list[list[int]], num_experts: int, slots: int, rule: Rule, window: int) -> int:
    worth = [0] * num_experts
    """Of every expert; the low digits are the time of its last use, which breaks ties as in the paper's code."""
    key = np.full(num_experts, np.inf)
    """The worth of experts in the cache; infinite for others, so that they are never the least."""
    here = [False] * num_experts
    free, hits, time = slots, 0, 0
    if rule == "sch":
        for e in (e for token in tokens[:window] for e in token):
            worth[e] += _LATER
    after = _next_uses(tokens, num_experts) if rule == "belady" else []
    for t, now in enumerate(tokens):
        hits += sum([here[e] for e in now])
        for k, e in enumerate(now):
            if not here[e]:
                if free:
                    free -= 1
                else:
                    out = int(key.argmin())
                    here[out] = False
                    key[out] = np.inf
                here[e] = True
            time += 1
            if rule == "lru":
                worth[e] = time
            elif rule == "lfu":
                worth[e] = (worth[e] // _LATER + 1) * _LATER + time
            elif rule == "sch":
                worth[e] = (worth[e] // _LATER - 1) * _LATER + time
            else:
                worth[e] = -after[t][k] * _LATER + time
            key[e] = worth[e]
        if rule == "sch":
            for e in tokens[t + window] if t + window < len(tokens) else ():
                worth[e] += _LATER
                if here[e]:
                    key[e] = worth[e]
    return hits


def _next_uses(tokens: list[list[int]], num_experts: int) -> list[list[int]]:
    """Returns, for each use, the token at which the same expert is used again; len(tokens) for never."""
    coming = [len(tokens)] * num_experts
    out = []
    for t in range(len(tokens) - 1, -1, -1):
        out.append([coming[e] for e in tokens[t]])
        for e in tokens[t]:
            coming[e] = t
    return out[::-1]


def entropy(counts: Ids | Floats) -> float:
    """Returns the entropy of uses, relative to that of uniform use: 1 if all experts are used equally.

    It is nan for fewer than two experts or without uses.
    """
    p = np.asarray(counts, np.float64)
    if len(p) < 2 or p.sum() == 0:
        return float("nan")
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(counts)))


def share_of_hottest(counts: Ids | Floats, shares: Sequence[float]) -> list[float]:
    """Returns the share of all uses that the most used experts take, for each of `shares` of the experts (0.1 for 10%).

    Each share counts at least one expert.
    """
    ranked = np.sort(np.asarray(counts, np.float64))[::-1]
    return [float(ranked[: max(1, round(s * len(ranked)))].sum() / ranked.sum()) for s in shares]
