"""Options are defined once, checked when they are made, and accept numbers of any library."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import pytest

import edgemoe
from edgemoe.cli.engine import engine_flags
from edgemoe.runtime.options import EngineOptions


def test_numpys_numbers_become_pythons():
    options = EngineOptions(
        ram=np.int64(1 << 30), bits=np.int8(4), dense_bits=np.uint8(8), experts=np.int16(2),
        context=np.int32(64), threads=np.int64(2), verify=np.bool_(False),
    )  # fmt: skip
    plain = EngineOptions(
        ram="1GiB", bits=4, dense_bits=8, experts=2, context=64, threads=2, verify=False
    )
    assert options == plain
    given = (options.ram, options.bits, options.dense_bits, options.experts, options.context)
    assert {type(value) for value in (*given, options.threads)} == {int}
    assert type(options.verify) is bool


@pytest.mark.parametrize("name", ["bits", "dense_bits", "experts", "context", "threads"])
@pytest.mark.parametrize("value", [2.0, np.float32(2), "2", True, [2]])
def test_what_is_no_whole_number_is_refused_alike(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number, got") as error:
        EngineOptions(**{name: value})
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"threads": 0}, "threads: expected 1 to 1024, got 0"),
        ({"threads": 1025}, "threads: expected 1 to 1024, got 1025"),
        ({"ram": -1}, "size"),
        ({"verify": 1}, "verify: expected True or False, got 1"),
        (
            {"cache_type_v": "q4"},
            "cache_type_v: expected f16, f32, q8_0, q4_0, q3_0 or q2_0, got q4",
        ),
        ({"scheduler": ["mc"]}, r"scheduler: expected a text, got \['mc'\]"),
        ({"options": ""}, "options: expected names and values, got ''"),
        ({"options": 0}, "options: expected names and values, got 0"),
        ({"scheduler": "magic"}, "scheduler: expected one of on-demand"),
        ({"bits": "auto", "scheduler": "mc"}, "bits: auto is for the scheduler on-demand"),
        ({"bits": 4, "allocation": "a.json"}, "allocation: expected bits or dense bits to be auto"),
        ({"trace": "t", "observer": object()}, "trace and observer: expected one of them"),
    ],
)
def test_what_needs_no_model_is_checked_without_one(arguments, match):
    with pytest.raises(ValueError, match=match):
        EngineOptions(**arguments)


@pytest.mark.parametrize("value", [2, np.int64(2), 1.5, b"a", "", ["a"], {}, object()])
@pytest.mark.parametrize("name", ["allocation", "kv_table", "plug_in", "trace", "profile"])
def test_what_is_no_path_is_refused_alike(name, value):
    beside = {"allocation": {"bits": "auto"}, "kv_table": {"cache_type_k": "auto"}}
    with pytest.raises(ValueError, match=f"^{name}: expected a path, got"):
        EngineOptions(**{name: value}, **beside.get(name, {}))


def test_load_takes_what_options_take(tiny_moe):
    with pytest.raises(TypeError, match="rams"):
        edgemoe.load(tiny_moe, rams="1GiB")
    with edgemoe.load(tiny_moe, experts=np.int64(1), context=np.int64(32)) as engine:
        assert engine.options == EngineOptions(experts=1, context=32)
        assert (engine.config.experts_per_token, engine.context) == (1, 32)
        rows = [engine.logits(ids) for ids in ([1, 2], (1, 2), np.array([1, 2], np.uint8))]
        assert all(np.array_equal(rows[0], other) for other in rows)


def test_every_flag_of_the_command_line_has_an_option():
    from edgemoe.cli.options import run_parser

    said = engine_flags(run_parser().parse_args([]))
    fields = {f.name for f in dataclasses.fields(EngineOptions)}
    assert set(said) <= fields
    # The rest are options that edgemoe-run adds itself, and those that only a program can give.
    assert fields - set(said) == {
        "context", "trace", "profile", "observer", "plug_in", "sequences", "slots", "steady",
    }  # fmt: skip
    assert EngineOptions(**said) == EngineOptions(whole_process=True)
    assert engine_flags(argparse.Namespace(bits=4), ram=1 << 30) == {
        "whole_process": True, "bits": 4, "ram": 1 << 30,
    }  # fmt: skip


@pytest.fixture(scope="module")
def engine(tiny_moe):
    with edgemoe.load(tiny_moe, context=32) as engine:
        yield engine


@pytest.mark.parametrize("value", [True, 1.5, "1", [1], None, object(), -1])
def test_sizes_and_lengths_of_calls_are_whole_numbers(engine, value, tmp_path):
    with pytest.raises(ValueError, match="^size: expected"):
        engine.lend(value)
    with pytest.raises(ValueError, match="^length: expected"):
        engine.kv_bytes(value)
    with pytest.raises(ValueError, match="^look_ahead: expected"):
        engine.record(tmp_path / "x.trace", look_ahead=value)


@pytest.mark.parametrize("value", [0, "", {}, [1], False, object()])
def test_settings_and_texts_of_calls_are_of_their_kind(engine, value):
    with pytest.raises(ValueError, match="^params: expected SamplingParams, got"):
        engine.generate([1], value)
    with pytest.raises(ValueError, match="^chat: params: expected SamplingParams, got"):
        engine.chat(params=value)
    with pytest.raises(ValueError, match="^is_cancelled: expected a function, got"):
        engine.generate([1], is_cancelled=value)
    chat = engine.chat(system="a")
    if not isinstance(value, str):
        with pytest.raises(ValueError, match="^system: expected a text, got"):
            chat.instruct(value)
    assert chat.messages == [{"role": "system", "content": "a"}]


@pytest.mark.parametrize("value", [0, 1 << 70, None, b"a", "", [1], np.int64(2)])
def test_paths_of_calls_are_paths(engine, value):
    chat = engine.chat()
    for call in (edgemoe.load, engine.record, chat.save, chat.load):
        with pytest.raises(ValueError, match="^path: expected a path, got"):
            call(value)


def test_a_trace_that_cannot_be_written_changes_nothing(engine, tmp_path):
    before = engine.scheduler, engine.model.room.size
    with pytest.raises(FileNotFoundError):
        engine.record(tmp_path / "absent" / "x.trace", look_ahead=2)
    assert (engine.scheduler, engine.model.room.size) == before
    assert engine.model.experts.observer is None
