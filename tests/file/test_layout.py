"""The layout of a file follows from the model alone, and its index reads back as planned."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
from tiny import tiny_checkpoint

from edgemoe import _core
from edgemoe.config import dense_tensors
from edgemoe.convert.source import SourceModel
from edgemoe.file.format import ALIGNMENT, PREAMBLE
from edgemoe.file.layout import Layout, Place, expert_ladder
from edgemoe.quant import SCHEMES

NESTED, MWQ = SCHEMES["nested"], SCHEMES["mwq"]
LADDER = (2, 3, 4, 6, 8)


@pytest.fixture(scope="module")
def config():
    return SourceModel(tiny_checkpoint(layers=2, experts=3)).config


def layout(config, rungs=None, ladder=LADDER, scheme=NESTED):
    experts = tuple(expert_ladder(scheme, ladder, None))
    return Layout(config, scheme, ladder, experts, rungs or (len(ladder),) * 6)


def test_records_follow_each_other_at_multiples_of_the_alignment(config):
    found = layout(config, rungs=(1, 5, 2, 5, 5, 3))
    assert list(found.places) == [*dense_tensors(config), *found.expert_names()]
    assert found.expert_names() == [f"experts.{layer}.{i}" for layer in (0, 1) for i in range(3)]
    at = ALIGNMENT
    for place in found.places.values():
        assert place.offset == at
        assert place.padded_bytes % ALIGNMENT == 0
        assert 0 <= place.padded_bytes - sum(place.sizes) < ALIGNMENT
        at += place.padded_bytes
    assert found.tail == at
    assert [len(found.places[n].sizes) for n in found.expert_names()] == [1, 5, 2, 5, 5, 3]


def test_the_sizes_are_those_of_the_specification(config):
    places = layout(config, scheme=SCHEMES["nested"].fitted()).places
    assert places["norm"] == Place(places["norm"].offset, (4 * 96,))
    # [264, 96]: 17 blocks of rows, 2 of columns; a plane of one bit takes 128 bytes a tile, scales 64, and each row 2
    # for 2 bits and 2 for the rest.
    tiles = 17 * 2
    assert places["embed"].sizes == (
        tiles * (256 + 64) + 9 * 64, tiles * 128 + 9 * 64, tiles * 128, tiles * 256, tiles * 256,
    )  # fmt: skip
    assert layout(config).places["embed"].sizes[1] == tiles * 128
    assert layout(config, ladder=(2, 3, 4), scheme=MWQ).places["norm"].sizes == (4 * 96,)


def test_the_ending_says_where_all_is(config):
    found = layout(config, rungs=(1, 5, 2, 5, 5, 3))
    sums = {name: [7 + i for i in range(len(p.sizes))] for name, p in found.places.items()}
    sections = {"a": b"x" * 5000, "b": b"y"}
    ending = found.ending(sums, sections, {"name": "n"})
    (at_a, a), (at_b, b), (at_table, table), (at_index, raw) = ending.pieces
    assert (at_a, a, b) == (found.tail, sections["a"], sections["b"])
    assert (at_b, at_table) == (found.tail + 8192, found.tail + 12288)
    assert ending.file_bytes == at_index + len(raw)
    assert found.total_bytes(sections) == at_index
    index = json.loads(raw)
    assert index["sections"] == {
        "a": [at_a, 5000, _core.crc32c(a)], "b": [at_b, 1, _core.crc32c(b)],
        "experts": [at_table, len(table), _core.crc32c(table)],
    }  # fmt: skip
    norm = found.places["norm"]
    assert index["tensors"]["norm"] == ["f32", [96], norm.offset, [[384, 7]]]
    # The third expert has two of five rungs; the other three are empty, and have no checksum.
    place = found.places["experts.0.2"]
    row = struct.unpack_from("<Q10I", table, 2 * 48)
    end = sum(place.sizes)
    assert row == (place.offset, place.sizes[0], 7, end, 8, end, 0, end, 0, end, 0)
    *_, file_bytes, offset, length, crc = PREAMBLE.unpack(ending.preamble)
    assert (file_bytes, offset, length) == (ending.file_bytes, at_index, len(raw))
    assert crc == _core.crc32c(raw)


def test_bits_of_w_down_must_climb():
    assert expert_ladder(NESTED, (2, 4), (3, 5)) == [(2, 2, 3), (4, 4, 5)]
    for down in ((3,), (3, 3), (4, 3), (3, 9)):
        with pytest.raises(ValueError, match="down bits: expected 2 that climb"):
            expert_ladder(NESTED, (2, 4), down)


def test_no_weights_are_needed(config):
    """Planning is arithmetic: for a model of 46 GB it takes as long as for one of 500 kB with as many tensors."""
    large = dataclasses.replace(
        config, hidden_size=1 << 14, expert_hidden=1 << 15, vocab_size=1 << 20
    )
    found = layout(large)
    assert found.tail > 46 * 10**9
    assert np.all(np.diff([p.offset for p in found.places.values()]) > 0)
