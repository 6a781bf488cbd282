"""Measures of local routing consistency, as in "Not All Models Suit Expert Offloading" (arXiv 2505.16056).

Everything here takes the experts that each token was routed to, [T, L, K], T tokens of one text in their order.
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

_LATER = 1 << 32  # above any time of use, so that it breaks ties only


@dataclass(frozen=True, slots=True)
class Srp:
    """Says how well one on/off decision per window can stand for the router's per token."""

    f1: float
    """SRP: the best F1 over all thresholds; nan where nothing was ever active."""
    size: float
    """rho: what the best segment router switches on, relative to what the real router does."""
    threshold: int
    """Of the best one: on in windows with at least as many uses."""


@dataclass(frozen=True, slots=True)
class SegmentCounts:
    """Counts windows of `window` tokens by how often they use an expert."""

    window: int
    counts: NDArray[np.int64]
    """[samples, L, E, window + 1]: windows of that sample in which that expert was active so many times."""


def segment_counts(
    experts: Ids, num_experts: int, *, window: int, sample: int = 512
) -> SegmentCounts:
    """Slides a window over samples of a text, one token at a time.

    Args:
        experts: [T, L, K]
        window: m, in tokens.
        sample: tokens per sample, the paper's 512; a window lies within one. A last, shorter one counts if a
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
    """`histogram` [window + 1] counts windows by uses."""
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
    """Returns SRP(m) of an expert, of a layer, or of the whole model, with one threshold for all it covers.

    Args:
        layer: None for the model.
        expert: of that layer; None for all of them.
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
    """Returns the bootstrap interval of the model's SRP over samples: the basic one, twice the value less quantiles.

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
    """Returns the same uses [T, 1, L * K] of a model whose layers share one pool of L * E experts."""
    T, L, K = experts.shape
    return (experts.astype(np.int64) + num_experts * np.arange(L)[:, None]).reshape(T, 1, L * K)


def shuffled(experts: Ids, *, seed: int = 0) -> Ids:
    """Returns the tokens in random order: what then remains of a hit rate is frequency, not locality."""
    return experts[np.random.default_rng(seed).permutation(len(experts))]


def hit_rate(experts: Ids, num_experts: int, slots: int, rule: Rule, *, window: int = 16) -> Floats:
    """Returns each layer's hit rate [L] with a cache of its own, where every expert that a token needs is loaded.

    As in the paper and its code: a hit is what is there when the token comes; the token's experts then enter one
    after the other, best first, each in place of the least worthy other. The cold start counts. (The published code
    takes the first filling for hits.) `merged` makes one pool of all layers.

    Args:
        experts: [T, L, K]
        slots: C; the paper's rho is slots / K.
        rule: who goes: "lru", the least recently used; "lfu", the least often used so far; "sch", SCH(window), the
            least often used in the next `window` tokens; "belady", the one whose next use is farthest. The least
            recently used of equals.

    Raises:
        ValueError: fewer slots than a token needs.
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
    """Of every expert; the time of its last use in the lower digits breaks ties, as in the paper's code."""
    key = np.full(num_experts, np.inf)
    """The same of those in the cache; absent ones never are the least."""
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
    """Returns the token at which each use's expert is used again, len(tokens) for never."""
    coming = [len(tokens)] * num_experts
    out = []
    for t in range(len(tokens) - 1, -1, -1):
        out.append([coming[e] for e in tokens[t]])
        for e in tokens[t]:
            coming[e] = t
    return out[::-1]


def entropy(counts: Ids | Floats) -> float:
    """Returns the entropy of uses, as a share of that of equal use: 1 when all experts are used alike."""
    p = np.asarray(counts, np.float64)
    if len(p) < 2 or p.sum() == 0:
        return float("nan")
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum() / np.log(len(counts)))


def share_of_hottest(counts: Ids | Floats, shares: Sequence[float]) -> list[float]:
    """Returns which share of all uses the hottest 10%, say, of the experts take; at least one expert each."""
    ranked = np.sort(np.asarray(counts, np.float64))[::-1]
    return [float(ranked[: max(1, round(s * len(ranked)))].sum() / ranked.sum()) for s in shares]
