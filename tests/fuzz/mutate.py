"""Random changes of bytes, text and JSON values, aimed at what readers get wrong. Determined by the generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 4095, 4096, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63,
    2**64, -(2**63), 10**30, 0.5, -0.0, 1e-45, 1e-300, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "1e999", "nan", "null", "\0", "\n", "\x1b[2J\x1b]0;owned\x07", "\ud800", "ÿ", "\u202e", "🐋" * 9,
    "../../etc/passwd", "/etc/passwd", "a" * 300, "x" * 70_000, "{{", "{% for x in y %}", "%s", "{0}", "__class__",
    "model.layers.0.mlp.gate.weight", "float32", "F16", "BF16", "I64",
)  # fmt: skip


def any_value(rng: Random, depth: int = 0) -> Any:
    """Returns some JSON value."""
    kind = rng.randrange(9 if depth < 3 else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind == 5:
        return nested(rng.choice((3, 70, 900, 3000)), rng.random() < 0.5)
    if kind == 6:
        return [any_value(rng, depth + 1)] * rng.choice((1, 2, 1000))
    size = rng.randrange(4)
    if kind == 7:
        return [any_value(rng, depth + 1) for _ in range(size)]
    return {rng.choice(TEXTS): any_value(rng, depth + 1) for _ in range(size)}


def nested(depth: int, as_list: bool) -> Any:
    """Returns a value nested so many levels deep."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) for every value inside. Not recursive, as values may be deep."""
    out, todo = [], [value]
    while todo and len(out) < 20_000:
        box = todo.pop()
        keys = list(box) if isinstance(box, dict) else range(len(box))
        for key in keys:
            out.append((box, key))
            if isinstance(box[key], (dict, list)):
                todo.append(box[key])
    return out


def change_value(rng: Random, value: Any) -> Any:
    """Returns a copy of a JSON value, changed in one to three places."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value) if isinstance(value, (dict, list)) else []
        if not found or rng.random() < 0.01:
            return any_value(rng)
        box, key = rng.choice(found)
        old, how = box[key], rng.randrange(10)
        if how == 0:
            del box[key]
        elif how == 1:
            box[key] = copy.copy(rng.choice(found)[0])
        elif how == 2 and isinstance(box, dict):
            box[rng.choice((*TEXTS, str(key) + "x", *map(str, box)))] = old
        elif how == 3 and isinstance(old, list):
            box[key] = old * rng.choice((2, 50)) if rng.random() < 0.5 else old[:-1]
        elif how < 6 and type(old) in (int, float):
            box[key] = rng.choice(
                (old + 1, old - 1, -old, old * 2, old * 1000, old / 3, str(old), [old])
            )
        elif how < 6 and isinstance(old, str):
            box[key] = rng.choice(
                (old + rng.choice(TEXTS), old[: len(old) // 2], old.upper(), [old], len(old))
            )
        elif how == 6:
            other, its = rng.choice(found)
            if its in other if isinstance(other, dict) else its < len(other):
                box[key] = other[its]
        else:
            box[key] = any_value(rng)
    return value


def is_larger(value: Any, most: int) -> bool:
    """Returns whether a value has more than `most` parts and characters; a shared part counts each time it occurs."""
    todo, count = [value], 0
    while todo and count <= most:
        one = todo.pop()
        count += len(one) + 1 if isinstance(one, (str, list, dict)) else 1
        if isinstance(one, dict):
            todo.extend(one.values())
        elif isinstance(one, list):
            todo.extend(one)
    return count > most


def json_bytes(rng: Random, value: Any) -> bytes:
    """Returns a value as JSON, mostly in the usual form. A value that JSON cannot express becomes brackets."""
    try:
        if is_larger(value, 4_000_000):
            raise ValueError("of a size that no target reads")
        text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
        return text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")
    except (ValueError, RecursionError, TypeError):
        return b"[" * rng.choice((100, 200_000))


def change_json(rng: Random, data: bytes) -> bytes:
    """Changes JSON: mostly its value, otherwise its bytes."""
    if rng.random() < 0.15:
        return change_bytes(rng, data)
    return json_bytes(rng, change_value(rng, json.loads(data)))


def change_bytes(rng: Random, data: bytes) -> bytes:
    """Changes bytes in a few places, or changes their length."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(out) + 1)
        _BYTE_CHANGES[rng.randrange(len(_BYTE_CHANGES))](rng, out, at)
    return bytes(out)


def _set(rng: Random, out: bytearray, at: int) -> None:
    out[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])


def _flip(rng: Random, out: bytearray, at: int) -> None:
    if at < len(out):
        out[at] ^= 1 << rng.randrange(8)


def _number(rng: Random, out: bytearray, at: int) -> None:
    size = rng.choice((2, 4, 8))
    value = rng.choice([n for n in NUMBERS if type(n) is int]) % (1 << 8 * size)
    out[at : at + size] = value.to_bytes(size, "little")


def _cut(rng: Random, out: bytearray, at: int) -> None:
    out[at : len(out) if rng.random() < 0.3 else at + rng.choice((1, 4, 64))] = b""


def _double(rng: Random, out: bytearray, at: int) -> None:
    size = rng.choice((1, 8, 100, 1000))
    out[at:at] = out[at : at + size] * rng.choice((1, 3))


def _insert(rng: Random, out: bytearray, at: int) -> None:
    out[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")


def _open(rng: Random, out: bytearray, at: int) -> None:
    out[at:at] = rng.choice((b"[", b'{"a":', b"(", b"{{")) * rng.choice((1, 100, 200_000))


_BYTE_CHANGES: tuple[Callable[[Random, bytearray, int], None], ...] = (
    _set, _set, _flip, _flip, _number, _number, _cut, _double, _insert, _open,
)  # fmt: skip
