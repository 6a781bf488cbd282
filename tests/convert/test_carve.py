"""Carving a dense model into experts changes its form and not its function; the result is Qwen2-MoE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save
from tiny_llama import save_gguf, save_hf, tiny_llama, tiny_tokenizer
from transformers import Qwen2MoeForCausalLM

from edgemoe.convert.carve.carve import carve, default_widths
from edgemoe.convert.carve.llama import head, hidden_states
from edgemoe.convert.carve.partition import partition
from edgemoe.convert.checkpoint import Checkpoint
from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.lab.quality.text import default_text

_IDS = np.random.default_rng(0).integers(0, 298, (3, 40))
_WIDTHS: dict[str, Any] = {"num_experts": 4, "shared": 32}  # 32 + 4 x 16 of 96


def exact_logits(model: torch.nn.Module, ids: NDArray[np.int64] = _IDS) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits)


def as_transformers(checkpoint: Checkpoint, path: Path) -> Qwen2MoeForCausalLM:
    """Writes a checkpoint as a directory and lets transformers load it."""
    path.mkdir()
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    assert {name: t.shape for name, t in tensors.items()} == checkpoint.shapes
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    model, report = Qwen2MoeForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def write_update(path: Path, *, rank: int = 3, codes: bool = False, **changes: Any) -> Path:
    """Writes a random update for the tiny model; `changes` replaces tensors, or leaves them out where None."""
    rng = np.random.default_rng(5)
    tensors: dict[str, Any] = {"norm": rng.normal(1, 0.1, 64).astype(np.float32)}
    sizes = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
    for layer in range(2):
        p = f"layers.{layer}."
        labels = np.repeat(np.arange(5), [32, 16, 16, 16, 16]).astype(np.uint8)
        tensors[p + "assign"] = rng.permutation(labels)
        tensors[p + "router"] = rng.normal(0, 1e-3, (4, 64)).astype(np.float32)
        for norm in ("input_norm", "post_norm"):
            tensors[p + norm] = rng.normal(1, 0.1, 64).astype(np.float32)
        for matrix, (rows, columns) in sizes.items():
            a, b = rng.normal(0, 0.1, (rank, columns)), rng.normal(0, 0.1, (rows, rank))
            if codes:
                a, b = np.rint(a * 200), np.rint(b * 200)
                tensors[f"{p}{matrix}.scale"] = np.full(rank, 1 / 40000, np.float32)
            kind = np.int8 if codes else np.float16
            tensors[f"{p}{matrix}.A"], tensors[f"{p}{matrix}.B"] = a.astype(kind), b.astype(kind)
    tensors = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
    save_file(tensors, path, metadata={"experts": "4", "shared": "32"})
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"head_dim": 24, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0}},
    ],
)
def test_dense_pass_agrees_with_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(**changes)
    dense = HFCheckpoint(save_hf(model, tmp_path))
    logits = hidden_states(dense, _IDS) @ head(dense).T
    np.testing.assert_allclose(logits, exact_logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_with_all_experts_it_is_the_dense_model(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    dense = HFCheckpoint(save_hf(model, tmp_path / "dense"))
    carved = as_transformers(carve(dense, active=4, **_WIDTHS), tmp_path / "carved")
    expected = exact_logits(model)
    error = np.abs(exact_logits(carved) - expected).max() / np.abs(expected).max()
    # The only difference is the softmax of the router's small logits, which is not exactly 1 / E.
    assert error < 0.02


def test_the_router_chooses_better_than_its_opposite(tmp_path: Path) -> None:
    model = tiny_llama()
    dense = HFCheckpoint(save_hf(model, tmp_path / "dense"))
    carved = carve(dense, active=2, calibration=[int(i) for i in _IDS.ravel()], **_WIDTHS)
    expected = exact_logits(model)
    ours = as_transformers(carved, tmp_path / "carved")
    error = np.square(exact_logits(ours) - expected).mean()
    for layer in ours.model.layers:  # the opposite choice
        layer.mlp.gate.weight.data.neg_()
    assert error < 0.95 * np.square(exact_logits(ours) - expected).mean()


@pytest.mark.parametrize("codes", [False, True])
def test_an_update_is_applied_before_cutting(codes: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    dense = HFCheckpoint(save_hf(model, tmp_path / "dense"))
    path = write_update(tmp_path / "update.safetensors", codes=codes)
    carved = as_transformers(carve(dense, update=path, active=4), tmp_path / "carved")
    update = load_file(path)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.from_numpy(update["norm"]))
        for i, layer in enumerate(model.model.layers):
            p = f"layers.{i}."
            layer.input_layernorm.weight.copy_(torch.from_numpy(update[p + "input_norm"]))
            layer.post_attention_layernorm.weight.copy_(torch.from_numpy(update[p + "post_norm"]))
            for matrix in ("gate", "up", "down"):
                low_rank = update[f"{p}{matrix}.B"].astype(np.float32) @ update[
                    f"{p}{matrix}.A"
                ].astype(np.float32)
                scale = 1 / 40000 if codes else 1
                getattr(layer.mlp, f"{matrix}_proj").weight += torch.from_numpy(low_rank * scale)
            np.testing.assert_array_equal(
                carved.model.layers[i].mlp.gate.weight, update[p + "router"]
            )
    expected = exact_logits(model)
    error = np.abs(exact_logits(carved) - expected).max() / np.abs(expected).max()
    assert error < 0.02


def test_gguf_and_directory_carve_alike(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    first = carve(HFCheckpoint(save_hf(model, tmp_path / "dense")), **_WIDTHS)
    second = carve(GGUFCheckpoint(save_gguf(model, tmp_path / "dense.gguf")), **_WIDTHS)
    assert first.shapes == second.shapes
    for name in first.shapes:
        np.testing.assert_array_equal(first.tensor(name), second.tensor(name), err_msg=name)


def test_the_converter_takes_it(tmp_path: Path) -> None:
    carved = carve(HFCheckpoint(save_hf(tiny_llama(), tmp_path)), **_WIDTHS)
    config = SourceModel(carved).config
    assert (config.num_experts, config.expert_hidden, config.experts_per_token) == (4, 16, 2)
    assert config.shared_hidden == (32, 32)
    assert (config.family, config.tied, config.eos_ids) == ("qwen2_moe", False, (1,))


def test_reports_every_layer(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path))
    carve(dense, progress=lambda done, total: seen.append((done, total)), **_WIDTHS)
    assert seen == [(1, 2), (2, 2)]


def test_partition_finds_neurons_that_act_together() -> None:
    rng = np.random.default_rng(0)
    topic = np.repeat(np.arange(4), 50)
    x = np.eye(4, 8, dtype=np.float32)[topic] + rng.normal(0, 0.05, (200, 8)).astype(np.float32)
    group = rng.permutation(np.repeat(np.arange(5), 8))  # 0: always on
    is_on = (group == 0) | (group == 1 + topic[:, None])
    inner = (rng.uniform(1, 2, (200, 40)) * is_on * np.where(group == 0, 3, 1)).astype(np.float32)
    found = partition(x, inner, np.ones((8, 40), np.float32), num_experts=4, shared=8, seed=0)
    assert set(np.flatnonzero(found.labels == 0)) == set(np.flatnonzero(group == 0))
    for expert in range(1, 5):
        assert len(set(group[found.labels == expert])) == 1
    # The router chooses, for every token, the expert that holds its neurons.
    chosen = 1 + (x @ found.router.T).argmax(axis=1)
    owner = {group[found.labels == e][0]: e for e in range(1, 5)}
    assert all(c == owner[1 + t] for c, t in zip(chosen, topic, strict=True))


def test_partition_copes_with_neurons_that_never_act() -> None:
    x = np.ones((10, 8), np.float32)
    found = partition(
        x, np.zeros((10, 12), np.float32), np.ones((8, 12), np.float32),
        num_experts=4, shared=4, seed=0,
    )  # fmt: skip
    assert np.bincount(found.labels).tolist() == [4, 2, 2, 2, 2]
    assert np.isfinite(found.router).all()


@pytest.mark.parametrize(
    ("intermediate", "experts", "expected"),
    [
        (1536, None, (16, 512)),
        (5632, None, (16, 1536)),
        (14336, None, (16, 5120)),
        (11008, 8, (8, 3840)),
        (96, None, (16, 32)),
    ],
)
def test_default_widths(intermediate: int, experts: int | None, expected: tuple[int, int]) -> None:
    assert default_widths(intermediate, experts) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 6}, "must be a power of two"),
        ({"num_experts": 0}, "must be a power of two"),
        ({"num_experts": 4, "shared": 33}, "cannot divide evenly"),
        ({"num_experts": 4, "shared": 96}, "cannot divide evenly"),
        ({"num_experts": 4, "active": 5}, "active must be from 1 to 4"),
        ({"num_experts": 4, "active": 0}, "active must be from 1 to 4"),
        ({"calibration": [5, 298, 400]}, "token ids from 0 to 299"),
        ({"calibration": []}, "token ids from 0 to 299"),
    ],
)
def test_refuses_senseless_arguments(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        carve(dense, **arguments)
    assert not isinstance(caught.value, FormatError)


def test_an_update_fixes_the_widths(tmp_path: Path) -> None:
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path / "dense"))
    path = write_update(tmp_path / "update.safetensors")
    assert carve(dense, update=path, num_experts=4).config["num_experts_per_tok"] == 2
    with pytest.raises(ValueError, match="is for 4 experts and 32 shared"):
        carve(dense, update=path, num_experts=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": None},
        {"norm": np.full(64, np.nan, np.float32)},
        {"layers.1.assign": np.zeros(96, np.uint8)},
        {"layers.1.assign": np.full(96, 200, np.uint8)},
        {"layers.1.assign": np.full(96, -1, np.int8)},
        {"layers.1.assign": np.full(96, 1e30)},
        {"layers.1.assign": np.repeat([0, 1, 2, 3.5, 4], [32, 16, 16, 16, 16])},
        {"layers.0.router": np.full((4, 64), 1e300)},
        {"layers.0.router": np.zeros((4, 64), np.complex64)},
        {"layers.0.router": np.zeros((5, 64), np.float32)},
        {"layers.0.up.B": np.zeros((96, 2), np.float16)},
        {"layers.0.up.A": np.zeros((), np.float16)},
        {"layers.0.down.A": None},
    ],
)
def test_refuses_an_update_for_another_model(changes: dict[str, Any], tmp_path: Path) -> None:
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path / "dense"))
    path = write_update(tmp_path / "update.safetensors", **changes)
    with pytest.raises(FormatError, match=r"update\.safetensors: (norm|layers\.\d)"):
        carve(dense, update=path)


@pytest.mark.parametrize("experts", ["-2", "0", "97", "4000000000000", "9" * 4000, "four"])
@pytest.mark.parametrize("key", ["experts", "shared"])
def test_refuses_sizes_that_no_update_has(key: str, experts: str, tmp_path: Path) -> None:
    path = write_update(tmp_path / "update.safetensors")
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"experts": "4", "shared": "32", key: experts})
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path / "dense"))
    with pytest.raises(FormatError, match=r"update\.safetensors: "):
        carve(dense, update=path)


def test_refuses_a_file_that_is_no_update(tmp_path: Path) -> None:
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path / "dense"))
    with pytest.raises(FormatError, match="not a carving update"):
        carve(dense, update=tmp_path / "dense" / "model.safetensors")
    typed = {"norm": torch.ones(64, dtype=torch.bfloat16)}
    for content in (b"x", save(typed, {"experts": "4", "shared": "32"})):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(FormatError, match="x: not a carving update"):
            carve(dense, update=tmp_path / "x")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "cannot be carved; supported: 'llama'"),
        ("attention_bias", True, "cannot be carved"),
        ("hidden_act", "gelu", "hidden_act: must be 'silu'"),
        ("intermediate_size", 95, "gate_proj.weight must be"),
        ("hidden_size", None, "hidden_size: is missing"),
    ],
)
def test_says_which_dense_models_it_takes(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    save_hf(tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(FormatError, match=message):
        carve(HFCheckpoint(tmp_path))


def test_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(FormatError, match="layer 1 computes NaN or infinity"):
        carve(HFCheckpoint(save_hf(model, tmp_path)), **_WIDTHS)


def test_refuses_tensors_that_it_would_leave_out(tmp_path: Path) -> None:
    save_hf(tiny_llama(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # Only a later layer has a bias: that the first has none must not decide.
    extra = {"model.layers.1.self_attn.q_proj.bias": np.ones(64, np.float32)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    with pytest.raises(
        FormatError, match=r"not part of .* llama: tensor .*1\.self_attn\.q_proj\.bias"
    ):
        carve(HFCheckpoint(tmp_path), **_WIDTHS)
    old = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    save_file({**tensors, **old}, tmp_path / "model.safetensors")
    carve(HFCheckpoint(tmp_path), **_WIDTHS)


def test_a_wrong_head_size_takes_no_memory(tmp_path: Path) -> None:
    save_hf(tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 1 << 48}))
    with pytest.raises(FormatError, match="q_proj.weight must be"):
        carve(HFCheckpoint(tmp_path), **_WIDTHS)


def test_a_tokenizers_truncation_does_not_shorten_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_hf(tiny_llama(), tmp_path)
    seen = []
    monkeypatch.setattr(
        sys.modules["edgemoe.convert.carve.carve"],
        "hidden_states",
        lambda dense, ids, on_ffn: seen.append(ids),
    )
    carve(HFCheckpoint(tmp_path), **_WIDTHS)
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    carve(HFCheckpoint(tmp_path), **_WIDTHS)
    np.testing.assert_array_equal(seen[0], seen[1])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match=r"tokenizer\.json: "):
        carve(HFCheckpoint(tmp_path), **_WIDTHS)


def test_needs_a_tokenizer_for_a_text_only(tmp_path: Path) -> None:
    save_hf(tiny_llama(), tmp_path)
    ids = tiny_tokenizer().encode("some words").ids
    (tmp_path / "tokenizer.json").unlink()
    dense = HFCheckpoint(tmp_path)
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        carve(dense, **_WIDTHS)
    carve(dense, calibration=ids, **_WIDTHS)


def test_only_calibration_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    dense = HFCheckpoint(save_hf(tiny_llama(), tmp_path / "dense"))
    carve(dense, update=write_update(tmp_path / "update.safetensors"))
    with pytest.raises(ImportError, match=r"pip install 'edgemoe\[demo\]'"):
        carve(dense, **_WIDTHS)


def test_the_texts_share_no_sentence() -> None:
    held_out = default_text()
    package = Path(sys.modules["edgemoe.convert"].__path__[0])
    calibration = (package / "data" / "calibration.txt").read_text(encoding="utf-8")
    # The texts are addresses that begin alike: "Fellow-Citizens of the Senate and House of Representatives".
    windows = {held_out[i : i + 100] for i in range(len(held_out) - 100)}
    assert not any(calibration[i : i + 100] in windows for i in range(len(calibration) - 100))
