"""A model on a device gives the CPU's logits, bit for bit, wherever its experts are and whatever has to move."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

import families
import numpy as np
import pytest
from engines import with_slots
from simulated import configured, on_device, plug_in, small_moe, with_vram
from test_batching import Asked, opened, run
from tiny import tiny_checkpoint

import edgemoe
import edgemoe.runtime.on_device
from edgemoe import devices
from edgemoe.convert.convert import convert
from edgemoe.devices import DeviceName, found
from edgemoe.errors import DeviceError, DeviceLost, OutOfBudget, RangeError
from edgemoe.file.reader import open_moe
from edgemoe.model import Batch, KvTable
from edgemoe.ops import Ops
from edgemoe.ops.cuda import CudaOps, memory, placement
from edgemoe.ops.cuda.placement import hosted, lacks, unsupported
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.store import expert_bytes

IDS = np.random.default_rng(5).integers(0, 250, 40).tolist()
GREEDY = edgemoe.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def play(path, **options):
    """Returns the logits of a prompt, the hash of the last ones, a reply, its hash, and the store's counters."""
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
    if slots == 16:  # all were copied there once, before any computing
        uses = got[4]["hits"] + got[4]["misses"] - slots
        assert uses == expected[4]["hits"] + expected[4]["misses"] == got[4]["device_hits"]


@pytest.mark.parametrize("scheduler", ["auto", "expertflow"])
def test_with_schedulers_that_read_ahead(tiny_moe, monkeypatch, scheduler):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    with_vram(monkeypatch, 3, tiny_moe)
    expected = play(tiny_moe, scheduler=scheduler)
    assert play(tiny_moe, scheduler=scheduler, **on_device())[:4] == expected[:4]


@pytest.mark.parametrize(
    "more",
    [{"bits": 2}, {"bits": 6, "dense_bits": 4}, {"cache_type_v": "q8_0"}, {"cache_type_v": "q4_0"}],
    ids=str,
)
def test_at_every_level(tiny_moe, monkeypatch, more):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=7)
    with_vram(monkeypatch, 3, tiny_moe)
    assert play(tiny_moe, **more, **on_device())[:4] == play(tiny_moe, **more)[:4]


def test_all_has_been_read_when_that_is_told(tiny_moe):
    """The embedding, whose rows the host looks up in the file, is read after everything else."""
    shares: list[float] = []
    open_model(tiny_moe, EngineOptions(dense_bits=4, context=64, **on_device()), told=shares.append)
    assert shares == sorted(shares)
    assert shares[-2] < shares[-1] == 1


def test_layers_whose_cache_a_device_does_not_store_run_beside_it(tiny_moe):
    layers = (("f16", "q4_0"), ("f32", "f16"))
    table = KvTable(of=KvTable.identity(open_moe(tiny_moe)), layers=layers)
    kinds = {"cache_type_k": "auto", "cache_type_v": "auto", "kv_table": table}
    expected = play(tiny_moe, **kinds)
    assert play(tiny_moe, **kinds, **on_device())[:4] == expected[:4]
    with edgemoe.load(tiny_moe, context=64, **kinds, **on_device()) as engine:
        assert [n for n in engine.notes if "kernels" in n] == [
            "cuda:0: the processor runs 1 of 2 mixers, as there are no kernels there yet for a KV cache in q4_0"
        ]


@pytest.mark.parametrize("setting", [{"seed": 3}, {"starved": 0}, {"starved": 1}], ids=str)
def test_whatever_order_the_queues_take(tiny_moe, monkeypatch, setting):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    with_vram(monkeypatch, 2, tiny_moe)
    expected = play(tiny_moe)
    with configured(**setting) as simulator:
        before = simulator.cudasim_configure(b"pageable", 0)
        assert play(tiny_moe, **on_device())[:4] == expected[:4]
        assert simulator.cudasim_configure(b"pageable", 0) == before


def test_without_a_mailbox(tiny_moe, monkeypatch):
    with_slots(monkeypatch, 4 * expert_bytes(open_moe(tiny_moe), 5), chunk=16)
    with_vram(monkeypatch, 2, tiny_moe)
    expected = play(tiny_moe, **on_device())
    real = edgemoe.runtime.on_device.OnDevice.ops

    def ops(self, shape):
        self.device.use_mailbox(False)
        return real(self, shape)

    monkeypatch.setattr(edgemoe.runtime.on_device.OnDevice, "ops", ops)
    assert play(tiny_moe, **on_device())[:4] == expected[:4]


def test_a_budget_of_the_device_holds(tiny_moe):
    with edgemoe.load(tiny_moe, context=128, vram="3MiB", **on_device()) as engine:
        engine.logits(IDS)
        stats = engine.model.ops._device.stats
        assert stats["peak_bytes"] <= stats["budget_bytes"] == 3 << 20
    with pytest.raises(
        OutOfBudget, match=r"1 MiB of the device are too little; the smallest that works is \d MiB"
    ):
        edgemoe.load(tiny_moe, context=512, vram="1MiB", **on_device())


def test_the_hosts_budget_does_not_depend_on_who_chooses_the_context(tiny_moe):
    found = []
    for context in (512, None):  # the model's own: both have it
        with edgemoe.load(
            tiny_moe, ram="64MiB", context=context, whole_process=False, **on_device()
        ) as engine:
            budget = engine.budget
            host = placement.host_bytes(open_moe(tiny_moe), 5, ())
            assert budget.dense == host
            assert budget.slots == budget.experts
            found.append((budget.context, budget.chunk, budget.dense))
    assert found[0] == found[1]


FAMILIES = (
    "mixtral", "qwen2_moe-window", "olmoe-clip-norm", "granitemoe", "qwen3_moe", "glm4_moe-groups-norm", "ernie4_5_moe",
    "minimax_m2", "hunyuan_v1_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss", "gemma4_text", "laguna", "glm4_moe_lite",
    "deepseek_v2-groups", "deepseek_v3", "mistral4", "lfm2_moe", "granitemoehybrid", "nemotron_h", "llama4_text",
    "phimoe", "kimi_linear", "bailing_hybrid", "bailing_moe",
)  # fmt: skip


def answers(path, **options):
    """Returns the logits of a prompt in pieces, a reply, and its last logits."""
    ids = families.random_ids(20)
    with edgemoe.load(path, context=64, **options) as engine:
        notes = [note for note in engine.notes if "kernels" in note]
        logits = engine.logits(ids).tobytes()
        return (logits, list(engine.generate(ids, GREEDY)), engine.stats.logits_hash), notes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_on_a_device(tmp_path, monkeypatch, name):
    path = small_moe(name, tmp_path)
    with_vram(monkeypatch, FAMILIES.index(name) % 4, path)  # none to three experts
    assert unsupported(open_moe(path)) is None
    assert answers(path, **on_device()) == answers(path)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "gemma4_text", "deepseek_v3"])
def test_families_with_less_on_a_device(tmp_path, monkeypatch, name):
    path = small_moe(name, tmp_path)
    with_vram(monkeypatch, 3, path)
    for less in ({"bits": 4, "cache_type_k": "q8_0"}, {"bits": 2, "cache_type_v": "f32"}):
        there, notes = answers(path, **less, **on_device())
        assert there == answers(path, **less)[0]
        key_biases = any(m.has_constant_keys for m in open_moe(path).config.mixers)
        assert bool(notes) == (key_biases and "cache_type_k" in less)  # the CPU runs some mixers


def test_all_families_are_tried():
    from edgemoe.convert.supported import supported

    tried = {families.SETTINGS[name]["model_type"] for name in FAMILIES}
    aliases = {
        "gemma4": "gemma4_text", "llama4": "llama4_text", "qwen3_5_moe": "qwen3_5_moe_text",
        "granitemoeshared": "granitemoe", "kimi_k2": "deepseek_v3", "mistral3": "mistral4",
        "bailing_moe_v2": "bailing_moe", "qwen3_vl_moe": "qwen3_moe", "qwen3_vl_moe_text": "qwen3_moe",
    }  # fmt: skip
    names = {name for family in supported()["families"] for name in family["model_types"]}
    names.discard("granitemoe_dense")  # only exists in tests
    assert {aliases.get(name, name) for name in names} <= tried


def test_heads_that_are_too_wide_run_beside_a_device(tiny_moe, monkeypatch):
    expected = play(tiny_moe)
    for module in (placement, memory):
        monkeypatch.setattr(module, "MOST_HEAD_DIM", 16)
    assert play(tiny_moe, **on_device())[:4] == expected[:4]


@pytest.mark.parametrize("name", ["gpt_oss", "kimi_linear", "granitemoehybrid"])
def test_mixers_that_a_device_does_not_know_run_beside_it(tmp_path, monkeypatch, name):
    path = small_moe(name, tmp_path)
    expected, _ = answers(path)
    monkeypatch.setattr(placement, "_MIXERS", {})
    config = open_moe(path).config
    there, notes = answers(path, **on_device())
    assert there == expected
    kinds = [mixer.kind for mixer in config.mixer_by_layer]
    assert notes == [
        f"cuda:0: the processor runs {kinds.count(kind)} of {config.num_layers} mixers, "
        f"as there are no kernels there yet for a mixer of the kind {kind}"
        for kind in dict.fromkeys(kinds)
    ]


def test_what_a_device_does_not_know_is_said(tiny_moe, monkeypatch):
    moe = open_moe(tiny_moe)
    spec = moe.config.mixers[0]
    assert unsupported(moe) is None
    assert hosted(moe.config, [("f16", "f16")] * 2) == {}
    assert "key biases" in hosted(moe.config, [("f16", "f16"), ("q8_0", "f16")])[1]
    assert hosted(moe.config, [("f16", "q4_0"), ("f16", "f16")]) == {0: "a KV cache in q4_0"}
    odd = dataclasses.replace(spec, head_dim=1024, num_heads=2, num_kv_heads=2)
    assert lacks(odd, "f16", "f16") == "heads of 1024 columns, more than 640"
    other = dataclasses.replace(moe, scheme=dataclasses.replace(moe.scheme, name="floats"))
    assert unsupported(other) == "the scheme floats"
    monkeypatch.setattr(placement, "_CONFIG", placement._CONFIG - {"scoring"})
    odd = dataclasses.replace(moe.config, scoring="sigmoid")
    assert unsupported(dataclasses.replace(moe, config=odd)) == "scoring sigmoid"
    monkeypatch.setattr(placement, "_SCHEMES", frozenset())
    with pytest.raises(ValueError, match="device cuda:0: the scheme nested has no kernels there"):
        edgemoe.load(tiny_moe, **on_device())


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


def test_a_plug_in_without_a_device_leaves_the_next_one_to_be_listed(monkeypatch, tmp_path):
    (tmp_path / "none.so").write_bytes(b"")
    monkeypatch.setattr(devices, "plug_ins", lambda: [tmp_path / "none.so", Path(plug_in())])
    (line,) = found()
    assert line.startswith("cuda:0  ")


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


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_no_cache_can_hold_is_said_before_it_counts(tmp_path, tokens):
    """The layer is after the last one that chooses experts, so that nothing else waits for the device."""
    source, prefix = tiny_checkpoint(), "model.layers.1."
    source.config["mlp_only_layers"] = [1]
    for name in list(source.shapes):
        if name.startswith(f"{prefix}mlp"):
            part = source._tensors.pop(name)
            if "shared_expert." in name:
                source._tensors[name.replace("shared_expert.", "")] = part
    source.tensor(f"{prefix}self_attn.v_proj.weight")[:] *= 1e5
    convert(source, tmp_path / "x.moe")
    said = []
    for where in ({}, on_device()):
        with edgemoe.load(tmp_path / "x.moe", context=64, **where) as engine:
            with pytest.raises(RangeError, match="^layer 1: a value of") as caught:
                engine.logits(IDS[:tokens], last_only=True)
            said.append(str(caught.value))
            with pytest.raises(RangeError, match="^layer 1: a value of"):
                engine.extend(IDS[:1])
            assert engine._held.sequence.state.length == 0
    assert said[0] == said[1]


def test_a_device_that_is_lost_before_logits_says_so(tiny_moe):
    with edgemoe.load(tiny_moe, context=64, sequences=2, **on_device()) as engine:
        model, out = engine.model, np.empty((1, engine.config.vocab_size), np.float32)
        state = model.make_state()
        hidden = model.forward(Batch.of((state, np.array(IDS[:5], np.int32))))
        with configured(lost=1), pytest.raises(DeviceLost, match="cuda:0 is lost"):
            model.logits(hidden[-1:], out, state)


def test_a_device_that_is_lost_while_a_prompt_is_scored_says_so(tiny_moe):
    batcher, _ = opened(tiny_moe, 2, context=64, **on_device())
    with contextlib.ExitStack() as stack:
        one = Asked(
            IDS, GREEDY, top=1, prompt_logprobs=lambda _: stack.enter_context(configured(lost=1))
        )
        with pytest.raises(DeviceLost, match="cuda:0 is lost"):
            run(batcher, one)


def test_a_device_that_is_lost_says_so_from_then_on(tiny_moe):
    with edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        engine.logits(IDS[:5])
        with configured(lost=1):
            for _ in range(2):
                with pytest.raises(DeviceLost, match=r"cuda:0 is lost, and .*: .*device is gone"):
                    engine.logits(IDS[:5])
            assert engine.model.device.is_lost


def test_what_other_programs_have_of_a_device_is_not_taken(tiny_moe):
    with configured(others=768 << 20), edgemoe.load(tiny_moe, context=64, **on_device()) as engine:
        assert engine.model.device.stats["budget_bytes"] <= 256 << 20
        assert found(plug_in())[0].endswith(" 0.2 of 1.0 GiB free")
        with pytest.raises(
            OutOfBudget,
            match=r"vram: 512 MiB are more than the 2\d\d MiB of cuda:0 that are free; nvidia-smi",
        ):
            edgemoe.load(tiny_moe, context=64, vram="512MiB", **on_device())
        expected = engine.logits(IDS[:5]).tobytes()
    with edgemoe.load(tiny_moe, context=64, vram="512MiB", **on_device()) as engine:
        assert engine.logits(IDS[:5]).tobytes() == expected
    real = edgemoe.runtime.on_device.load_on

    def late(*args, **kwargs):  # another program takes memory in between
        with configured(others=1 << 30):
            return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edgemoe.runtime.on_device, "load_on", late)
        with pytest.raises(OutOfBudget, match=r"the device has no room for \d+ bytes"):
            edgemoe.load(tiny_moe, context=64, vram="512MiB", **on_device())


def test_every_verb_is_there():
    assert {n for n in vars(Ops) if not n.startswith("_")} <= set(dir(CudaOps))


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
