"""The list of supported models is exactly what the converter takes; for others it says what is lacking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest

from edgemoe.cli.main import main
from edgemoe.convert.families import FAMILIES
from edgemoe.convert.gguf.architectures import ARCHITECTURES
from edgemoe.convert.missing import missing
from edgemoe.convert.quantised import METHODS
from edgemoe.convert.source import SourceModel
from edgemoe.convert.supported import supported
from edgemoe.errors import FormatError


def test_the_list_is_the_tables() -> None:
    found = supported()
    types = [name for family in found["families"] for name in family["model_types"]]
    assert sorted(types) == sorted(FAMILIES)
    known = {*FAMILIES, *found["dense"]["model_types"]}
    listed = {
        name for part in (*found["families"], found["dense"]) for name in part["gguf"]
    }  # fmt: skip
    assert listed == {name for name, arch in ARCHITECTURES.items() if arch.makes & known}
    assert found["quantised"].keys() == METHODS.keys()
    assert {"F32", "Q4_K", "IQ2_XS", "MXFP4", "NVFP4", "BF16"} <= set(found["gguf_types"])
    assert set(found["gguf_types"]) == {kind.name for kind in gguf.quants._type_traits} | {
        "F32",
        "F16",
    }


def test_every_family_says_in_words_what_its_models_are() -> None:
    for family in supported()["families"]:
        if family["model_types"] == ["granitemoe_dense"]:  # of the tests
            continue
        assert family["models"], family
        assert family["models"] not in family["model_types"]
        assert len(family["models"]) < 60


def test_every_family_has_its_row_among_the_compared_ones() -> None:
    page = (Path(__file__).parents[2] / "docs/matrix.md").read_text(encoding="utf-8")
    for family in supported()["families"]:
        names = family["model_types"]
        if names == ["granitemoe_dense"]:  # of the tests
            continue
        has_row = any(f'<a id="{name}">' in page for name in names)
        assert has_row or f"`{names[0]}` has no row" in page, names


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*FAMILIES, *METHODS, "Mixtral", "qwen3moe", "tekken"))
    assert main(["families", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == supported()


class Unknown:
    """A checkpoint that has only a config.json."""

    name, identity = "m", ""
    files: Mapping[str, bytes] = {}
    shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, **config: Any) -> None:
        self.config = config

    def tensor(self, name: str) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "deepseek_v4", "num_experts": 8}, "hyper-connections, and compressed keys"),
        ({"model_type": "new", "n_routed_experts": 8, "index_topk": 2048}, "a sparse indexer of k"),
        ({"model_type": "gemma", "hidden_size": 8}, "routed experts, as the model is dense"),
    ],
)
def test_an_unknown_family_names_itself_what_is_and_what_it_lacks(
    config: dict[str, Any], what: str
) -> None:
    with pytest.raises(FormatError) as error:
        SourceModel(Unknown(**config))
    text = str(error.value)
    assert text.startswith(f"m: model_type '{config['model_type']}' is not supported (missing: ")
    assert what in text
    assert all(name in text for name in FAMILIES)


def test_nothing_is_made_up_of_a_family_that_nothing_tells_about() -> None:
    assert missing({"model_type": "new", "num_experts": 8}) == ""
    assert missing({"model_type": ["mixtral"]}) == ""
