"""A model on a device gives the processor's logits, bit for bit, wherever its experts are and whatever has to move."""

from __future__ import annotations

import dataclasses
import re

import families
import numpy as np
import pytest
from engines import with_slots
from simulated import configured, plug_in

import edgemoe
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.devices import DeviceName, found
from edgemoe.errors import DeviceError, OutOfBudget
from edgemoe.file.format import open_moe
from edgemoe.ops import Ops
from edgemoe.ops_cuda import CudaOps, unsupported
from edgemoe.runtime.vram import Vram
from edgemoe.store import expert_bytes

IDS = np.random.default_rng(5).integers(0, 250, 40).tolist()
GREEDY = edgemoe.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def on_device():
    return {"device": "cuda:0", "plug_in": plug_in()}


def with_vram(monkeypatch, experts, moe):
    """Gives a device room for so many experts beside all else."""
    real = Vram.divide.__func__

    def divide(cls, moe, **kwargs):
        v = real(cls, moe, **kwargs)
        room = experts * expert_bytes(moe, len(moe.ladder)) + 512
        return dataclasses.replace(v, total=v.dense + v.kv + v.scratch + room)

    monkeypatch.setattr(Vram, "divide", classmethod(divide))


def play(path, **options):
    """The logits of a prompt, its last one's hash, a reply, and what the store counted."""
    with edgemoe.load(path, context=128, **options) as engine:
        logits = engine.logits(IDS)
        told = engine.stats.logits_hash
        reply = list(engine.generate(IDS, GREEDY))
        again = engine.stats.logits_hash
        store = engine.model.store
        store.cache.check_integrity()
        return logits.tobytes(), told, reply, again, store.stats


@pytest.mark.parametrize("slots", [0, 1, 3, 16])
@pytest.mark.parametrize("in_ram", [2, 16])
def test_the_answer_is_the_processors(tiny_moe, monkeypatch, slots, in_ram):
    each = expert_bytes(open_moe(tiny_moe), 5)
    with_slots(monkeypatch, in_ram * each, chunk=16)
    expected = play(tiny_moe)
    with_vram(monkeypatch, slots, tiny_moe)
    got = play(tiny_moe, **on_device())
    assert got[:4] == expected[:4]
    if slots >= 3:
        assert got[4]["device_hits"] > 0
        assert got[4]["device_bytes"] <= slots * each
    if slots == 16 and in_ram == 16:
        assert got[4]["hits"] + got[4]["misses"] == expected[4]["hits"] + expected[4]["misses"]


@pytest.mark.parametrize("scheduler", ["auto", "expertflow"])
def test_with_schedulers_that_read_ahead(tiny_moe, monkeypatch, scheduler):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    with_vram(monkeypatch, 3, tiny_moe)
    expected = play(tiny_moe, scheduler=scheduler)
    assert play(tiny_moe, scheduler=scheduler, **on_device())[:4] == expected[:4]


@pytest.mark.parametrize(
    "more", [{"bits": 2}, {"bits": 6, "dense_bits": 4}, {"cache_type_v": "q8_0"}], ids=str
)
def test_at_every_level(tiny_moe, monkeypatch, more):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=7)
    with_vram(monkeypatch, 3, tiny_moe)
    assert play(tiny_moe, **more, **on_device())[:4] == play(tiny_moe, **more)[:4]


@pytest.mark.parametrize("setting", [{"seed": 3}, {"starved": 0}, {"starved": 1}], ids=str)
def test_whatever_order_the_queues_take(tiny_moe, monkeypatch, setting):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    with_vram(monkeypatch, 2, tiny_moe)
    expected = play(tiny_moe)
    with configured(**setting) as simulator:
        before = simulator.cudasim_configure(b"pageable", 0)
        assert play(tiny_moe, **on_device())[:4] == expected[:4]
        assert simulator.cudasim_configure(b"pageable", 0) == before


def test_a_budget_of_the_device_holds(tiny_moe):
    with edgemoe.load(tiny_moe, context=128, vram="3MiB", **on_device()) as engine:
        engine.logits(IDS)
        stats = engine.model.ops._device.stats
        assert stats["peak_bytes"] <= stats["budget_bytes"] == 3 << 20
    with pytest.raises(
        OutOfBudget, match=r"1 MiB of the device are too little; the smallest that works is \d MiB"
    ):
        edgemoe.load(tiny_moe, context=512, vram="1MiB", **on_device())


def test_every_family_that_a_device_knows(tmp_path):
    names = ("mixtral", "qwen2_moe-window", "olmoe", "granitemoe", "qwen3_moe", "glm4_moe")
    for name in names:
        path = tmp_path / f"{name}.moe"
        convert(HFCheckpoint(families.make(name, tmp_path / name)), path)
        assert unsupported(open_moe(path)) is None
        ids = families.random_ids(20)
        hashes = []
        for options in ({}, on_device()):
            with edgemoe.load(path, context=64, **options) as engine:
                first = engine.logits(ids)
                hashes.append(
                    (first.tobytes(), list(engine.generate(ids, GREEDY)), engine.stats.logits_hash)
                )
        assert hashes[0] == hashes[1], name


def test_what_a_device_does_not_know_is_said(tiny_moe, monkeypatch):
    moe = open_moe(tiny_moe)
    assert unsupported(moe) is None
    odd = dataclasses.replace(moe.config.mixers[0], head_dim=512, num_heads=2, num_kv_heads=2)
    wide = dataclasses.replace(moe, config=dataclasses.replace(moe.config, mixers=(odd,)))
    assert unsupported(wide) == "heads of 512 columns, more than 256"
    assert "key biases" in unsupported(moe, keys="q8_0")
    assert unsupported(moe, values="q4_0") == "a KV cache in q4_0 (f16, f32, q8_0 have)"
    with pytest.raises(
        ValueError, match="device cuda:0: keys in 8 bits of a model with key biases"
    ):
        edgemoe.load(tiny_moe, cache_type_k="q8_0", **on_device())
    renamed = dict(moe.tensors)
    renamed["layers.0.sinks"] = renamed.pop("layers.0.q_bias")
    assert unsupported(dataclasses.replace(moe, tensors=renamed)) == "the tensor layers.0.sinks"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"devices": 0}, "cuda:0: no device"),
        ({"driver": 0}, "cuda:0: no NVIDIA driver"),
        (
            {"driver": 12020},
            "cuda:0: the driver is too old: it is for CUDA 12.2, this plug-in for 13.0",
        ),
    ],
    ids=str,
)
def test_a_device_that_is_not_there_says_why(tiny_moe, setting, message):
    with configured(**setting), pytest.raises(DeviceError, match=re.escape(message)):
        edgemoe.load(tiny_moe, **on_device())
    with configured(**setting):
        assert found(plug_in())[0].startswith("no CUDA device: ")


def test_devices_are_listed_and_named():
    assert found(plug_in())[0].startswith("cuda:0  ")
    with configured(integrated=1):
        assert found(plug_in())[0].startswith("cuda:0  simulated device (8.7), 1.0 of 1.0 GiB free")
        assert found(plug_in())[0].endswith("memory shared with the processor")
    assert "no plug-in in this install" in found()[0] or found()[0].startswith(
        ("cuda:", "no CUDA device")
    )
    assert str(DeviceName.parse("cuda")) == "cuda:0"
    for wrong in ("gpu", "cuda:x", "cuda:-1", 3):
        with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N"):
            DeviceName.parse(wrong)
    with pytest.raises(ValueError, match="vram: expected a device"):
        edgemoe.EngineOptions(vram="1GiB")


def test_a_copy_that_fails_is_one_line(tiny_moe):
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        expected = engine.logits(IDS[:5]).tobytes()
        with configured(may_copy=0), pytest.raises(DeviceError, match="copies fail"):
            engine.logits(IDS[:5])
        assert engine.logits(IDS[:5]).tobytes() == expected


def test_every_verb_is_there_or_refused():
    """What a device lacks, `unsupported` refuses models for."""
    verbs = {n for n in vars(Ops) if not n.startswith("_")}
    missing = verbs - set(dir(CudaOps))
    known = {
        "linear_f32",
        "gate_heads",
        "short_conv",
        "delta_rule",
        "mamba2",
        "gated_norm",
        "multiply",
        "soft_cap",
        "weigh",
    }
    assert {
        "embed",
        "norm",
        "linear",
        "ffn",
        "attention",
        "route",
        "expert_ffn",
        "combine",
    } <= verbs - missing
    assert missing <= known | {n for n in missing if "latent" in n or "heads" in n}, missing


def test_the_command_line_says_what_there_is(tiny_moe, capsys, monkeypatch):
    from edgemoe.cli.run import main

    monkeypatch.setattr("edgemoe.devices.plug_ins", list)
    with pytest.raises(SystemExit) as end:
        main(["--list-devices"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("no CUDA device: no plug-in in this install")
    assert main([str(tiny_moe), "--device", "cuda", "-p", "Hi"]) == 1
    assert "cuda:0: no plug-in in this install" in capsys.readouterr().err
    assert main([str(tiny_moe), "--vram", "1GiB", "-p", "Hi"]) == 1
    assert "vram: expected a device" in capsys.readouterr().err
