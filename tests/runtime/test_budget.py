"""How memory sizes are parsed, and how a budget is divided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgemoe.errors import OutOfBudget
from edgemoe.file.reader import open_moe
from edgemoe.model import KvTypes, state_bytes
from edgemoe.ops import OpsShape
from edgemoe.runtime.budget import Budget, parse_size
from edgemoe.runtime.context import longest_context
from edgemoe.store import all_expert_bytes, dense_bytes, expert_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30), ("512MB", 512 << 20), ("1.5G", 3 << 29), (" 7 kib ", 7 << 10), ("12", 12),
        ("3B", 3), ("2TiB", 2 << 40), (".5K", 512), (4096, 4096), (np.int32(7), 7),
    ],
)  # fmt: skip
def test_a_size_is_read(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["１GiB", "12QiB", "", "GiB", "-1", "0", "1e400", "inf", "nan", "1_000", "4GiBB", "1 000", "4K\u212a",
     "\u212a", "1\u212aiB", 1.5, True, None, -3, 0, "9" * 400 + "TiB"],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_words(text) -> None:
    with pytest.raises(ValueError, match=r"^size: expected [^\n]*got "):
        parse_size(text)


def divided(moe, ram, **changes):
    """Returns the budget of a process that has taken 50 MiB already."""
    arguments = {
        "process": 50 << 20, "level": 5, "dense_level": 5, "context": 64, "kv_types": KvTypes(),
        "ops": OpsShape.of(moe.config, 2), **changes,
    }  # fmt: skip
    return Budget.divide(moe, ram=ram, **arguments)


def named(error):
    """Returns the bytes that an error names."""
    return int(str(error).split("works is ")[1].split(" MiB")[0]) << 20


def smallest(moe, **changes):
    """Returns the smallest budget that works, in bytes."""
    few, enough = 1, 1 << 30
    while enough - few > 1:
        middle = (few + enough) // 2
        try:
            divided(moe, middle, **changes)
        except OutOfBudget:
            few = middle
        else:
            enough = middle
    return enough


@pytest.mark.parametrize("sequences", [1, 3])
def test_everything_is_counted_once(tiny_moe, sequences) -> None:
    moe = open_moe(tiny_moe)
    ram = smallest(moe, sequences=sequences)
    b = divided(moe, ram, sequences=sequences)
    assert b.process == 50 << 20
    assert b.dense == dense_bytes(moe, 5)
    assert b.kv == sequences * state_bytes(moe.config, 64, KvTypes())
    assert b.tables >= ram / 512  # eight bytes for every page
    assert b.scratch > 0
    assert b.growth >= 8 << 20
    assert b.experts == all_expert_bytes(moe, 5)
    # There is room for one expert and no more: slots get all that is left.
    assert b.slots == b.expert == expert_bytes(moe, 5)
    assert ram == b.slots + b.process + b.growth + b.tables + b.dense + b.kv + b.scratch
    assert divided(moe, ram + 1000, sequences=sequences).slots in range(
        b.slots + 990, b.slots + 1001
    )


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_context_that_nobody_asked_for_takes_nothing_from_the_weights(
    tiny_moe, sequences
) -> None:
    moe = open_moe(tiny_moe)
    ram = smallest(moe, sequences=sequences) + (4 << 20)
    chosen = divided(moe, ram, sequences=sequences, context=None)
    asked = divided(moe, ram, sequences=sequences, context=chosen.context)
    assert chosen == asked
    assert chosen.dense == dense_bytes(moe, 5)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_longer_chunk_needs_longer_rings(tiny_moe, sequences) -> None:
    moe = open_moe(tiny_moe)
    mixer = replace(moe.config.mixers[0], window=700)
    moe = replace(moe, config=replace(moe.config, mixers=(mixer,)))
    changes = {"context": 8000, "sequences": sequences}
    ram = smallest(moe, **changes)
    chunks = set()
    for more in range(0, 24 << 20, 1 << 18):
        b = divided(moe, ram + more, **changes)
        assert b.slots >= b.expert
        assert b.kv == sequences * state_bytes(moe.config, 8000, KvTypes(), b.chunk)
        chunks.add(b.chunk)
    assert {16, 512} <= chunks


def test_a_context_is_as_long_as_there_is_room() -> None:
    def taken(n):
        return 100 + 3 * min(n, 500)  # a ring

    assert longest_context(256, 4096, 5000, taken) == 4096
    assert longest_context(256, 4096, 1599, taken) == 480
    assert longest_context(256, 4096, 1000, taken) == 288
    assert longest_context(256, 4096, 0, taken) == 256
    assert longest_context(256, 200, 0, taken) == 256
    assert longest_context(256, 257, 871, taken) == 257


def test_a_budget_that_is_too_small_says_which_is_not(tiny_moe) -> None:
    moe = open_moe(tiny_moe)
    ram = smallest(moe)
    with pytest.raises(OutOfBudget, match="is too small; the smallest that works is") as error:
        divided(moe, ram - 1)
    said = named(error.value)
    assert ram <= said <= ram + (3 << 20)
    divided(moe, said)


def test_the_smallest_budget_is_the_same_whatever_was_too_small(tiny_moe) -> None:
    moe, large = open_moe(tiny_moe), {"process": 8 << 30}  # whose page tables are 17 MiB
    said = []
    for ram in (1, 4 << 30, 8 << 30):
        with pytest.raises(OutOfBudget) as error:
            divided(moe, ram, **large)
        said.append(named(error.value))
    assert len(set(said)) == 1
    divided(moe, said[0], **large)
    other = error.value.beside(5 << 20, "something else", ram=7 << 20)
    assert str(other).startswith("a budget of 7 MiB is too small; ")
    assert str(other).endswith(" for one expert, 5 MiB for something else")
    assert named(other) == said[0] + (5 << 20)
    assert other.beside(1, "x", ram=1) is not other
    assert (bare := OutOfBudget("no more")).beside(1, "x", ram=1) is bare
