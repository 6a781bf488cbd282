"""The engine against transformers: the same logits and the same experts, for every family and setting."""

from __future__ import annotations

import families
import numpy as np
import pytest
import reference
from decoded import Decoded

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.experts import Observer


class Chosen(Observer):
    """Remembers which experts every layer's router chose."""

    def __init__(self) -> None:
        self.layers: dict[int, list[np.ndarray]] = {}

    def planned(self, routing, plan, residency) -> None:
        self.layers.setdefault(routing.layer, []).append(np.sort(routing.experts))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module", params=families.SETTINGS)
def compared(request, tmp_path_factory):
    """Per setting: cosine of the logits and equality of the experts at each position, and of the top token."""
    tmp = tmp_path_factory.mktemp("oracle")
    path = families.make(request.param, tmp / "source")
    convert(HFCheckpoint(path), tmp / "x.moe")
    decoded = Decoded(tmp / "x.moe")
    cos, same, clean, tops, own = [], [], [], [], []
    for seed in range(4):
        ids = families.random_ids(24, seed=seed)
        expected, expected_chosen = families.oracle(path, ids)
        seen = Chosen()
        with edgemoe.load(tmp / "x.moe", ram="1GiB", observer=seen) as engine:
            got = engine.logits(ids)
        equal = np.array(
            [
                (np.concatenate(seen.layers[i]) == np.sort(true)).all(-1)
                for i, true in enumerate(expected_chosen.values())
            ]
        )
        same.append(equal)
        # A token that took other experts changes those after it through attention.
        clean.append(np.logical_and.accumulate(equal.all(0)))
        cos.append(cosines(got, expected))
        tops.append(got.argmax(1) == expected.argmax(1))
        mine, _ = reference.logits(decoded.config, decoded.tensors, decoded.expert, ids)
        own.append(cosines(got, mine))
    return {
        "cos": np.concatenate(cos), "same": np.concatenate(same, 1), "clean": np.concatenate(clean),
        "tops": np.concatenate(tops), "own": np.concatenate(own),
    }  # fmt: skip


totals: dict[str, list[np.ndarray]] = {"same": [], "tops": []}


def test_eight_bits_are_nearly_the_checkpoint(compared):
    assert compared["clean"].sum() >= 16
    assert compared["cos"][compared["clean"]].min() > 0.999
    assert np.median(compared["own"]) > 0.9998  # the decoded weights, with float activations
    assert compared["same"].mean() > 0.95  # random routers have near ties
    assert compared["tops"].mean() > 0.9
    totals["same"].append(compared["same"].ravel())
    totals["tops"].append(compared["tops"])


def test_routing_and_top_tokens_agree_over_all_settings():
    assert len(totals["same"]) == len(families.SETTINGS)
    assert np.concatenate(totals["same"]).mean() > 0.98
    assert np.concatenate(totals["tops"]).mean() > 0.95
