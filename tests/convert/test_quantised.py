"""Quantised checkpoints read as the floats that they encode; contradictory ones are refused in one line."""

from __future__ import annotations

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from edgemoe.config import dense_tensors
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.quantised import METHODS
from edgemoe.convert.quantised.numbers import E4M3, E8M0
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError

Tensors = dict[str, torch.Tensor]


def opened(path: Path, tensors: Tensors, **quantisation: Any) -> HFCheckpoint:
    path.mkdir(exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, path / "model.safetensors")
    config = {"model_type": "mixtral", "quantization_config": quantisation}
    (path / "config.json").write_text(json.dumps(config))
    return HFCheckpoint(path)


def refused(path: Path, tensors: Tensors, **quantisation: Any) -> str:
    with pytest.raises(FormatError) as error:
        opened(path, tensors, **quantisation)
    assert "\n" not in str(error.value)
    return str(error.value)


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (100 * noise).clamp(-448, 448).to(torch.float8_e4m3fn)


def words(rows: list[list[int]]) -> torch.Tensor:
    """Returns words [R, N]; the eight hexadecimal digits of each are codes, of which the last digit is the first."""
    return torch.tensor(np.array(rows, np.uint32).view(np.int32))


def test_every_code_of_the_small_floats() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(E8M0, codes.view(torch.float8_e8m0fnu).float().numpy())
    assert E4M3[[0x7E, 0x08, 0x01, 0x80 + 0x38]].tolist() == [448, 2**-6, 2**-9, -1]


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 1, 0, 0] = 0x7A  # the low half is first: -1, then 6
    blocks[0, 1, 0, 15] = 0x91  # .5, then -.5
    scales = torch.tensor([[[127], [129]]], dtype=torch.uint8)
    tensors = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}
    checkpoint = opened(tmp_path, tensors, quant_method="mxfp4")
    assert checkpoint.shapes == {"e.down_proj.0": (32, 2)}
    got = checkpoint.tensor("e.down_proj.0")
    assert got.flags.c_contiguous
    assert got[:, 1].tolist() == [-4.0, 24.0, *[0.0] * 28, 2.0, -2.0]
    assert not got[:, 0].any()


def test_mxfp4_as_transformers_unpacks_it(tmp_path: Path) -> None:
    blocks, scales = random_bytes(3, 6, 2, 16), 117 + random_bytes(3, 6, 2, seed=1) % 20
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    checkpoint = opened(tmp_path, tensors, quant_method="mxfp4", modules_to_not_convert=["x"])
    assert checkpoint.config == {"model_type": "mixtral"}
    assert dict(checkpoint.shapes) == {f"e.gate_up_proj.{i}": (64, 6) for i in range(3)}
    for i in range(3):
        np.testing.assert_array_equal(checkpoint.tensor(f"e.gate_up_proj.{i}"), expected[i].numpy())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_of_which_the_last_are_partial(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    weight = fp8(130, 200)
    scale = torch.tensor([[0.5, 2.0], [4.0, 0.25]]).to(scale_dtype)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": torch.ones(3)}
    checkpoint = opened(
        tmp_path, tensors, quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128]
    )
    got = checkpoint.tensor("a.weight")
    plain = weight.float().numpy()
    assert dict(checkpoint.shapes) == {"a.weight": (130, 200), "b.weight": (3,)}
    assert got[0, 127] == plain[0, 127] * 0.5
    assert got[0, 128] == plain[0, 128] * 2.0
    assert got[128, 0] == plain[128, 0] * 4.0
    assert got[129, 199] == plain[129, 199] * 0.25
    expected = _dequantize_fp8_weight(weight, scale.float(), [128, 128], torch.float32)
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (1, 1)])
def test_fp8_with_a_scale_for_a_row_or_the_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = fp8(6, 5), 0.5 + torch.rand(shape)
    expected = weight.float() * (scale.reshape(-1, 1) if scale.ndim else scale)
    for name, method in (("weight_scale_inv", "fp8"), ("weight_scale", "fbgemm_fp8")):
        tensors = {"a.weight": weight, f"a.{name}": scale, "a.activation_scale": torch.ones(1)}
        checkpoint = opened(tmp_path, tensors, quant_method=method)
        assert dict(checkpoint.shapes) == {"a.weight": (6, 5)}
        np.testing.assert_array_equal(checkpoint.tensor("a.weight"), expected.numpy())


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 1, 1), (3,), ()])
def test_fp8_in_stacks(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = fp8(3, 6, 5), 0.5 + torch.rand(shape)
    tensors = {"e.down_proj": weight, "e.down_proj_scale_inv": scale}
    checkpoint = opened(tmp_path, tensors, quant_method="fp8", weight_block_size=[4, 4])
    for i in range(3):
        one = scale[i] if scale.ndim else scale
        blocks = [4, 4] if one.numel() > 1 else None
        expected = _dequantize_fp8_weight(weight[i], one, blocks, torch.float32)
        np.testing.assert_array_equal(checkpoint.tensor(f"e.down_proj.{i}"), expected.numpy())


def nvfp4(global_name: str, global_scale: float) -> Tensors:
    packed = torch.zeros(2, 16, dtype=torch.uint8)
    packed[1, 7], packed[1, 8] = 0x0F, 0x32  # the last but one of the first group, two of the next
    scale = torch.tensor([[1.0, 2.0], [3.0, 0.5]]).to(torch.float8_e4m3fn)
    return {"packed": packed, "scale": scale, global_name: torch.tensor([global_scale])}


def test_nvfp4_by_hand(tmp_path: Path) -> None:
    """In the files of both makers: one multiplies by the second scale, the other divides by it."""
    expected = np.zeros((2, 32), np.float32)
    expected[1, 14] = -6 * 3 * 0.25
    expected[1, 16:18] = 1 * 0.5 * 0.25, 1.5 * 0.5 * 0.25
    raw = nvfp4("whole", 0.25)
    tensors = {
        "a.weight": raw["packed"],
        "a.weight_scale": raw["scale"],
        "a.weight_scale_2": raw["whole"],
        "a.input_scale": torch.ones(1),
        "self_attn.k_proj.k_scale": torch.ones(1),
        "b.weight": fp8(2, 3),
        "b.weight_scale": torch.tensor(2.0),
    }
    checkpoint = opened(tmp_path / "m", tensors, quant_method="modelopt", quant_algo="NVFP4")
    assert dict(checkpoint.shapes) == {"a.weight": (2, 32), "b.weight": (2, 3)}
    np.testing.assert_array_equal(checkpoint.tensor("a.weight"), expected)
    np.testing.assert_array_equal(checkpoint.tensor("b.weight"), 2 * fp8(2, 3).float().numpy())
    raw = nvfp4("whole", 4.0)
    tensors = {
        "a.weight_packed": raw["packed"],
        "a.weight_scale": raw["scale"],
        "a.weight_global_scale": raw["whole"],
        "a.input_global_scale": torch.ones(1),
    }
    settings = compressed("nvfp4-pack-quantized", type="float", num_bits=4, group_size=16)
    np.testing.assert_array_equal(
        opened(tmp_path / "c", tensors, **settings).tensor("a.weight"), expected
    )


def test_modelopt_may_say_so_in_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {"b.weight": fp8(2, 3), "b.weight_scale": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert HFCheckpoint(tmp_path).shapes == {"b.weight": (2, 3)}
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": []}')
    with pytest.raises(FormatError, match="quantization must be an object"):
        HFCheckpoint(tmp_path)


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 8}


def packed_int4() -> Tensors:
    return {
        "a.weight_packed": words([[0x76543210, 0xFEDCBA98]]),
        "a.weight_scale": torch.tensor([[0.5, 2.0]]),
        "a.weight_shape": torch.tensor([1, 16]),
    }


def test_compressed_int4_by_hand(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, packed_int4(), **compressed("pack-quantized", **INT4))
    got = checkpoint.tensor("a.weight")
    assert got[0, :8].tolist() == [(i - 8) * 0.5 for i in range(8)]
    assert got[0, 8:].tolist() == [i * 2.0 for i in range(8)]
    tensors = packed_int4() | {"a.weight_zero_point": words([[0x3, 0x5]])}
    settings = compressed("pack-quantized", **INT4, symmetric=False)
    got = opened(tmp_path, tensors, **settings).tensor("a.weight")
    assert got[0, :8].tolist() == [(i - 3) * 0.5 for i in range(8)]
    assert got[0, 8:].tolist() == [(i + 3) * 2.0 for i in range(8)]
    tensors = packed_int4() | {"a.weight_g_idx": torch.tensor([0, 1] * 8, dtype=torch.int32)}
    got = opened(tmp_path, tensors, **compressed("pack-quantized", **INT4)).tensor("a.weight")
    assert got[0].tolist() == [(i - 8) * (2.0 if i % 2 else 0.5) for i in range(16)]


def test_gptq_by_hand(tmp_path: Path) -> None:
    """Inputs are along the first axis, and zero points are stored less one."""
    outputs = 8
    codes = np.array([[(c + r) % 16 for r in range(outputs)] for c in range(16)], np.uint32)
    packed = np.zeros((2, outputs), np.uint32)
    for c in range(16):
        packed[c // 8] |= codes[c] << np.uint32(4 * (c % 8))
    zeros = words([[0x76543210], [0x88888888]])  # of output r: r, and 8
    scales = torch.tensor([[0.5] * outputs, [2.0] * outputs]).half()
    tensors = {
        "a.qweight": torch.tensor(packed.view(np.int32)),
        "a.qzeros": zeros,
        "a.scales": scales,
        "a.g_idx": torch.tensor([0] * 8 + [1] * 8, dtype=torch.int32),
    }
    got = opened(tmp_path, tensors, quant_method="gptq", bits=4, group_size=8).tensor("a.weight")
    assert got.shape == (outputs, 16)
    for r in range(outputs):
        for c in range(16):
            zero = (r if c < 8 else 8) + 1
            assert got[r, c] == (int(codes[c, r]) - zero) * (0.5 if c < 8 else 2.0)
    del tensors["a.g_idx"]
    checkpoint = opened(tmp_path, tensors, quant_method="gptq", bits=4, checkpoint_format="gptq_v2")
    np.testing.assert_array_equal(
        checkpoint.tensor("a.weight") - got, np.repeat([[0.5, 2.0]], 8, axis=1).repeat(outputs, 0)
    )
    order = torch.tensor([1, 0] * 8, dtype=torch.int32)  # desc_act: groups are not neighbours
    got = opened(
        tmp_path, tensors | {"a.g_idx": order}, quant_method="gptq", bits=4, desc_act=True
    ).tensor("a.weight")
    assert got[3, 0] == (3 - 9) * 2.0
    assert got[3, 1] == (4 - 4) * 0.5
    checkpoint = opened(tmp_path, tensors | {"a.g_idx": order + 1}, quant_method="gptq", bits=4)
    with pytest.raises(FormatError, match=r"a\.weight: is in groups from 1 to 2; there are 2"):
        checkpoint.tensor("a.weight")


def test_awq_by_hand(tmp_path: Path) -> None:
    """A word holds outputs 0, 2, 4, 6, 1, 3, 5, 7, the first in its lowest bits."""
    tensors = {
        "a.qweight": words([[0x76543210], [0xFEDCBA98]]),
        "a.qzeros": words([[0x00000008]]),
        "a.scales": torch.tensor([[0.5, 1, 1, 1, 1, 1, 1, 2]]),
    }
    got = opened(tmp_path, tensors, quant_method="awq", bits=4, version="gemm").tensor("a.weight")
    assert got[:, 0].tolist() == [-8 * 0.5, 4, 1, 5, 2, 6, 3, 7 * 2]
    assert got[:, 1].tolist() == [0, 12, 9, 13, 10, 14, 11, 15 * 2]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "group_size": 16, "strategy": "group"}),
        (
            "pack-quantized",
            {"num_bits": 4, "group_size": 16, "strategy": "group", "symmetric": False},
        ),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 2, "group_size": 32, "strategy": "group"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]},
        ),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
        ),
        (
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"},
        ),
    ],
)
def test_what_compressed_tensors_writes(name: str, weights: dict[str, Any], tmp_path: Path) -> None:
    """Packed by the library and unpacked by its formulas. It is no dependency: pip install compressed-tensors."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert library.__version__
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    args = scheme.weights
    rows, columns = 16, 64
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    strategy = weights["strategy"]
    shape = {
        "channel": (rows, 1),
        "tensor": (1,),
        "block": (rows // 8, columns // 16),
    }.get(strategy) or (rows, columns // weights["group_size"])
    scale = 0.02 + 0.2 * torch.rand(shape)
    state = {"weight": weight, "weight_scale": scale}
    if name.startswith("mxfp4"):
        state["weight_scale"] = torch.exp2(torch.round(torch.log2(scale)))
    if name.startswith("nvfp4"):
        state["weight_scale"], state["weight_global_scale"] = scale * 100, torch.tensor([100.0])
    state["weight_zero_point"] = torch.randint(-8, 8, shape).to(torch.int8)
    if weights.get("symmetric", True):
        del state["weight_zero_point"]
    compressor = BaseCompressor.load_from_registry(name)
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(packed, scheme)["weight"].float().numpy()
    stored = {f"a.{key}": value for key, value in packed.items()}
    got = opened(tmp_path, stored, **compressed(name, **weights)).tensor("a.weight")
    # The library computes in the scale's type, which is bfloat16 for 4-bit floats.
    np.testing.assert_allclose(got, expected, rtol=2**-7 if "fp4" in name else 0)
    assert np.abs(got).max() > 0.1
    assert args.num_bits == weights["num_bits"]


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"bits": 4}, "config.json: quantization_config: quant_method: is missing"),
        ({"quant_method": "aqlm"}, "quant_method: 'aqlm' is not supported; supported: awq, comp"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: 'e5m2' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [1]}, "weight_block_size: expected two"),
        ({"quant_method": "gptq", "bits": 3}, "bits: 3 is not supported; supported: 2, 4, 8"),
        ({"quant_method": "gptq"}, "quantization_config: bits: is missing"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' is not"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": 1}}, "dynamic: bits that differ"),
        ({"quant_method": "awq", "bits": 8}, "bits: 8 is not supported; supported: 4"),
        ({"quant_method": "awq", "version": "gemv"}, "version: 'gemv' is not supported"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "quant_algo: 'W4A8' is not"),
        ({"quant_method": "compressed-tensors"}, "config_groups: is missing"),
        (compressed("marlin-24", **INT4), "format: 'marlin-24' is not supported; supported: dense"),
        (compressed("pack-quantized", type="int", num_bits=3), "num_bits: 3 of int is not"),
        (compressed("pack-quantized", type="log"), "group_0: weights: type: 'log' is not"),
        (
            {**compressed("dense"), "sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity_config: format: 'sparse-bitmask' is not supported",
        ),
        (
            {**compressed("dense"), "transform_config": {"config_groups": {"u": {}}}},
            "transform_config: config_groups: weights that were rotated",
        ),
    ],
)
def test_unknown_methods_and_values_are_named(
    quantisation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, {"a.weight": torch.ones(2)}, **quantisation)


NIBBLES = torch.zeros(2, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("quantisation", "tensors", "message"),
    [
        (FP8_CONFIG, {"a.weight": fp8(4, 4)}, "a.weight: is quantised, and there is no a.weight_s"),
        (
            FP8_CONFIG,
            {"a.weight": fp8(256, 4), "a.weight_scale_inv": torch.ones(3, 1)},
            "a.weight_scale_inv: expected scales for blocks of 128 x 128 of [256, 4], got shape [3",
        ),
        (
            {"quant_method": "fp8"},
            {"a.weight": fp8(4, 6), "a.weight_scale": torch.ones(3, 5)},
            "a.weight_scale: expected scales for its rows or the whole of it of [4, 6], got shape",
        ),
        (FP8_CONFIG, {"a.weight": NIBBLES}, "a.weight: dtype U8 is not supported"),
        ({"quant_method": "mxfp4"}, {"a_blocks": NIBBLES[None, None]}, "there is no a_scales"),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": NIBBLES[None, None], "a_scales": torch.ones(2, 2, 2, dtype=torch.uint8)},
            "a_scales: expected shape [1, 1, 2], got [2, 2, 2]",
        ),
        (
            {"quant_method": "mxfp4"},
            {"a_blocks": NIBBLES[None], "a_scales": NIBBLES},
            "a_blocks: expected shape [experts, rows, blocks, 16], got [1, 2, 16]",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {"a.weight": NIBBLES, "a.weight_scale": fp8(2, 2)},
            "a.weight: is quantised, and there is no a.weight_scale_2",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            {
                "a.weight": NIBBLES,
                "a.weight_scale": fp8(2, 3),
                "a.weight_scale_2": torch.tensor(1.0),
            },
            "a.weight_scale: expected shape [2, 2], got [2, 3]",
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            {"a.qweight": words([[0] * 8]), "a.scales": torch.ones(1, 8)},
            "a.qweight: is quantised, and there is no a.qzeros",
        ),
        (
            {"quant_method": "awq"},
            {"a.qweight": words([[0]]), "a.qzeros": words([[0]]), "a.scales": torch.ones(1, 7)},
            "a.scales: expected shape [1, 8], got [1, 7]",
        ),
        (
            compressed("pack-quantized", **INT4, symmetric=False),
            packed_int4(),
            "a.weight_packed: is quantised, and there is no a.weight_zero_point",
        ),
        (
            compressed("pack-quantized", **INT4),
            packed_int4() | {"a.weight_shape": torch.tensor([1, 20])},
            "a.weight_packed: shape [1, 2] is not that of 1 x 20 codes of 4 bits",
        ),
        (
            compressed("pack-quantized", **INT4),
            packed_int4() | {"a.weight_shape": torch.tensor([0, 0])},
            "a.weight_shape: is 0, as where the weights have not been fetched",
        ),
        (
            compressed("pack-quantized", **INT4),
            packed_int4() | {"a.weight": torch.ones(1)},
            "a.weight: is stored twice",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_named(
    quantisation: dict[str, Any], tensors: Tensors, message: str, tmp_path: Path
) -> None:
    assert message in refused(tmp_path, tensors, **quantisation)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    tensors = {"a.weight": fp8(4, 4), "a.weight_scale_inv": torch.tensor([[value]])}
    checkpoint = opened(tmp_path, tensors, **FP8_CONFIG)
    with pytest.raises(FormatError, match=r"a\.weight_scale_inv: holds NaN or infinity"):
        checkpoint.tensor("a.weight")


def test_scales_that_lead_beyond_floats_are_left_to_who_reads_them(tmp_path: Path) -> None:
    """There is no warning; `SourceModel` then says in one line that a tensor holds infinity."""
    tensors = {"a.weight": fp8(4, 4), "a.weight_scale_inv": torch.tensor([[3e38]])}
    assert np.isinf(opened(tmp_path, tensors, **FP8_CONFIG).tensor("a.weight")).any()


def test_the_power_of_two_that_is_no_number_is_refused(tmp_path: Path) -> None:
    scales = torch.full((1, 1, 2), 255, dtype=torch.uint8)
    tensors = {"a_blocks": NIBBLES[None, None], "a_scales": scales}
    checkpoint = opened(tmp_path, tensors, quant_method="mxfp4")
    with pytest.raises(FormatError, match=r"a_scales\.0: holds NaN or infinity"):
        checkpoint.tensor("a.0")


def test_the_text_models_section_is_found(tmp_path: Path) -> None:
    tensors = {"a.weight": fp8(4, 4), "a.weight_scale_inv": torch.ones(1, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"text_config": {"hidden_size": 4, "quantization_config": FP8_CONFIG}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = HFCheckpoint(tmp_path)
    assert checkpoint.config == {"text_config": {"hidden_size": 4}}
    np.testing.assert_array_equal(checkpoint.tensor("a.weight"), fp8(4, 4).float().numpy())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_quantised_model_is_the_model_of_its_decoded_weights(family: str, tmp_path: Path) -> None:
    path, other = families.make(family, tmp_path / "a"), tmp_path / "b"
    plain = load_file(path / "model.safetensors")
    tensors, decoded = {}, {}
    for name, t in plain.items():
        tensors[name] = decoded[name] = t
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            scale = t.abs().max() / 448
            tensors[name] = (t / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
            decoded[name] = tensors[name].float() * scale
    config = json.loads((path / "config.json").read_text())
    save_file(decoded, path / "model.safetensors", {"format": "pt"})
    expected = SourceModel(HFCheckpoint(path))
    shutil.copytree(path, other)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": FP8_CONFIG}))
    got = SourceModel(HFCheckpoint(other))
    for name in dense_tensors(expected.config):
        np.testing.assert_array_equal(got.tensor(name), expected.tensor(name), err_msg=name)
    for ours, theirs in zip(got.expert(1, 5), expected.expert(1, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_every_method_says_what_it_reads() -> None:
    assert list(METHODS) == sorted(METHODS)
    assert all(method.title for method in METHODS.values())
