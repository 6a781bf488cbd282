"""Fuzzers of our own files: models, traces, allocations."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np

import edgemoe
from edgemoe import _core
from edgemoe.errors import FormatError, OutOfBudget, RangeError, ReadError
from edgemoe.file.format import MAGIC, PREAMBLE, VERSION, align, pack_preamble
from edgemoe.lab.report.summary import summary
from edgemoe.lab.routing.replay import Tape, make_scheduler, replay
from edgemoe.quant import Allocation
from edgemoe.runtime import trace
from fuzz.models import model, model_path
from fuzz.mutate import NUMBERS, change_bytes, change_json, change_value, json_bytes
from fuzz.target import Case, Target

_FIRST = 3  # tokens to generate


def _parts(data: bytes) -> tuple[dict, int]:
    """Returns the index of a model file, and its offset."""
    _, _, _, _, offset, length, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    return json.loads(data[offset : offset + length]), offset


def _with_index(data: bytes, index: bytes) -> bytes:
    """Returns a model file with another index at its end, and correct checksums."""
    at = align(len(data))
    data = data.ljust(at, b"\0") + index
    return pack_preamble(len(data), at, index) + data[PREAMBLE.size :]


def change_model(rng: Random, case: Case) -> Case:
    data = case["model.moe"]
    try:
        index, at = _parts(data)
        sections = {name: (o, n) for name, (o, n, _) in index["sections"].items()}
    except Exception:  # after earlier changes it may be no model file
        return {"model.moe": change_bytes(rng, data)}
    how = rng.randrange(10)
    if how == 0:
        return {"model.moe": change_bytes(rng, data)}
    if how == 1:
        head = [
            rng.choice((v, v, int(rng.choice([n for n in NUMBERS if type(n) is int]))))
            for v in PREAMBLE.unpack(data[:64])[3:]
        ]
        size, offset, length, _ = (n % (1 << 64) for n in head)
        found = data[offset : offset + length] if offset < len(data) and length < len(data) else b""
        tail = PREAMBLE.pack(MAGIC, VERSION, 0, size, offset, length, _core.crc32c(found))[16:]
        return {
            "model.moe": MAGIC
            + VERSION.to_bytes(4, "little")
            + _core.crc32c(tail).to_bytes(4, "little")
            + tail
            + data[64:]
        }
    if how < 5:
        return {"model.moe": _with_index(data, json_bytes(rng, change_value(rng, index)))}
    if how == 5:  # random bytes in the weights and their scales
        out = bytearray(data)
        for _ in range(rng.choice((1, 30, 1000))):
            out[rng.randrange(4096, min(at, len(out)))] = rng.choice(
                (0, 0x7F, 0xFC, 0xFF, rng.randrange(256))
            )
        return {"model.moe": bytes(out)}
    name = rng.choice(sorted(sections))
    offset, size = sections[name]
    content = data[offset : offset + size]
    if name == "experts":
        content = _change_table(rng, content)
    elif name.endswith(".json") or name == "allocation":
        try:
            content = change_json(rng, content)
        except (ValueError, RecursionError):
            content = change_bytes(rng, content)
    else:
        content = change_bytes(rng, content)
    if rng.random() < 0.1:
        name = rng.choice(
            ("bit-routers", "quality", "chat_template.jinja", "special_tokens_map.json")
        )
    start = align(len(data))
    index["sections"][name] = [start, len(content), _core.crc32c(content)]
    return {
        "model.moe": _with_index(data.ljust(start, b"\0") + content, json.dumps(index).encode())
    }


def _change_table(rng: Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        size = rng.choice((4, 8))
        at = rng.randrange(len(out) // size) * size if len(out) >= size else 0
        value = rng.choice((*(n for n in NUMBERS if type(n) is int), 4096 * rng.randrange(80)))
        out[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def _run_model(folder: Path) -> None:
    path = folder / "model.moe"
    with edgemoe.load(path, ram="48MiB", context=32, threads=1, verify=False) as engine:
        list(engine.generate([1, 2, 3], edgemoe.SamplingParams(temperature=0, max_tokens=_FIRST)))
    json.dumps(summary(edgemoe.file.reader.open_moe(path)))


def _traces() -> list[Case]:
    rng = np.random.default_rng(8)
    L, E, K, p = 2, 6, 2, 1
    header = trace.TraceHeader(
        model="tiny", num_experts=E, experts_per_token=K, num_layers=L, bits=8, level_bits=(2, 4, 8),
        level_bytes=(4096, 8192, 12288), slots_bytes=5 * 12288, scheduler="on-demand", look_ahead=p, threads=1,
    )  # fmt: skip
    passes = (5, 1, 1, 1, 2, 1)
    rows = np.zeros(L * sum(passes), trace.record(K, p))
    at = token = 0
    for T in passes:
        for layer in range(L):
            here = rows[at : at + T]
            here["token"], here["layer"] = token + np.arange(T), layer
            here["id"] = rng.integers(0, 99, T)
            here["experts"] = np.argsort(rng.random((T, E)))[:, :K]
            here["gates"], here["bits"], here["resident"] = 0.5, 8, rng.integers(0, 4, (T, K))
            here["ahead_experts"], here["ahead_gates"] = rng.integers(0, E, (T, p, K)), 0.5
            here["tokens"][0], here["sequences"][0] = T, 1
            here["bytes_read"][0], here["experts_us"][0] = 12288, 20
            at += T
        token += T
    import dataclasses

    line = json.dumps(dataclasses.asdict(header)).encode() + b"\n"
    return [{"trace": line + rows.tobytes()}]


def _change_trace(rng: Random, case: Case) -> Case:
    line, _, body = case["trace"].partition(b"\n")
    if rng.random() < 0.4:
        return {"trace": line + b"\n" + change_bytes(rng, body)}
    try:
        return {"trace": change_json(rng, line) + b"\n" + body}
    except (ValueError, RecursionError):
        return {"trace": change_bytes(rng, case["trace"])}


def _study_trace(folder: Path) -> None:
    found = trace.read(folder / "trace")
    tape = Tape(found)
    for name in ("on-demand", "expertwise"):
        try:
            scheduler = make_scheduler(tape, name, budget_bytes=found.header.slots_bytes)
        except ValueError:  # it claims more experts than its tables hold
            continue
        replay(tape, scheduler, budget_bytes=found.header.slots_bytes)


def _allocations() -> list[Case]:
    value = {
        "edgemoe_allocation": 1, "method": "dp", "settings": {"avg_bits": 2.5}, "layers": [0],
        "bits": [[2, 3, 4, 8]], "protected": [[0, 1]],
    }  # fmt: skip
    return [{"bits.json": json.dumps(value).encode()}]


def _change_allocation(rng: Random, case: Case) -> Case:
    try:
        return {"bits.json": change_json(rng, case["bits.json"])}
    except (ValueError, RecursionError):
        return {"bits.json": change_bytes(rng, case["bits.json"])}


def _use_allocation(folder: Path) -> None:
    path = folder / "bits.json"
    found = Allocation.from_json(path.read_bytes(), "bits.json")
    found.check(model().config, (2, 3, 4, 6, 8), "bits.json")
    options = {"ram": "48MiB", "context": 32, "threads": 1, "verify": False}
    with edgemoe.load(model_path(), bits="auto", allocation=path, **options) as engine:
        engine.logits([1, 2])
    Allocation.from_json(found.to_json(), "again")


TARGETS = [
    Target(
        "moe", lambda: [{"model.moe": model_path().read_bytes()}], change_model, _run_model,
        (FormatError, OutOfBudget, ReadError, RangeError),
    ),
    Target("trace", _traces, _change_trace, _study_trace, (FormatError, OutOfBudget)),
    Target("allocation", _allocations, _change_allocation, _use_allocation),
]  # fmt: skip
