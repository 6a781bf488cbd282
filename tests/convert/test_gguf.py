"""A GGUF file reads as the checkpoint that it was made from; a broken one is refused."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_llama import TEMPLATE, TEXT, save_gguf, tiny_llama, tiny_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from edgemoe.convert.carve.llama import llama_shape
from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.imatrix import read_imatrix
from edgemoe.errors import FormatError
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.settings import model_sampling


@pytest.mark.parametrize("tied", [True, False])
def test_reads_what_transformers_wrote(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    checkpoint = GGUFCheckpoint(save_gguf(model, tmp_path / "tiny.gguf"))
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    assert checkpoint.shapes == {name: tuple(t.shape) for name, t in state.items()}
    for name, values in state.items():
        got = checkpoint.tensor(name)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, values.numpy(), err_msg=name)


def test_its_config_makes_the_same_model(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    checkpoint = GGUFCheckpoint(save_gguf(model, tmp_path / "tiny.gguf"))
    again = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).eval()
    again.load_state_dict({n: torch.from_numpy(checkpoint.tensor(n)) for n in checkpoint.shapes})
    ids = torch.arange(48)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_dequantises(quant: str, tmp_path: Path) -> None:
    model = tiny_llama()
    kind = gguf.GGMLQuantizationType[quant]
    checkpoint = GGUFCheckpoint(save_gguf(model, tmp_path / "tiny.gguf", quant=kind))
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.state_dict()[name].numpy()
    np.testing.assert_array_equal(
        checkpoint.tensor(name), gguf.dequantize(gguf.quantize(weight, kind), kind)
    )


def test_takes_the_licence_beside_it(tmp_path: Path) -> None:
    path = save_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    assert "LICENSE" not in GGUFCheckpoint(path).files
    (tmp_path / "LICENSE").write_text("free")
    assert GGUFCheckpoint(path).files["LICENSE"] == b"free"


def test_tokenizer_encodes_as_the_original(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(save_gguf(tiny_llama(), tmp_path / "tiny.gguf"))
    got = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    expected = tiny_tokenizer()
    # llama.cpp's own expressions for "smollm".
    expected.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(
                Regex(
                    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = [*"ab Z'st129½Ⅷ٣\n\t.,—é漢🙂", " 1", "  ", "'re", "whales", "<|im_end|>"]
    rng = random.Random(0)
    samples = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(500)]
    for text in [TEXT, *samples]:
        ids = got.encode(text).ids
        assert ids == expected.encode(text).ids, text
        assert got.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_config_names_the_special_tokens(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(save_gguf(tiny_llama(), tmp_path / "tiny.gguf"))
    config = json.loads(checkpoint.files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == TEMPLATE
    assert (checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]) == (0, 1)


def test_puts_the_first_token_before_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    path = save_gguf(
        tiny_llama(), tmp_path / "tiny.gguf", changes={"tokenizer.ggml.add_bos_token": True}
    )
    tokenizer = Tokenizer.from_str(GGUFCheckpoint(path).files["tokenizer.json"].decode())
    plain = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode(TEXT).ids == [0, *plain]


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, None),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),  # linear is llama.cpp's default
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "linear"}, 4.0),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scaling.factor": 0.0, "llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 2, "llama.rope.scaling.type": "linear"}, 2.0),
    ],
)
def test_rope_scaling_is_what_llama_cpp_reads(
    changes: dict[str, Any], factor: float | None, tmp_path: Path
) -> None:
    path = save_gguf(tiny_llama(), tmp_path / "tiny.gguf", changes=changes)
    expected = None if factor is None else {"rope_type": "linear", "factor": factor}
    assert GGUFCheckpoint(path).config["rope_scaling"] == expected


@pytest.mark.parametrize("original", [0, 32])
def test_what_a_scaling_is_for_can_be_used(original: int, tmp_path: Path) -> None:
    model = tiny_llama()
    changes = {
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": original,
    }
    dense = GGUFCheckpoint(save_gguf(model, tmp_path / "tiny.gguf", changes=changes))
    stored = dense.config["max_position_embeddings"]
    angles = llama_shape(dense).rope
    assert angles.context_length == max(stored, 4 * (original or stored))


def test_settings_for_sampling_are_kept(tmp_path: Path) -> None:
    """All of them are kept, also those that the sampler does not honour and then names."""
    said = {"penalty_last_n": 32, "temp": 0.5, "top_k": 7, "penalty_repeat": 1.25, "mirostat": 2}
    changes = {f"general.sampling.{name}": value for name, value in said.items()}
    checkpoint = GGUFCheckpoint(save_gguf(tiny_llama(), tmp_path / "x.gguf", changes=changes))
    content = checkpoint.files["generation_config.json"]
    params, notes = model_sampling(content, vocab_size=300, context=64)
    assert params == SamplingParams(temperature=0.5, top_k=7, repeat_penalty=1.25, repeat_last_n=32)
    assert notes == ("generation_config.json: not used here: mirostat 2",)
    plain = GGUFCheckpoint(save_gguf(tiny_llama(), tmp_path / "y.gguf"))
    assert "generation_config.json" not in plain.files


def test_both_ends_of_a_turn_end_it(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.eot_token_id": 7}
    path = save_gguf(tiny_llama(), tmp_path / "tiny.gguf", changes=changes)
    assert GGUFCheckpoint(path).config["eos_token_id"] == [1, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_used_count must be a positive whole number"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.factor is missing"),
        ({"llama.rope.scaling.type": "su"}, "'su' is not supported in GGUF; supported: none, lin"),
        ({"llama.rope.dimension_count": 8}, "must be the head's 16"),
        ({"llama.block_count": None}, "llama.block_count must be a positive whole number"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base must be"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores must hold 298 numbers"),
        (
            {"tokenizer.ggml.model": "bert"},
            "tokenizer 'bert' is not supported in GGUF; supported: gpt2",
        ),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking' is not supported in GGUF; supp"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "the same token twice"),
        ({"tokenizer.ggml.tokens": None}, "tokens must be a list"),
        ({"tokenizer.ggml.merges": ["never seen"]}, "does not fit the vocabulary"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type must hold 298"),
        ({"tokenizer.ggml.eos_token_id": 9000}, "outside the vocabulary"),
        (
            {"split.count": 3},
            "is part None of a split GGUF file, counted from 0; expected the first, N",
        ),
        ({"split.count": 3, "split.no": 0}, "expected the name NAME-00001-of-00003.gguf"),
    ],
)
def test_says_what_it_does_not_support(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_gguf(tiny_llama(), tmp_path / "tiny.gguf", changes=changes)
    with pytest.raises(FormatError, match=message):
        GGUFCheckpoint(path)


def test_refuses_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "gpt.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"gpt\.gguf: architecture 'gpt2' is not supported"):
        GGUFCheckpoint(tmp_path / "gpt.gguf")


def test_refuses_files_of_another_kind(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"PK\x03\x04" * 50):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.gguf: not a readable GGUF file"):
            GGUFCheckpoint(tmp_path / "x.gguf")
    with pytest.raises(FormatError, match="no such file"):
        GGUFCheckpoint(tmp_path / "absent.gguf")


def test_a_cut_or_flipped_file_is_a_format_error_or_still_reads(tmp_path: Path) -> None:
    whole = save_gguf(tiny_llama(), tmp_path / "tiny.gguf").read_bytes()
    header = whole.index(b"output_norm.weight")  # the last of the names, near the header's end
    rng = random.Random(1)
    for _ in range(60):
        broken = bytearray(whole)
        if rng.random() < 0.4:
            del broken[rng.randrange(len(whole)) :]
        else:
            broken[rng.randrange(header)] ^= 1 << rng.randrange(8)
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            checkpoint = GGUFCheckpoint(tmp_path / "broken.gguf")
            for name in checkpoint.shapes:
                checkpoint.tensor(name)
        except FormatError:
            pass


def test_a_big_endian_file_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"x\.gguf: is a big-endian GGUF file; expected a little"):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(FormatError, match=r"x\.gguf: is a git-lfs pointer, not the file"):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_deeply_nested_metadata_is_refused(tmp_path: Path) -> None:
    # A key whose value is an array of one array of one array …
    array = struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQI", 4, 1, 7)
    content = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9) + array
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + content)
    with pytest.raises(FormatError, match=r"x\.gguf: not a readable GGUF file"):
        GGUFCheckpoint(tmp_path / "x.gguf")
    with pytest.raises(FormatError, match=r"x\.gguf: not a readable GGUF file"):
        read_imatrix(tmp_path / "x.gguf")


def dat(name: bytes, values: list[float]) -> bytes:
    head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 1, len(values))
    return head + np.array(values, "<f4").tobytes()


@pytest.mark.parametrize("value", [3e38, np.inf, np.nan, -1.0])
def test_an_imatrix_of_no_sums_of_squares_is_refused(tmp_path: Path, value: float) -> None:
    (tmp_path / "im.dat").write_bytes(dat(b"blk.0.attn_q.weight", [1.0, 2.0]))
    sums, counts = read_imatrix(tmp_path / "im.dat")["blk.0.attn_q.weight"]
    assert (sums.tolist(), counts.tolist()) == ([[512.0, 1024.0]], [512])
    (tmp_path / "im.dat").write_bytes(dat(b"blk.0.attn_q.weight", [1.0, value]))
    with pytest.raises(
        FormatError, match=r"im\.dat: blk\.0\.attn_q\.weight holds a value that is not a sum"
    ):
        read_imatrix(tmp_path / "im.dat")


@pytest.mark.parametrize("count", [np.nan, np.inf, 1e30, -5.0])
def test_an_imatrix_of_impossible_counts_is_refused(tmp_path: Path, count: float) -> None:
    writer = gguf.GGUFWriter(tmp_path / "im.gguf", "imatrix")
    writer.add_tensor("w.in_sum2", np.ones((1, 4), np.float32))
    writer.add_tensor("w.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"im\.gguf: "):
        read_imatrix(tmp_path / "im.gguf")


def test_names_a_missing_tensor(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(save_gguf(tiny_llama(), tmp_path / "tiny.gguf"))
    with pytest.raises(FormatError, match="no tensor missing"):
        checkpoint.tensor("missing")


def test_a_broken_imatrix_ends_soon(tmp_path: Path) -> None:
    # The package's own reader walks through an array of 2^40 bytes that are not there.
    array = struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 1 << 40)
    (tmp_path / "im").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(FormatError, match="not a readable GGUF file"):
        read_imatrix(tmp_path / "im")


def test_a_tensor_without_dimensions_is_refused(tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    head += text(b"general.architecture") + struct.pack("<I", 8) + text(b"olmoe")
    head += text(b"token_embd.weight") + struct.pack("<IIQ", 0, 0, 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32 + 32, b"\0"))
    with pytest.raises(FormatError, match=r"x.gguf: 'token_embd.weight' has no dimensions"):
        GGUFCheckpoint(path)
