"""An exported model loads in transformers, and has the weights of the file, rounded to bfloat16."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from decoded import Decoded
from test_gguf_tokenizer import meta
from tokenizers import Tokenizer

from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.convert.export.gguf_file import TYPES, export_gguf
from edgemoe.convert.export.hf import export_hf
from edgemoe.convert.gguf import GGUFCheckpoint
from edgemoe.convert.gguf.tokenizer import tokenizer_files
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.reader import open_moe

sys.path.append(str(Path(__file__).parents[1] / "model"))

from test_families import assert_same_function

EXPORTED = (
    "mixtral", "qwen2_moe", "qwen3_moe-norm-tied", "olmoe", "granitemoe-tied-llama3", "glm4_moe",
    "ernie4_5_moe", "minimax_m2", "hunyuan_v1_moe", "laguna", "gpt_oss", "deepseek_v2", "deepseek_v3", "lfm2_moe",
    "bailing_moe",
)  # fmt: skip


def made(name: str, folder: Path) -> Path:
    convert(HFCheckpoint(families.make(name, folder / "hf")), folder / "x.moe")
    return folder / "x.moe"


def rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).float().numpy()


@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_loads_it_and_computes_the_same(name: str, tmp_path: Path) -> None:
    path, out = made(name, tmp_path), tmp_path / "out"
    export_hf(open_moe(path), out)
    assert_same_function(out)
    decoded, model = Decoded(path), SourceModel(HFCheckpoint(out))
    assert model.config == decoded.config
    for tensor, values in decoded.tensors.items():
        exact = tensor.startswith("rope") or tensor.endswith("choice_bias")
        expected = values if exact else rounded(values)
        np.testing.assert_array_equal(model.tensor(tensor), expected.astype(np.float32), tensor)
    layer = decoded.config.moe_layers[-1]
    for got, values in zip(model.expert(layer, 5), decoded.expert(layer, 5), strict=True):
        np.testing.assert_array_equal(got, rounded(values))


def test_the_level_that_is_asked_for(tmp_path: Path) -> None:
    path, out = made("qwen3_moe", tmp_path), tmp_path / "out"
    assert main(["export", str(path), str(out), "--bits", "3"]) == 0
    moe, model = open_moe(path), SourceModel(HFCheckpoint(out))
    expected = Decoded(path).expert(1, 2, level=moe.level(3))
    for got, values in zip(model.expert(1, 2), expected, strict=True):
        np.testing.assert_array_equal(got, rounded(values))
    np.testing.assert_array_equal(
        model.tensor("layers.0.q"), rounded(Decoded(path).tensors["layers.0.q"])
    )


def test_files_of_the_tokenizer_come_along(tmp_path: Path) -> None:
    families.make("olmoe", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    convert(HFCheckpoint(tmp_path / "hf"), tmp_path / "x.moe")
    export_hf(open_moe(tmp_path / "x.moe"), tmp_path / "out")
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
    } <= found
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("qwen3_next", "model.norm.weight"),
        ("phimoe", "LayerNorms"),
        # Its first layers have no RoPE, and are read before its experts.
        ("llama4_text", "language_model.model.layers.1.feed_forward.experts.gate_up_proj.0"),
    ],
)
def test_what_cannot_be_made_back_is_refused_by_name(
    name: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made(name, tmp_path)
    with pytest.raises(FormatError) as error:
        export_hf(open_moe(path), tmp_path / "out")
    expected = f"models of {name} cannot be exported: the conversion of {what} cannot be reversed"
    assert expected in str(error.value)
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_written_over_and_a_file_without_its_config_is_refused(tmp_path: Path) -> None:
    path = made("olmoe", tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists; expected a name that nothing has: '.*out'"):
        export_hf(open_moe(path), tmp_path / "out")
    moe = open_moe(path)
    whole = json.loads(moe.sections["config.json"]) | {"text_config": {}}
    moe.sections["config.json"] = json.dumps(whole).encode()  # type: ignore[index]
    with pytest.raises(FormatError, match="only their text is in the file"):
        export_hf(moe, tmp_path / "other")
    del moe.sections["config.json"]  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        export_hf(moe, tmp_path / "other")
    with pytest.raises(ValueError, match="7"):
        export_hf(open_moe(path), tmp_path / "other", bits=7)


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_what_others_have_under_a_name_stays(name: str, tmp_path: Path) -> None:
    moe = open_moe(made("olmoe", tmp_path))
    export = export_gguf if name.endswith("gguf") else export_hf
    (tmp_path / "mine").write_text("mine")
    for taken in (name, f"{name}.part"):
        (tmp_path / taken).symlink_to(tmp_path / "mine")  # a link counts as taken
        with pytest.raises(FileExistsError, match=f"{taken}"):
            export(moe, tmp_path / name)
        (tmp_path / taken).unlink()
    (tmp_path / f"{name}.part").mkdir()
    (tmp_path / f"{name}.part" / "thesis").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}.part"):
        export(moe, tmp_path / name)
    assert (tmp_path / f"{name}.part" / "thesis").read_text() == "mine"
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_an_export_that_is_interrupted_leaves_nothing(name: str, tmp_path: Path) -> None:
    moe = open_moe(made("olmoe", tmp_path))
    before = sorted(tmp_path.iterdir())

    def interrupt(done: int, total: int) -> None:
        (tmp_path / f"{name}.part").stat()  # unfinished files do not have their names yet
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        (export_gguf if name.endswith("gguf") else export_hf)(
            moe, tmp_path / name, progress=interrupt
        )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {}),
        ("olmoe", {"norm_topk_prob": False}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
)
def test_a_gguf_file_is_read_as_the_same_model(
    name: str, changes: dict[str, object], kind: str, tmp_path: Path
) -> None:
    path = families.make(name, tmp_path / "hf", changes=changes)
    convert(HFCheckpoint(path), tmp_path / "x.moe")
    export_gguf(open_moe(tmp_path / "x.moe"), tmp_path / "x.gguf", kind=kind)
    decoded, model = Decoded(tmp_path / "x.moe"), SourceModel(GGUFCheckpoint(tmp_path / "x.gguf"))
    nested = open_moe(tmp_path / "x.moe").tensors

    def near(got: np.ndarray, values: np.ndarray, is_matrix: bool) -> None:
        if not is_matrix:
            np.testing.assert_allclose(got, values, rtol=1e-6)
        elif kind == "F16" or values.shape[-1] % 32:
            np.testing.assert_array_equal(got, values.astype(np.float32).astype(np.float16))
        else:
            most = np.abs(values.reshape(-1, 32)).max(1).repeat(32).reshape(values.shape)
            assert (np.abs(got - values) <= most * (0.51 / 127 + 2**-11)).all()

    for tensor, values in decoded.tensors.items():
        near(model.tensor(tensor), values, nested[tensor].spec.kind == "nested")
    for got, values in zip(model.expert(1, 5), decoded.expert(1, 5), strict=True):
        near(got, values, True)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("glm4_moe", "models of family glm4_moe cannot be exported to GGUF"),
        ("qwen3_moe", "cannot hold this model: renormalise is another one there"),
        ("mixtral-window", "cannot hold this model: mixers is another one there"),
        ("qwen3_moe-yarn", "RoPE that is scaled cannot be exported"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(name: str, what: str, tmp_path: Path) -> None:
    path = made(name, tmp_path)
    with pytest.raises(FormatError, match=what):
        export_gguf(open_moe(path), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x.gguf*"))


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]], "unk_id": 0}, "is Unigram, and only"),
        ({"type": "WordPiece", "vocab": {"a": 0, "##b": 1}}, "is WordPiece, and only byte-level BPE"),
        ({"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "is WordLevel, and only byte-level BPE"),
        ({"vocab": [["a", -1.0]]}, "is BPE without merges, and only"),
        ({**BPE, "merges": None}, "is BPE without merges, and only"),
        ({**BPE, "byte_fallback": True}, "is SentencePiece's BPE, and only"),
        ({**BPE, "vocab": {"a": 0, "b": 1, "ab": 264}}, "token 'ab' has number 264 of 264; GGUF has no place"),
    ],
)  # fmt: skip
def test_tokenizers_of_other_kinds_are_refused_by_name(
    qwen: Path, model: dict[str, object], what: str, tmp_path: Path
) -> None:
    moe = open_moe(qwen)
    content = {"version": "1.0", "added_tokens": [], "model": model}
    assert moe.config.vocab_size == 264
    moe = dataclasses.replace(moe, sections={"tokenizer.json": json.dumps(content).encode()})
    with pytest.raises(FormatError, match=what):
        export_gguf(moe, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


ADDED = {"id": 7, "content": "<x>", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": [1]}, r"tokenizer.json: model must be an object, got \[1\]"),
        ({"model": {**BPE, "vocab": {"a": 1.0}}}, "tokenizer.json: .* `1.0`, expected u32"),
        ({"model": {**BPE, "merges": [1]}}, "tokenizer.json: .* MergeType"),
        ({"added_tokens": [{**ADDED, "id": "7"}]}, 'tokenizer.json: .* "7", expected u32'),
        ({"added_tokens": [{**ADDED, "id": 1.0}]}, "tokenizer.json: .* `1.0`, expected u32"),
        ({"added_tokens": [{**ADDED, "content": 3}]}, "tokenizer.json: .* expected a string"),
        ({"added_tokens": [{"id": 7}]}, "tokenizer.json: .* missing field"),
        ({"added_tokens": 1}, "tokenizer.json: .* expected a sequence"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_a_line(
    qwen: Path, change: dict[str, object], what: str, tmp_path: Path
) -> None:
    content = {"version": "1.0", "added_tokens": [], "model": BPE, **change}
    moe = open_moe(qwen)
    moe = dataclasses.replace(moe, sections={"tokenizer.json": json.dumps(content).encode()})
    with pytest.raises(FormatError, match=what) as error:
        export_gguf(moe, tmp_path / "x.gguf")
    assert str(error.value).startswith(f"{moe.path}: ")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that GGUF files can hold."""
    folder = tmp_path_factory.mktemp("qwen")
    changes = {"norm_topk_prob": True, "vocab_size": 264}
    convert(
        HFCheckpoint(families.make("qwen3_moe", folder / "hf", changes=changes)), folder / "x.moe"
    )
    return folder / "x.moe"


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2", "gpt-4o", "laguna"])
def test_the_tokenizer_cuts_texts_alike(pre: str, tmp_path: Path) -> None:
    files = tokenizer_files(meta(pre), context_length=64, where="x")
    changes = {"vocab_size": 512, "norm_topk_prob": True}
    families.make("qwen3_moe", tmp_path / "hf", changes=changes)
    for name, content in files.items():
        (tmp_path / "hf" / name).write_bytes(content)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    convert(HFCheckpoint(tmp_path / "hf"), tmp_path / "x.moe")
    export_gguf(open_moe(tmp_path / "x.moe"), tmp_path / "x.gguf")
    again = GGUFCheckpoint(tmp_path / "x.gguf").files
    text = "I'VE fooBar\n\n   12345 na\u00efve [INST] again and again<s>"
    ours, theirs = (Tokenizer.from_str(f["tokenizer.json"].decode()) for f in (again, files))
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert json.loads(again["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
