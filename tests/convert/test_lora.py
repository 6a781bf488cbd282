"""LoRA directories are merged as peft does, W + (alpha / r) B A, and the result is converted."""

from __future__ import annotations

import json
import re

import families
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import MemoryCheckpoint, tiny_checkpoint

import edgemoe
from edgemoe.convert.adapter import convert_adapter
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.patched import is_partial, patched
from edgemoe.errors import FormatError
from edgemoe.file.adapter import open_adapter
from edgemoe.file.reader import open_moe

Q, OUT = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
EXPERT = "model.layers.1.mlp.experts.5.up_proj"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "bias": "none",
}


def factors(checkpoint, *modules, rank=4, seed=3):
    """Returns random LoRA factors of some modules, by peft's names."""
    rng, out = np.random.default_rng(seed), {}
    for module in modules:
        rows, cols = checkpoint.shapes[f"{module}.weight"]
        for part, shape in (("A", (rank, cols)), ("B", (rows, rank))):
            out[f"base_model.model.{module}.lora_{part}.weight"] = rng.normal(0, 0.1, shape).astype(
                "f4"
            )
    return out


def write(folder, tensors, config=CONFIG):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(checkpoint, tensors, scaling):
    """Returns the merged checkpoint, computed in the obvious way; `scaling` is by module."""
    out = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    for module, scale in scaling.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        out[f"{module}.weight"] = out[f"{module}.weight"] + (b @ a) * np.float32(scale)
    return MemoryCheckpoint(checkpoint.config, out, checkpoint.files)


def test_logits_are_those_of_the_merged_checkpoint(tmp_path):
    source = tiny_checkpoint()
    tensors = factors(source, Q, OUT, EXPERT)
    lora = write(tmp_path / "lora", tensors)
    whole = merged(source, tensors, {Q: 4, OUT: 4, EXPERT: 4})
    convert(source, tmp_path / "base.moe")
    convert(whole, tmp_path / "whole.moe")
    base = open_moe(tmp_path / "base.moe")
    assert is_partial(lora)
    found = convert_adapter(patched(lora, source), tmp_path / "a.moea", base, original=source)
    assert (found.experts, found.tensors) == (1, 2)
    convert_adapter(whole, tmp_path / "b.moea", base)
    a, b = (open_adapter(tmp_path / f"{name}.moea") for name in "ab")
    assert {n: t.crcs for n, t in a.tensors.items()} == {n: t.crcs for n, t in b.tensors.items()}
    ids = np.random.default_rng(0).integers(0, 256, 30).tolist()
    with edgemoe.load(tmp_path / "base.moe", adapters=tmp_path / "a.moea", ram="64MiB") as engine:
        logits = engine.logits(ids)
    with edgemoe.load(tmp_path / "whole.moe", ram="64MiB") as engine:
        assert np.array_equal(engine.logits(ids).view("u4"), logits.view("u4"))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, {Q: 4, OUT: 4}),
        ({"use_rslora": True}, {Q: 8, OUT: 8}),
        ({"init_lora_weights": "gaussian"}, {Q: 4, OUT: 4}),
        ({"alpha_pattern": {"o_proj": 2}}, {Q: 4, OUT: 0.5}),
        ({"alpha_pattern": {"model.layers.1.self_attn.o_proj": 2, "q_proj": 8}}, {Q: 2, OUT: 0.5}),
    ],
)
def test_scales(tmp_path, config, scaling):
    source = tiny_checkpoint()
    tensors = factors(source, Q, OUT)
    found = patched(write(tmp_path / "lora", tensors, CONFIG | config), source)
    whole = merged(source, tensors, scaling)
    for module in (Q, OUT):
        assert np.array_equal(found.tensor(f"{module}.weight"), whole.tensor(f"{module}.weight"))


def test_ranks_of_single_modules_embeddings_and_whole_tensors(tmp_path):
    source, rng = tiny_checkpoint(), np.random.default_rng(5)
    V, D = source.shapes["model.embed_tokens.weight"]
    tensors = {
        **factors(source, Q), **factors(source, OUT, rank=2),
        "base_model.model.model.embed_tokens.lora_embedding_A": rng.normal(0, 1, (4, V)).astype("f4"),
        "base_model.model.model.embed_tokens.lora_embedding_B": rng.normal(0, 1, (D, 4)).astype("f4"),
        "base_model.model.lm_head.weight": rng.normal(0, 1, (V, D)).astype("f4"),
    }  # fmt: skip
    config = CONFIG | {"rank_pattern": {"o_proj": 2}, "modules_to_save": ["lm_head"]}
    found = patched(write(tmp_path / "lora", tensors, config), source)
    assert np.array_equal(
        found.tensor("lm_head.weight"), tensors["base_model.model.lm_head.weight"]
    )
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{part}"] for part in "AB")
    added = found.tensor("model.embed_tokens.weight") - source.tensor("model.embed_tokens.weight")
    assert np.allclose(added, 4 * (b @ a).T, atol=1e-5)
    whole = merged(source, tensors, {OUT: 8})
    assert np.array_equal(found.tensor(f"{OUT}.weight"), whole.tensor(f"{OUT}.weight"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # from peft itself
def test_it_is_what_peft_merges(tmp_path):
    """For attention and experts; a layer's experts are a single parameter in transformers."""
    peft = pytest.importorskip("peft")
    import transformers

    source = families.make("qwen3_moe", tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "lora")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    theirs, original = HFCheckpoint(tmp_path / "merged"), HFCheckpoint(source)
    ours = patched(tmp_path / "lora", original)
    assert len(ours.patches) == 2 * (2 + 3 * 8)
    for name in original.shapes:
        assert np.allclose(ours.tensor(name), theirs.tensor(name), atol=1e-6), name
        assert np.allclose(ours.tensor(name), original.tensor(name), atol=1e-6) == (
            name not in ours.patches
        )


@pytest.mark.parametrize(
    ("width", "version"),
    [(32, None), (32, "0.18.1"), (32, "0.21.2"), (48, "0.18.1"), (48, "0.19.0")],
)
def test_experts_as_one_parameter(tmp_path, width, version):
    """The same without peft, against a loop over experts. With a width of 48 shapes alone do not identify tensors."""
    source, rng = tiny_checkpoint(width=width), np.random.default_rng(7)
    experts, H, D, r, E = "model.layers.0.mlp.experts", width, 96, 2, 8
    shapes = [(r * E, D), (2 * H, r * E), (r * E, H), (D, r * E)]
    if turned := version == "0.18.1":
        shapes = [(r * E, 2 * H), (D, r * E), (r * E, D), (H, r * E)]
    names = ("base_layer.lora_A", "base_layer.lora_B", "lora_A", "lora_B")
    tensors = {
        f"base_model.model.{experts}.{name}.weight": rng.normal(0, 0.1, shape).astype("f4")
        for name, shape in zip(names, shapes, strict=True)
    }
    config = CONFIG | {"r": r} | ({} if version is None else {"peft_version": version})
    found = patched(write(tmp_path / "lora", tensors, config), source)
    for e in range(E):
        both, down = (
            sum(8 * np.outer(b[:, i * E + e], a[e * r + i]) for i in range(r))
            for a, b in zip(*[iter(tensors.values())] * 2, strict=True)
        )
        both, down = (both.T, down.T) if turned else (both, down)
        for part, added in (("gate", both[:H]), ("up", both[H:]), ("down", down)):
            name = f"{experts}.{e}.{part}_proj.weight"
            assert np.allclose(found.tensor(name) - source.tensor(name), added, atol=1e-5)


def test_a_directory_that_was_written_anew_is_read_anew(tmp_path):
    """As after further training: the names and shapes are the same."""
    source, experts = tiny_checkpoint(width=32), "model.layers.0.mlp.experts"
    name, added = f"{experts}.3.down_proj.weight", []
    lora = write(tmp_path / "lora", {"none": np.ones(1, "f4")})
    for value in (1, 2):
        tensors = {
            f"base_model.model.{experts}.lora_A.weight": np.full((8, 32), value, "f4"),
            f"base_model.model.{experts}.lora_B.weight": np.ones((96, 8), "f4"),
        }
        save_file(tensors, lora / "adapter_model.safetensors")
        (lora / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 1, "lora_alpha": 1}))
        added.append(patched(lora, source).tensor(name) - source.tensor(name))
    assert np.allclose(added[0], 1, atol=1e-5)
    assert np.allclose(added[1], 2, atol=1e-5)


def test_factors_that_may_be_for_several_parameters(tmp_path):
    experts = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.lora_A.weight": np.ones((32, 96), "f4"), f"{experts}.lora_B.weight": np.ones((96, 32), "f4")
    }  # fmt: skip
    with pytest.raises(
        FormatError, match=r"may be of several parameters of 8 experts of \[48, 96\]"
    ):
        patched(write(tmp_path / "same", tensors), tiny_checkpoint())
    tensors[f"{experts}.lora_B.weight"] = np.ones((95, 32), "f4")
    with pytest.raises(FormatError, match=r"are of no parameters of 8 experts of \[48, 96\]"):
        patched(write(tmp_path / "none", tensors), tiny_checkpoint())


def test_a_folder_of_some_tensors(tmp_path):
    """As in ESFT's checkpoints: only the trained experts, with names that begin at `layers` or `model.layers`."""
    source = tiny_checkpoint()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    folder = tmp_path / "esft"
    folder.mkdir()
    new = source.tensor(name) + 1
    save_file({name.removeprefix("model."): new}, folder / "model.safetensors")
    assert is_partial(folder)
    (folder / "config.json").write_text("{}")
    assert not is_partial(folder)
    (folder / "expert_cfg.json").write_text("{}")
    assert is_partial(folder)
    found = patched(folder, source)
    assert np.array_equal(found.tensor(name), new)
    assert set(found.patches) == {name}
    save_file({"layers.9.x": new}, folder / "more.safetensors")
    with pytest.raises(FormatError, match=r"more.safetensors: layers.9.x: tiny has no such tensor"):
        patched(folder, source)
    save_file({name: new[:2]}, folder / "more.safetensors")
    with pytest.raises(FormatError, match=r"has shape \[2, 96\]; tiny has \[48, 96\]"):
        patched(folder, source)
    save_file({name: new}, folder / "more.safetensors")
    with pytest.raises(FormatError, match="is there twice"):
        patched(folder, source)


def test_what_is_refused(tmp_path):
    source = tiny_checkpoint()
    good = factors(source, Q)
    a, b = sorted(good)
    prefix = "base_model.model."
    cases = [
        (good, {"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported: LORA"),
        (good, {"use_dora": True}, "use_dora is not supported"),
        (good, {"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16' changes the model"),
        (good, {"init_lora_weights": "OLoRA"}, "init_lora_weights 'OLoRA' changes the model"),
        (good, {"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        (good, {"bias": "all"}, "bias 'all' is not supported, only none"),
        (good, {"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        (good, {"r": 0}, "r: expected a whole number from 1"),
        (good, {"r": 8}, "its rank is 8, its factors have 4"),
        (good, {"lora_alpha": "x"}, "lora_alpha: expected a finite number"),
        (good, {"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: expected a finite number, got 'x'"),
        (good, {"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern: expected a finite number"),
        (good, {"rank_pattern": {"(a+)+$": 4}}, "rank_pattern: expected names of modules"),
        (good, {"rank_pattern": [1]}, "rank_pattern: expected names of modules"),
        ({a: good[a]}, {}, "expected lora_A and lora_B, got lora_A alone"),
        ({a: good[a][:2], b: good[b]}, {}, r"factors of shapes \[2, 96\] and \[96, 4\] do not fit"),
        ({a: good[a][:, :5].copy(), b: good[b]}, {}, r"is for a tensor of shape \[96, 5\]; tiny has \[96, 96\]"),
        ({k.replace("q_proj", "z_proj"): v for k, v in good.items()}, {}, "tiny has no tensor .*z_proj.weight"),
        ({**good, f"{prefix}what.lora_magnitude_vector": good[a]}, {}, "tiny has no tensor what.lora_magnitude"),
        ({**good, f"{prefix}{Q}.weight": source.tensor(f"{Q}.weight")}, {}, "has factors and is there as a whole"),
        ({a: good[a], b: good[b].astype("i4")}, {}, "dtype I32 is not supported"),
        (
            {f"{prefix}{Q}.{part}weight": source.tensor(f"{Q}.weight") for part in ("", "modules_to_save.")}, {},
            r"self_attn.q_proj.weight: is there twice",
        ),
    ]  # fmt: skip
    for i, (tensors, config, message) in enumerate(cases):
        folder = write(tmp_path / f"x{i}", tensors, CONFIG | config)
        with pytest.raises(FormatError) as caught:
            patched(folder, source)
        assert re.search(message, str(caught.value)), (message, str(caught.value))
        assert "\n" not in str(caught.value)
    (tmp_path / "x0" / "adapter_model.safetensors").unlink()
    (tmp_path / "x0" / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        FormatError, match="no adapter_model.safetensors; only safetensors are supported"
    ):
        patched(tmp_path / "x0", source)
    (tmp_path / "x0" / "adapter_config.json").write_text("[")
    with pytest.raises(FormatError, match="not valid JSON"):
        patched(tmp_path / "x0", source)
