"""Parsing any bytes gives a value of bounded size and depth, or a FormatError that says where."""

from __future__ import annotations

import json
import random

import pytest

from edgemoe.errors import FormatError
from edgemoe.file.parse import parse_json, parse_object


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "value", [None, True, 0, -1.5e300, "ü", "🐋", [], {}, {"a": [1, {"b": [[]]}]}]
)
def test_values_come_back(value: object) -> None:
    assert parse_json(json.dumps(value).encode(), "x") == value
    assert parse_json(json.dumps(value), "x") == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x: not valid JSON: Expecting value"),
        (b"{", "x: not valid JSON"),
        (b"\xff", "x: not valid JSON"),
        (b"\xff\xfe[", "x: not valid JSON"),
        (b'{"a": 1} 2', "x: not valid JSON: Extra data"),
        (b"9" * 5000, "x: not valid JSON"),
        (nested(65), "x: not valid JSON: nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "x: not valid JSON: nested more than 64 deep"),
        (nested(900), "x: not valid JSON: nested more than 64 deep"),
        (b"[" * 200_000, "x: not valid JSON"),
        (b'{"a": ["\\ud800"]}', "x: not valid JSON: 'utf-8' codec can't encode"),
        (b'{"\\udc00": 1}', "x: not valid JSON"),
        (b'"\xed\xa0\x80"', "x: not valid JSON"),
        (nested(200_000), "x: not valid JSON: nested more than 64 deep"),
    ],
)
def test_what_is_no_json_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(FormatError) as error:
        parse_json(data, "x")
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200


def test_the_deepest_and_the_longest() -> None:
    value = parse_json(nested(64), "x")
    for _ in range(63):
        (value,) = value
    assert value == []
    assert parse_json(b" " * 9 + b"1", "x", most=10) == 1
    with pytest.raises(FormatError, match="x: has 11 bytes; expected JSON of at most 10"):
        parse_json(b" " * 10 + b"1", "x", most=10)


def test_an_object_is_asked_for() -> None:
    assert parse_object(b'{"a": 1}', "x") == {"a": 1}
    for data, kind in ((b"[1]", "list"), (b"null", "NoneType"), (b'"a"', "str")):
        with pytest.raises(FormatError, match=f"x: expected a JSON object, got {kind}"):
            parse_object(data, "x")


def test_random_bytes_end_in_one_way() -> None:
    rng = random.Random(7)
    seeds = [
        b'{"a": [1, 2.5e3, null, true, "\\u00fc\\ud800"], "b": {}}',
        nested(70),
        b"[1e999, NaN]",
    ]
    for _ in range(2000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parse_json(bytes(data), "x")
        except FormatError as error:
            assert str(error).startswith("x: ")
