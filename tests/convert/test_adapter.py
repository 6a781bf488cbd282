"""`edgemoe convert --base`: an adapter has exactly what differs from the base; if that cannot be, none is written."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from corrected import calibrated
from edited import edit, setter
from safetensors.numpy import save_file
from tiny import tiny_checkpoint
from tuned import DENSE, EXPERTS, tune

import edgemoe
from edgemoe.cli.main import main
from edgemoe.convert.adapter import convert_adapter
from edgemoe.convert.convert import convert
from edgemoe.convert.hf import HFCheckpoint
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.file.adapter import open_adapter, weights_sum, with_adapters
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.file.verify import verify
from edgemoe.quant import SCHEMES
from edgemoe.quant.columns import COLUMN_SCALES


def write(checkpoint, folder):
    """Writes a checkpoint as a Hugging Face directory."""
    folder.mkdir()
    save_file(
        {name: checkpoint.tensor(name) for name in checkpoint.shapes}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    for name, content in checkpoint.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A base, its checkpoint, a fine-tune, and the fine-tune's adapter, all as files."""
    folder = tmp_path_factory.mktemp("adapter")
    convert(tiny_checkpoint(), folder / "base.moe")
    write(tiny_checkpoint(), folder / "original")
    write(tune(dense=DENSE[:1]), folder / "tuned")
    assert (
        main(
            [
                "convert",
                str(folder / "tuned"),
                str(folder / "a.moea"),
                "--base",
                str(folder / "base.moe"),
            ]
        )
        == 0
    )
    return SimpleNamespace(folder=folder, **{p.name.split(".")[0]: p for p in folder.iterdir()})


def test_it_has_what_differs_and_names_its_base(there):
    adapter, base = open_adapter(there.a), open_moe(there.base)
    found = {
        f"{layer}.mlp.experts.{e}" for layer, e in map(adapter.expert_at, range(len(adapter.which)))
    }
    assert found == set(EXPERTS)
    assert list(adapter.tensors) == ["layers.0.q"]
    assert adapter.base == weights_sum(base)
    assert verify(adapter) == []


def test_rows_of_a_model_with_adapters_are_named_by_their_experts(there):
    adapter = open_adapter(there.a)
    moe, places = with_adapters(open_moe(there.base), [adapter])
    names = places.names.reshape(-1).tolist()
    for row, expert in enumerate(names):
        assert moe.expert_at(row) == (moe.config.moe_layers[row // moe.places], expert)
    assert moe.places > moe.config.num_experts
    assert -1 in names
    of_adapter = np.flatnonzero(moe.experts.file_of).tolist()
    assert [moe.expert_at(row) for row in of_adapter] == [
        adapter.expert_at(row) for row in range(len(adapter.which))
    ]
    assert verify(moe) == []


@pytest.mark.parametrize("count", [1, 4])
def test_its_size_is_that_of_what_differs(tmp_path, count):
    base = tmp_path / "base.moe"
    source = {"layers": 4, "experts": 16, "width": 128}
    convert(tiny_checkpoint(**source), base)
    changed = [f"{layer}.mlp.experts.{3 * i}" for layer in range(4) for i in range(count)]
    convert_adapter(tune(changed, **source), tmp_path / "a.moea", open_moe(base))
    moe, adapter = open_moe(base), open_adapter(tmp_path / "a.moea")
    share = adapter.experts.sizes(5).sum() / moe.experts.sizes(5).sum()
    assert share == count / 16
    assert adapter.file_bytes / moe.file_bytes < share + 0.02


def test_the_original_checkpoint_saves_work_and_changes_nothing(there, tmp_path, monkeypatch):
    from edgemoe.file.coder import Coder

    coded, real = [], Coder.expert
    monkeypatch.setattr(
        Coder, "expert", lambda self, *rest: coded.append(rest[:2]) or real(self, *rest)
    )
    arguments = ["--base", str(there.base), "--checkpoint", str(there.original)]
    assert main(["convert", str(there.tuned), str(tmp_path / "b.moea"), *arguments]) == 0
    assert (tmp_path / "b.moea").read_bytes() == there.a.read_bytes()
    assert len(coded) == len(EXPERTS) + 4  # and four to see whether it is the base's


def test_columns_are_scaled_as_the_base_s_are(tmp_path):
    base, whole, out = (tmp_path / name for name in ("base.moe", "whole.moe", "a.moea"))
    source, tuned = (
        tiny_checkpoint(),
        tune(EXPERTS[:1], dense=["model.layers.0.input_layernorm.weight"]),
    )
    calibration = calibrated(tmp_path / "x.calib", SourceModel(source).config, uneven=True)
    convert(source, base, calibration=calibration)
    convert(tuned, whole, calibration=calibration)
    moe = open_moe(base)
    assert moe.sections[COLUMN_SCALES] == open_moe(whole).sections[COLUMN_SCALES]
    found = convert_adapter(tuned, out, moe, original=source, calibration=calibration)
    assert (found.experts, found.tensors) == (1, 1)
    with edgemoe.load(base, adapters=out) as beside, edgemoe.load(whole) as alone:
        assert np.array_equal(beside.logits(range(40)), alone.logits(range(40)))


def test_the_name_of_a_base_is_that_of_its_weights(there, tmp_path):
    copy = tmp_path / "copy.moe"
    copy.write_bytes(there.base.read_bytes())
    add_sections(copy, {"note": b"something"})
    with edgemoe.load(copy, adapters=there.a, ram="64MiB") as engine:
        assert engine.adapter == "a"
    convert(tiny_checkpoint(), tmp_path / "fewer.moe", bits=4)
    assert weights_sum(open_moe(tmp_path / "fewer.moe")) != weights_sum(open_moe(copy))


def refused(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    (line,) = [text for text in said if not text.startswith("# comparing ")]
    return line


def test_what_cannot_be_an_adapter(there, tmp_path, capsys):
    out, base = tmp_path / "x.moea", ("--base", there.base)
    turned = tune()
    turned.config["rope_theta"] = 500.0
    turned = write(turned, tmp_path / "turned")
    narrow = write(tiny_checkpoint(width=64), tmp_path / "narrow")
    other = write(tiny_checkpoint(seed=9), tmp_path / "other")
    calib = calibrated(tmp_path / "x.calib", SourceModel(tiny_checkpoint()).config, few=True)
    for arguments, message in (
        ((there.original, out, *base), "nothing differs from the model"),
        ((turned, out, *base), "tur.*: turns positions otherwise than .*base.moe, which no adapter can"),
        ((there.tuned, there.base, *base, "--overwrite"), "is the base itself"),
        ((narrow, out, *base), "narrow: is not of the architecture of .*: expert_hidden is 64, the base's is 48"),
        ((there.tuned, out, "--base", there.a), "is an adapter; expected the model that it is for"),
        ((there.tuned, out, "--base", tmp_path / "no.moe"), "no.moe"),
        ((there.tuned, out, *base, "--checkpoint", other), "is not what .* was made of"),
        ((there.tuned, out, "--checkpoint", there.original), "expected --base BASE.moe too"),
        ((there.tuned, out, *base, "--bits", "4"), "--bits: with --base all is made as the base was"),
        ((there.tuned, out, *base, "--calibration", calib.path), "was made without a calibration"),
        ((there.tuned, there.a, *base), "exists; --overwrite"),
    ):  # fmt: skip
        line = refused(capsys, *arguments)
        assert re.search(message, line), line
        assert not out.exists()
        assert not list(tmp_path.glob(".edgemoe*"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pruned", 0.5, "its source says prune: takes a calibration"),
        ("thorough", "yes", "its source says thorough: expected True or False, got 'yes'"),
        ("favour", "4", "favours '4' bits, which are not among its levels"),
    ],
)
def test_what_a_base_says_of_how_it_was_made_is_checked(there, tmp_path, key, value, message):
    base = tmp_path / "base.moe"
    base.write_bytes(edit(there.base.read_bytes(), setter("source", key, value)))
    with pytest.raises(FormatError, match=f"^{re.escape(str(base))}: {message}"):
        convert_adapter(HFCheckpoint(there.tuned), tmp_path / "x.moea", open_moe(base))


def test_a_base_cannot_have_been_made_as_its_scheme_does_not_allow(there, tmp_path):
    base = tmp_path / "base.moe"
    calibration = calibrated(tmp_path / "x.calib", SourceModel(tiny_checkpoint()).config, few=True)
    convert(tiny_checkpoint(), base, scheme=SCHEMES["mwq"], calibration=calibration)
    tuned, made = HFCheckpoint(there.tuned), base.read_bytes()
    for key, value, message in (
        ("thorough", True, "its source says thorough: not for the scheme mwq"),
        ("favour", 3, "favours 3 bits, which mwq cannot"),
        ("pruned", "half", "its source says prune: expected a number, got 'half'"),
        ("pruned", 1e-9, "its source says prune: 1e-07% of 48 neurons is less than 16"),
    ):
        base.write_bytes(edit(made, setter("source", key, value)))
        with pytest.raises(FormatError, match=f"^{re.escape(str(base))}: {message}"):
            convert_adapter(tuned, tmp_path / "x.moea", open_moe(base), calibration=calibration)


def opened(path, base):
    return edgemoe.load(base, adapters=path, ram="64MiB").close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter("base", "0" * 64), "is for a model of weights 000000000000…; .* has [0-9a-f]{12}…"),
        (setter("base", "x"), "base 'x'; expected 64 hexadecimal digits"),
        (setter("base", 3), "base 3; expected 64"),
        (setter("config", "norm_eps", 0.5), "norm_eps is 0.5; .* has 1e-06"),
        (setter("more", 1), "the index has other fields"),
        (setter("tensors", "layers.9.q", []), "'layers.9.q' is not part of the model"),
        (setter("tensors", "layers.0.q", 1, [1, 1]), "tensor layers.0.q is nested"),
        (setter("tensors", "layers.0.q", 2, 1 << 40), "tensor layers.0.q"),
        (setter("tensors", {}), None),
        (setter("sections", {}), None),
        (lambda index: index["sections"].pop("which") and None, "section experts: there is no section which"),
        (lambda index: index["sections"].pop("experts") and None, "section experts does not hold 3 records"),
        (lambda index: index.update(sections={}, tensors={}), "nothing differs"),
        (setter("ladder", [[2, 2, 2]]), "rungs|records"),
    ],
)  # fmt: skip
def test_hostile_and_damaged_files(there, tmp_path, change, message):
    path = tmp_path / "bad.moea"
    path.write_bytes(edit(there.a.read_bytes(), change))
    if message is None:
        opened(path, there.base)
        return
    with pytest.raises(FormatError, match=message) as caught:
        opened(path, there.base)
    assert "\n" not in str(caught.value)


def test_entries_that_name_no_expert(there, tmp_path):
    content = there.a.read_bytes()
    adapter = open_adapter(there.a)
    which = np.array([(adapter.config.moe_layers[a], e) for a, e in adapter.which.tolist()], "<u4")
    at = content.index(which.tobytes())
    for change, message in (
        ((0, 0, 9), "entry .* is not an expert"), ((0, 1, 8), "entry .* is not an expert"),
        ((1, 0, 2**32 - 1), "entry .* is not an expert"), ((2, 1, 0), "entries do not ascend"),
    ):  # fmt: skip
        other = which.copy()
        row, column, value = change
        other[row, column] = value
        data = bytearray(content)
        data[at : at + other.nbytes] = other.tobytes()
        path = tmp_path / "bad.moea"

        def fitting(index, other=other):
            index["sections"]["which"][2] = edgemoe._core.crc32c(other.tobytes())

        path.write_bytes(edit(data, fitting))
        with pytest.raises(FormatError, match=message):
            open_adapter(path)


def test_damage_is_noticed_where_it_is(there, tmp_path):
    adapter, path = open_adapter(there.a), tmp_path / "bad.moea"
    for offset, message in (
        (int(adapter.experts.offsets[1]), r"bad.moea: checksum of expert 0 of layer 1, rung 0"),
        (adapter.tensors["layers.0.q"].offset, "layers.0.q"),
        (adapter.file_bytes - 9, "checksum of the index"),
    ):
        data = bytearray(there.a.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        with (
            pytest.raises(FormatError, match=message),
            edgemoe.load(there.base, adapters=path, ram="64MiB") as engine,
        ):
            engine.logits(range(200))
    path.write_bytes(there.a.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        open_adapter(path)
    with pytest.raises(FormatError, match="is a whole model; expected an adapter"):
        open_adapter(there.base)
    with pytest.raises(FormatError, match="is an adapter; expected the model"):
        open_moe(there.a)


def test_inspect_says_what_it_is(there, capsys):
    assert main(["inspect", str(there.a), "--verify"]) == 0
    text = capsys.readouterr().out
    assert f"for a model of weights {weights_sum(open_moe(there.base))}" in text
    assert "3 of 16 experts" in text
    assert "every checksum matches" in text
    assert main(["inspect", str(there.base)]) == 0
    assert weights_sum(open_moe(there.base)) in capsys.readouterr().out


def test_a_base_of_another_checkpoint_is_noticed(there, tmp_path, capsys):
    other = write(tiny_checkpoint(seed=9), tmp_path / "other")
    assert main(["convert", str(other), str(tmp_path / "b.moea"), "--base", str(there.base)]) == 0
    said = capsys.readouterr().err
    assert (
        "every expert differs: either all were trained, or base.moe was made of another checkpoint"
        in said
    )
    assert "16 of 16 experts and" in said
