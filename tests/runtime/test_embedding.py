"""If only few bits of an embedding are resident, its rows are looked up at the file's highest level."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from corrected import RANKS, convert_corrected
from engines import GREEDY
from tiny import MemoryCheckpoint, tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe.convert.convert import convert
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe
from edgemoe.quant import SCHEMES
from edgemoe.store import dense_bytes, load_dense, looked_up_bytes

IDS = np.random.default_rng(2).integers(0, 256, 90).tolist()


def tied():
    """The tiny checkpoint with an embedding that is also the head."""
    of = tiny_checkpoint()
    tensors = {name: of.tensor(name) for name in of.shapes if name != "lm_head.weight"}
    return MemoryCheckpoint({**of.config, "tie_word_embeddings": True}, tensors, of.files)


@pytest.fixture(
    scope="module", params=["own head", "tied", "corrections", "tied corrections", "mwq"]
)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "x.moe"
    if request.param == "corrections":
        return convert_corrected(tiny_checkpoint(), path)
    if request.param == "tied corrections":
        ranks = {kind: of for kind, of in RANKS.items() if kind != "head"}
        return convert_corrected(tied(), path, ranks={**ranks, "embed": (16, 8, 8, 0, 24)})
    source = tiny_checkpoint() if request.param == "own head" else tied()
    convert(source, path, **({"scheme": SCHEMES["mwq"]} if request.param == "mwq" else {}))
    return path


def with_table(engine, level):
    """Makes an engine look rows up in a resident embedding at some level."""
    moe, decoder = engine.model.moe, engine.model.decoder
    table = load_dense(moe, len(moe.dense_ladder), verify=True)["embed"].first(level)
    decoder._stacks = [dataclasses.replace(stack, embed=table) for stack in decoder._stacks]


def logits(path, table=None, **options):
    with edgemoe.load(path, **options) as engine:
        if table is not None:
            with_table(engine, table)
        return engine.logits(IDS).view(np.uint32), list(engine.generate(IDS[:9], GREEDY))


@pytest.mark.parametrize("level", [1, 2])
def test_rows_are_those_of_the_highest_level(model, level):
    ladder = open_moe(model).dense_ladder
    chosen = {"bits": ladder[level - 1], "dense_bits": ladder[level - 1]}
    found, said = logits(model, **chosen)
    wanted, told = logits(model, len(ladder), **chosen)
    assert np.array_equal(found, wanted)
    assert said == told
    for other in (logits(model, level, **chosen), logits(model, bits=chosen["bits"])):
        # Neither rows at the level itself nor all dense weights at the highest level give the same.
        assert not np.array_equal(found, other[0])
    assert np.array_equal(found, logits(model, verify=False, threads=1, **chosen)[0])


def test_only_what_is_computed_with_is_resident(model):
    moe = open_moe(model)
    for level in range(1, len(moe.dense_ladder) + 1):
        weights = load_dense(moe, level, verify=True)
        resident = [w for w in weights.values() if isinstance(w, _core.Nested | _core.StoredRows)]
        page = _core.system_page()
        floats = [t for t in moe.tensors.values() if t.spec.kind == "f32"]
        rest = sum(-(-t.lengths[0] // page) * page for t in floats)
        rest += 0 if moe.bases is None else moe.bases.nbytes
        assert dense_bytes(moe, level) == sum(w.bytes for w in resident) + rest
        is_whole = level == len(moe.dense_ladder)
        assert ("embed.rows" in weights) != is_whole
        assert ("embed" in weights) == (is_whole or moe.config.tied)
        if not is_whole:
            assert looked_up_bytes(moe, level) == weights["embed.rows"].bytes
        with edgemoe.load(model, dense_bits=moe.dense_ladder[level - 1]) as engine:
            assert engine.budget.dense == dense_bytes(moe, level)
            active = dense_bytes(moe, level) - looked_up_bytes(moe, level)
            assert engine.budget.active_dense == active


@pytest.mark.parametrize("level", [1, 2])
def test_all_has_been_read_when_that_is_told(model, level):
    """The rungs that rows are looked up in are read once, after everything else."""
    moe, shares = open_moe(model), []
    load_dense(moe, level, verify=True, told=shares.append)
    missing = sum(moe.tensors["embed"].lengths[level if moe.config.tied else 0 :])
    there = sum(t.size(level) for n, t in moe.tensors.items() if n != "embed" or moe.config.tied)
    assert shares == sorted(shares)
    assert shares[-2:] == [there / (there + missing), 1]
    load_dense(moe, level, verify=False, told=shares.append)
    assert shares[-2:] == [1, 1]  # only their scales and corrections are read


def test_a_block_that_is_damaged_later_leaves_the_sequence_as_it_was(model, tmp_path):
    path = tmp_path / "x.moe"
    path.write_bytes(model.read_bytes())
    moe = open_moe(path)
    t, level = moe.tensors["embed"], 2
    chosen = {"bits": moe.dense_ladder[level - 1], "dense_bits": moe.dense_ladder[level - 1]}
    with edgemoe.load(model, **chosen) as engine:
        engine.logits([1, 2, 3])
        wanted = [engine.extend([token]).copy() for token in (4, 200, 5)]
    at = t.offset + sum(t.lengths) - t.lengths[-1]
    with edgemoe.load(path, **chosen) as engine, path.open("r+b") as f:
        engine.logits([1, 2, 3])
        found = [engine.extend([4]).copy()]
        f.seek(at)
        content = f.read(t.lengths[-1])
        f.seek(at)
        f.write(bytes(b ^ 1 for b in content))
        f.flush()
        with pytest.raises(
            FormatError, match=r"x.moe: checksum of tensor embed, rung \d, rows 192 to 207 at"
        ):
            engine.extend([200])
        f.seek(at)
        f.write(content)
        f.flush()
        found += [engine.extend([token]).copy() for token in (200, 5)]
    assert np.array_equal(found, wanted)


def test_rungs_that_are_not_resident_are_verified_too(model, tmp_path):
    path, moe = tmp_path / "x.moe", open_moe(model)
    t, content = moe.tensors["embed"], bytearray(model.read_bytes())
    content[t.offset + sum(t.lengths) - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"x.moe: checksum of tensor embed, rung \d, is"):
        edgemoe.load(path, dense_bits=moe.dense_ladder[0])
    edgemoe.load(path, dense_bits=moe.dense_ladder[0], verify=False).close()
