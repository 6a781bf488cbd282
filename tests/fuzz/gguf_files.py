"""Fuzzers of GGUF files: dense checkpoints, and importance matrices, also in their older `.dat` form."""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.imatrix import convert_imatrix
from fuzz.models import model_path
from fuzz.mutate import NUMBERS, TEXTS, change_bytes
from fuzz.target import Case, Target

_FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY, _F32, _I32 = 8, 9, 0, 26


@dataclass
class Gguf:
    """The fields of a GGUF file before it is written; every count and offset can be made wrong."""

    meta: list[tuple[bytes, int, Any]] = field(default_factory=list)
    """The key, type and value of each entry; the value of an array is (type, values)."""
    tensors: list[tuple[bytes, list[int], int, int, bytes]] = field(default_factory=list)
    """The name, shape, type, offset and content of each tensor."""
    counts: tuple[int, int] = (0, 0)
    """How many more tensors and keys the header claims than there are."""
    order: str = "<"

    def to_bytes(self) -> bytes:
        """Returns the bytes of the file."""
        head = struct.pack(
            self.order + "4sIQQ", b"GGUF", 3, (len(self.tensors) + self.counts[0]) % 2**64,
            (len(self.meta) + self.counts[1]) % 2**64,
        )  # fmt: skip
        for key, kind, value in self.meta:
            head += self._text(key) + self._number(4, kind) + self._value(kind, value)
        body = b""
        for name, sizes, kind, offset, content in self.tensors:
            head += self._text(name) + self._number(4, len(sizes))
            head += b"".join(self._number(10, n) for n in sizes)
            head += self._number(4, kind) + self._number(10, offset)
            body = body.ljust(offset, b"\0") if offset < 1 << 20 else body
            body += content
        return head.ljust(-(-len(head) // 32) * 32, b"\0") + body

    def _text(self, text: bytes) -> bytes:
        return self._number(10, len(text)) + text

    def _number(self, kind: int, value: Any) -> bytes:
        name = _FORMATS[kind]
        if name in "fd":
            with np.errstate(all="ignore"):
                return np.array(value, self.order + ("f4" if name == "f" else "f8")).tobytes()
        if name == "?":
            return bytes([int(bool(value))])
        size = struct.calcsize(name)
        number = 0 if value != value or value in (float("inf"), float("-inf")) else int(value)
        return (number % (1 << 8 * size)).to_bytes(size, "little" if self.order == "<" else "big")

    def _value(self, kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return self._text(
                value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
            )
        if kind == _ARRAY:
            inner, values = value if isinstance(value, tuple) else (4, [])
            return (
                self._number(4, inner)
                + self._number(10, len(values))
                + b"".join(self._value(inner, v) for v in values)
            )
        if kind not in _FORMATS:
            return b"\1" * 8
        return self._number(kind, value if isinstance(value, (int, float)) else 1)


def _llama() -> Gguf:
    V, D, H, L, heads, kv = 259, 32, 32, 1, 2, 1
    rng = np.random.default_rng(2)
    bytes_to_text = _byte_alphabet()
    tokens = [*bytes_to_text, "<|im_start|>", "<|im_end|>", "ab"]
    numbers = {
        "block_count": L, "context_length": 64, "embedding_length": D, "feed_forward_length": H,
        "attention.head_count": heads, "attention.head_count_kv": kv, "rope.dimension_count": D // heads,
    }  # fmt: skip
    meta = [
        (b"general.architecture", _STRING, b"llama"), (b"general.alignment", 4, 32),
        *((b"llama." + k.encode(), 4, v) for k, v in numbers.items()),
        (b"llama.attention.layer_norm_rms_epsilon", 6, 1e-5), (b"llama.rope.freq_base", 6, 1e4),
        (b"llama.rope.scaling.type", _STRING, b"linear"), (b"llama.rope.scaling.factor", 6, 2.0),
        (b"tokenizer.ggml.model", _STRING, b"gpt2"), (b"tokenizer.ggml.pre", _STRING, b"smollm"),
        (b"tokenizer.ggml.tokens", _ARRAY, (_STRING, [t.encode() for t in tokens])),
        (b"tokenizer.ggml.token_type", _ARRAY, (5, [3 if t.startswith("<|") else 1 for t in tokens])),
        (b"tokenizer.ggml.merges", _ARRAY, (_STRING, [b"a b"])),
        (b"tokenizer.ggml.bos_token_id", 4, 256), (b"tokenizer.ggml.eos_token_id", 4, 257),
        (b"tokenizer.ggml.add_bos_token", 7, False),
        (b"tokenizer.chat_template", _STRING, b"{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ]  # fmt: skip
    out = Gguf(meta)
    shapes = {
        "token_embd": (V, D),
        "output_norm": (D,),
        "blk.0.attn_norm": (D,),
        "blk.0.ffn_norm": (D,),
    }
    shapes |= {"blk.0.attn_q": (D, D), "blk.0.attn_k": (D // 2, D), "blk.0.attn_v": (D // 2, D)}
    shapes |= {
        "blk.0.attn_output": (D, D),
        "blk.0.ffn_gate": (H, D),
        "blk.0.ffn_up": (H, D),
        "blk.0.ffn_down": (D, H),
    }
    for name, shape in shapes.items():
        _add(out, f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    return out


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _imatrix() -> Gguf:
    meta = [(b"general.architecture", _STRING, b"imatrix"), (b"general.type", _STRING, b"imatrix"),
            (b"imatrix.chunk_count", 4, 3), (b"imatrix.chunk_size", 4, 512)]  # fmt: skip
    out = Gguf(meta)
    rng = np.random.default_rng(6)
    widths = {
        "attn_q": (1, 96),
        "attn_output": (1, 96),
        "ffn_gate_exps": (4, 96),
        "ffn_down_exps": (4, 16),
    }
    for name, shape in widths.items():
        _add(out, f"blk.0.{name}.weight.in_sum2", rng.random(shape).astype(np.float32))
        _add(out, f"blk.0.{name}.weight.counts", np.full((shape[0], 1), 1536, np.float32))
    return out


def _add(out: Gguf, name: str, values: np.ndarray) -> None:
    at = max((offset + len(content) for *_, offset, content in out.tensors), default=0)
    out.tensors.append(
        (name.encode(), list(values.shape[::-1]), _F32, -(-at // 32) * 32, values.tobytes())
    )


def _dat() -> bytes:
    rng = np.random.default_rng(7)
    widths = {"attn_q": 96, "attn_output": 96, "ffn_gate_exps": 4 * 96, "ffn_down_exps": 4 * 16}
    out = struct.pack("<i", len(widths))
    for name, count in widths.items():
        key = f"blk.0.{name}.weight".encode()
        out += (
            struct.pack("<i", len(key))
            + key
            + struct.pack("<ii", 3, count)
            + rng.random(count).astype("f4").tobytes()
        )
    return out + struct.pack("<i", 3)


def _change_gguf(rng: Random, sound: Gguf) -> bytes:
    out = copy.deepcopy(sound)
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.randrange(10)
        if how == 0:
            out.counts = (
                rng.choice((0, 1, -1, 1 << 31, 1 << 62)),
                rng.choice((0, 1, -1, 1 << 31, 1 << 62)),
            )
        elif how == 1:
            out.order = ">"
        elif how < 6 and out.meta:
            _change_meta(rng, out)
        elif out.tensors:
            at = rng.randrange(len(out.tensors))
            name, sizes, kind, offset, content = out.tensors[at]
            what = rng.randrange(6)
            if what == 0:
                name = rng.choice(
                    (*(t.encode("utf-8", "replace") for t in TEXTS), name + b"x", out.tensors[0][0])
                )
            elif what == 1:
                sizes = rng.choice(
                    (
                        [],
                        [0],
                        [1] * 9,
                        [*sizes, 1],
                        [n + 1 for n in sizes],
                        [1 << 31] * 4,
                        sizes[::-1],
                    )
                )
            elif what == 2:
                kind = rng.choice((1, 2, 8, 12, 14, 24, 30, 39, 99, 1 << 31))
            elif what == 3:
                offset = rng.choice((0, 1, 31, offset + 32, 1 << 31, (1 << 64) - 32))
            elif what == 4:
                content = content[: len(content) // 2]
            else:
                content = np.full(
                    len(content) // 4, rng.choice((np.inf, np.nan, 3e38, -1.0)), np.float32
                ).tobytes()
            out.tensors[at] = name, sizes, kind, offset, content
    data = out.to_bytes()
    return change_bytes(rng, data) if rng.random() < 0.2 else data


def _change_meta(rng: Random, out: Gguf) -> None:
    at = rng.randrange(len(out.meta))
    key, kind, value = out.meta[at]
    how = rng.randrange(7)
    if how == 0:
        del out.meta[at]
        return
    if how == 1:
        key = rng.choice((out.meta[0][0], key + b"x", b"", b"a" * 70_000))
    elif how == 2:
        kind = rng.choice((*_FORMATS, _STRING, _ARRAY, 13, 1 << 31))
    elif how == 3:
        kind, value = _ARRAY, (_ARRAY, [(4, [1])])
        for _ in range(rng.choice((2, 100, 800))):
            value = (_ARRAY, [value])
    elif kind == _ARRAY and isinstance(value, tuple):
        inner, values = value
        value = (
            rng.choice((inner, 4, 6, _STRING, 12)),
            rng.choice(
                (
                    [],
                    values[:-1],
                    values * 2,
                    [*values[:-1], b"\xff\xfe"],
                    [0] * len(values),
                    values[::-1],
                )
            ),
        )
    elif kind == _STRING:
        value = rng.choice(
            (
                *(t.encode("utf-8", "replace") for t in TEXTS),
                b"\xff",
                value + value,
                b"qwen2",
                b"none",
            )
        )
    else:
        value = rng.choice(NUMBERS)
    out.meta[at] = key, kind, value


def _read_gguf(folder: Path) -> None:
    found = GGUFCheckpoint(folder / "model.gguf")
    for name in list(found.shapes)[:40]:
        found.tensor(name)


def _read_imatrix(folder: Path) -> None:
    convert_imatrix(model_path(), folder / "imatrix", folder / "out")


def _other_gguf(rng: Random, case: Case) -> Case:
    return {"model.gguf": _change_gguf(rng, _llama())}


def _other_imatrix(rng: Random, case: Case) -> Case:
    is_old = case["imatrix"][:4] != b"GGUF"
    return {
        "imatrix": change_bytes(rng, case["imatrix"]) if is_old else _change_gguf(rng, _imatrix())
    }


TARGETS = [
    Target("gguf", lambda: [{"model.gguf": _llama().to_bytes()}], _other_gguf, _read_gguf),
    Target(
        "imatrix", lambda: [{"imatrix": _imatrix().to_bytes()}, {"imatrix": _dat()}], _other_imatrix, _read_imatrix
    ),
]  # fmt: skip
