"""A bad file raises a FormatError that names the broken part; a good one reads back as it was written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from edited import edit, setter
from reference_nested import decode_rungs
from tiny import tiny_checkpoint

import edgemoe
from edgemoe import _core
from edgemoe.config import ModelConfig, dense_tensors
from edgemoe.convert.convert import convert
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError, ReadError
from edgemoe.file.append import add_sections
from edgemoe.file.format import MAGIC, PREAMBLE, expert_rung_bytes
from edgemoe.file.reader import Reader, look_into, open_moe
from edgemoe.file.writer import Writer
from edgemoe.specs import AttentionSpec, RopeSpec

IDS = list(range(40))


@pytest.fixture
def data(tiny_moe):
    return bytearray(tiny_moe.read_bytes())


@pytest.fixture
def broken(tmp_path):
    """Returns a function that writes bytes to a file and checks the one-line error of opening it."""

    def check(content, match):
        path = tmp_path / "broken.moe"
        path.write_bytes(content)
        with pytest.raises(FormatError, match=match) as error:
            open_moe(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)

    return check


def test_what_is_written_comes_back(tiny_moe):
    moe = open_moe(tiny_moe)
    source = SourceModel(tiny_checkpoint())
    assert moe.config == source.config
    assert moe.scheme.name == "nested"  # the scheme of a file without the field
    assert moe.scheme.row_scales == (1,)
    assert moe.sections["tokenizer.json"] == tiny_checkpoint().files["tokenizer.json"]
    assert moe.source["name"] == "tiny"
    raw = tiny_moe.read_bytes()
    widths = [2, 1, 1, 2, 2]
    for name, spec in dense_tensors(moe.config).items():
        tensor, true = moe.tensors[name], source.tensor(name)
        at, rungs = tensor.offset, []
        for length in tensor.lengths:
            rungs.append(np.frombuffer(raw, np.uint8, length, at))
            at += length
        if spec.kind == "f32":
            assert rungs[0].tobytes() == true.tobytes()
        else:
            got = decode_rungs(rungs, widths, *spec.shape, moe.scheme.row_scales)
            assert np.square(got - true).sum() < 1e-4 * np.square(true).sum()
    with edgemoe.load(tiny_moe) as engine:
        for row, (layer, index) in enumerate((i, e) for i in range(2) for e in range(8)):
            for got, true in zip(
                engine.model.store.cache.decode(row, 5), source.expert(layer, index), strict=True
            ):
                assert np.square(got - true).sum() < 1e-4 * np.square(true).sum()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 4095, 4096, 100_000, -4096, -1])
def test_truncated_files_are_refused(data, broken, size):
    content = data[:size] if size >= 0 else data[: len(data) + size]
    broken(content, "empty" if size == 0 else "truncated")


def test_other_files_are_refused(data, broken):
    broken(b"GGUF" + bytes(100), "not a .moe file")
    broken(
        data[:8] + struct.pack("<I", 1) + data[12:],
        "format version 1; this edgemoe reads versions 2 and 3: convert the checkpoint again",
    )
    broken(
        data[:8] + struct.pack("<I", 99) + data[12:],
        "format version 99; this edgemoe reads versions 2 and 3; a newer edgemoe reads it",
    )
    with pytest.raises(FormatError, match="No such file"):
        open_moe("/nonexistent/x.moe")
    with pytest.raises(FormatError, match="is a directory; edgemoe convert makes"):
        open_moe("/")


@pytest.mark.parametrize("at", range(64))
def test_every_bit_of_the_preamble_matters(data, broken, at):
    data[at] ^= 0x10
    broken(data, "magic|version|checksum of the preamble")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _: b"{", "the index: not valid JSON"),
        (lambda _: b"[" * 100_000, "the index: not valid JSON: nested"),
        (lambda _: b"[]", "other fields"),
        (lambda i: i.pop("group") and None, "other fields"),
        (setter("group", 64), "groups of 64"),
        (setter("ladder", [[2, 2, 2], [2, 3, 3]]), "does not climb"),
        (setter("ladder", [[9, 9, 9]]), "does not climb"),
        (setter("ladder", []), "1 to 8 rungs"),
        (setter("ladder", "x"), "1 to 8 rungs"),
        (setter("dense_ladder", [2, "3"]), "does not climb"),
        (setter("row_scales", [0, 1]), "row_scales .0, 1.; expected 1, and then"),
        (setter("row_scales", [1, 2]), "row_scales .1, 2.; expected 1, and then"),
        (setter("row_scales", [1, True]), "row_scales .1, True.; expected 1, and then"),
        (setter("row_scales", [1, 0, 0, 0, 0, 1]), "row_scales .* each rung"),
        (setter("row_scales", []), "row_scales .* each rung"),
        (setter("row_scales", 1), "row_scales 1; expected 1, and then"),
        (setter("row_scales", [1, 0, 1]), "has rungs .* expected"),
        (setter("ladder", [[2, 2, 2], [3, 3, 3]]), "experts does not hold"),
        (setter("config", "vocab_size", 1 << 40), "vocab_size must be"),
        (setter("config", "vocab_size", True), "vocab_size must be"),
        (setter("config", "vocab_size", 265), "tensor embed is nested"),
        (setter("config", "mixers", 0, "head_dim", 23), "even"),
        (setter("config", "norm_eps", 10**400), "norm_eps is beyond"),
        (setter("config", "mixers", 0, "num_heads", 1 << 20), "too many|num_kv_heads"),
        (setter("config", "mixers", 0, "kind", "riddle"), "a kind 'riddle' is not known"),
        (setter("config", "mixers", 0, "colour", 1), "mixers: unknown fields colour"),
        (setter("config", "mixers", 0, "qk_norm", "each"), "unknown qk_norm 'each'"),
        (setter("config", "mixers", 0, "rope", 7), "rope: expected an object, got int"),
        (setter("config", "mixers", 0, "rope", "name", "ropes/x"), "has the name 'ropes/x'"),
        (setter("config", "mixers", 0, "rope", "dim", 26), "heads of 24 columns"),
        (setter("config", "mixers", 5), "mixers must be a list"),
        (setter("config", "layer_mixers", [0]), "layer_mixers must say of every layer"),
        (setter("config", "layer_mixers", [0, 1]), "layer_mixers must say of every layer"),
        (setter("config", "norm_eps", "x"), "norm_eps must be a number"),
        (setter("config", "extra", 1), "unknown fields extra"),
        (lambda i: i["config"].pop("num_layers") and None, "missing fields num_layers"),
        (setter("config", "moe_layers", [0, 7]), "moe_layers"),
        (setter("config", "num_experts", 9), "router is f32"),
        (setter("config", "eos_ids", [999]), "outside the vocabulary"),
        (lambda i: i["tensors"].pop("norm") and None, "tensor norm is missing"),
        (setter("tensors", "bogus", ["f32", [1], 4096, [[4, 0]]]), "'bogus' is not part"),
        (setter("tensors", "norm", None), "norm is malformed"),
        (setter("tensors", "norm", 1, [1 << 62, 1 << 62]), "tensor norm is f32"),
        (setter("tensors", "norm", 2, 1 << 60), "norm claims bytes"),
        (setter("tensors", "norm", 2, -4096), "norm claims bytes"),
        (setter("tensors", "norm", 2, 4097), "norm claims bytes"),
        (setter("tensors", "norm", 2, 4096), "overlap"),
        (setter("tensors", "norm", 3, [[385, 0]]), "norm has rungs"),
        (setter("tensors", "norm", 3, [[384, -1]]), "norm has rungs"),
        (setter("sections", "tokenizer.json", [4096, 10, 0]), "checksum of section 'tokenizer.json'"),
        (setter("sections", "tokenizer.json", 5), "section 'tokenizer.json' is malformed"),
        (lambda i: i["sections"].pop("experts") and None, "section experts is missing"),
        (setter("source", 3), "source must be"),
    ],
)  # fmt: skip
def test_a_wrong_index_is_refused(data, broken, change, match):
    broken(edit(data, change), match)


@pytest.mark.parametrize(
    ("word", "value", "match"),
    [
        (0, 1 << 62, "outside the file"),
        (0, 4097, "outside"),
        (0, 4096, "overlap|outside"),
        (1, 7, "another size"),
    ],
)
def test_a_wrong_expert_table_is_refused(data, broken, word, value, match):
    index_at, length = PREAMBLE.unpack(data[:64])[4:6]
    index = json.loads(data[index_at : index_at + length])
    at, size, _ = index["sections"]["experts"]
    struct.pack_into("<Q" if word == 0 else "<I", data, at + 8 * word, value)
    crc = _core.crc32c(bytes(data[at : at + size]))
    broken(edit(data, setter("sections", "experts", [at, size, crc])), match)


def read_table(tiny_moe, n, every, wanted):
    """Reads a table of `n` records with an unused page before each `every`th; returns the ranges that it claims."""
    moe = open_moe(tiny_moe)
    ends = expert_rung_bytes(moe.config, moe.scheme, moe.ladder)
    row = np.dtype([("offset", "<u8"), ("rungs", [("end", "<u4"), ("crc", "<u4")], len(ends))])
    table = np.zeros(n, row)
    table["rungs"]["end"] = np.cumsum(ends)
    size = -(-sum(ends) // 4096) * 4096
    at = np.arange(n)
    table["offset"] = 4096 + at * size + at // every * 4096
    data, reader = table.tobytes(), Reader(tiny_moe, wanted)
    reader.file_bytes = 1 << 50
    reader.experts(data, n, moe.config, moe.scheme, moe.ladder)
    return reader.used


def test_runs_of_expert_records_are_checked_as_one(tiny_moe):
    used = read_table(tiny_moe, 10, 10, None)
    assert [name for *_, name in used] == ["the experts"]
    used = read_table(tiny_moe, 10, 4, None)
    assert [name for *_, name in used] == ["expert records"] * 3
    page = -(-used[0][1] // 4096) * 4096 - 4096
    assert page % 4 == 0
    assert [start - 4096 for start, *_ in used] == [0, page + 4096, 2 * page + 2 * 4096]


def test_a_look_into_a_file_takes_few_mib(tiny_moe, tmp_path):
    most = (2 << 20) // 48  # as many records of five rungs as are looked at
    tracemalloc.start()
    try:
        read_table(tiny_moe, most, 3, ())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20  # including two copies of the table
    with pytest.raises(FormatError, match="in 16385 runs; 16384 are looked through here at most"):
        read_table(tiny_moe, (1 << 14) + 1, 1, ())
    assert len(read_table(tiny_moe, (1 << 14) + 1, 1, None)) == (1 << 14) + 1  # a file that is run
    path = tmp_path / "x.moe"
    path.write_bytes(tiny_moe.read_bytes())
    add_sections(path, {"quality": bytes(2 << 20)})
    look_into(path)
    with pytest.raises(FormatError, match="sections of more than 2097152 bytes"):
        look_into(path, ("quality",))


def test_random_damage_never_crashes(data, tmp_path):
    """A damaged file may be refused; it must not crash, hang, or be accepted with other contents."""
    rng = np.random.default_rng(5)
    path = tmp_path / "damaged.moe"
    good = bytes(data)
    index_at = PREAMBLE.unpack(good[:64])[4]
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            start = index_at if rng.random() < 0.7 else 0
            bad[rng.integers(start, len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            with edgemoe.load(path, context=64) as engine:
                engine.logits(IDS)
        except (FormatError, ValueError) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 120  # others hit padding, or an expert that was not used


def test_a_broken_rung_is_named_and_can_be_ignored(data, tmp_path):
    path = tmp_path / "flipped.moe"
    path.write_bytes(data)
    moe = open_moe(path)
    for offset in moe.experts.offsets[:8]:
        data[int(offset) + 5000] ^= 1
    path.write_bytes(data)
    with edgemoe.load(path) as engine:
        for _ in range(2):
            with pytest.raises(FormatError, match=r"checksum of expert \d of layer 0, rung \d"):
                engine.logits(IDS)
            engine.model.store.cache.check_integrity()
    with edgemoe.load(path, verify=False) as engine:
        assert engine.logits(IDS).shape == (40, 264)
    data[moe.tensors["layers.0.q"].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"checksum of tensor layers\.0\.q, rung 0"):
        edgemoe.load(path)
    edgemoe.load(path, verify=False).close()


def test_a_file_that_shrinks_while_open_is_a_read_error(data, tmp_path):
    path = tmp_path / "shrinks.moe"
    path.write_bytes(data)
    with edgemoe.load(path) as engine:
        size = int(open_moe(path).experts.offsets[3])
        os.truncate(path, size)
        with pytest.raises(ReadError, match="the file ends at offset .* replaced or truncated"):
            engine.logits(IDS)
        path.write_bytes(data)  # same file, whole again: the engine is usable
        assert engine.logits(IDS).shape == (40, 264)


def test_a_file_that_is_replaced_while_open_is_not_noticed(data, tmp_path):
    path = tmp_path / "replaced.moe"
    path.write_bytes(data)
    with edgemoe.load(path) as engine:
        (tmp_path / "other").write_bytes(b"short")
        os.replace(tmp_path / "other", path)
        assert engine.logits(IDS).shape == (40, 264)


# ---------------------------------------------------------------- writing


def test_an_interrupted_conversion_goes_on_where_it_stopped(tiny_moe, tmp_path, monkeypatch):
    path = tmp_path / "out.moe"
    done = 0

    def interrupt(written, total):
        nonlocal done
        done += 1
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint(), path, progress=interrupt)
    assert not path.exists()
    part = tmp_path / "out.moe.part"
    with open(part, "r+b") as f:  # damage one finished tensor: it must be written again
        f.seek(4096)
        f.write(b"xx")
    seen = []
    convert(tiny_checkpoint(), path, progress=lambda written, _: seen.append(written))
    assert seen[0] > 0
    assert len(seen) < 30
    assert path.read_bytes() == tiny_moe.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.moe"]


def test_other_weights_do_not_resume(tiny_moe, tmp_path):
    path = tmp_path / "out.moe"

    def interrupt(written, total):
        if written > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny_checkpoint(seed=1), path, progress=interrupt)
    convert(tiny_checkpoint(), path)
    assert path.read_bytes() == tiny_moe.read_bytes()


def test_fewer_bits_make_a_smaller_file_that_is_a_prefix(tiny_moe, tmp_path):
    path = tmp_path / "four.moe"
    convert(tiny_checkpoint(), path, bits=4)
    assert path.stat().st_size < 0.7 * tiny_moe.stat().st_size
    four, eight = open_moe(path), open_moe(tiny_moe)
    for name, tensor in four.tensors.items():
        n = len(tensor.crcs)
        assert tensor.lengths == eight.tensors[name].lengths[:n]
        assert tensor.crcs == eight.tensors[name].crcs[:n]
    assert np.array_equal(four.experts.crcs, eight.experts.crcs[:, : four.experts.crcs.shape[1]])
    with edgemoe.load(path) as engine:
        assert engine.bits == 4
        assert np.isfinite(engine.logits(IDS)).all()
    with pytest.raises(ValueError, match="what the file holds"):
        edgemoe.load(path, bits=8)


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="MB free; the file takes"):
        convert(tiny_checkpoint(), tmp_path / "out.moe")
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_the_model_has_not(tmp_path):
    config = SourceModel(tiny_checkpoint()).config
    with Writer(tmp_path / "x.moe", config, sections={}, source={}) as writer:
        with pytest.raises(FormatError, match="not a tensor"):
            writer.add("bogus", np.zeros(3, np.float32))
        with pytest.raises(FormatError, match="expected shape"):
            writer.add("norm", np.zeros(3, np.float32))
        with pytest.raises(FormatError, match="not finite"):
            writer.add("norm", np.full(96, np.nan, np.float32))
        with pytest.raises(FormatError, match="not finite"):
            writer.add("embed", np.full((264, 96), np.inf, np.float32))
        with pytest.raises(FormatError, match="not an expert"):
            writer.add_expert(0, 8, *[np.zeros((1, 1), np.float32)] * 3)
        with pytest.raises(FormatError, match="not written"):
            writer.finish()
    with pytest.raises(ValueError, match="bits: expected one of"):
        Writer(tmp_path / "x.moe", config, bits=5, sections={}, source={})


def test_config_survives_json():
    config = SourceModel(tiny_checkpoint()).config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(FormatError, match="expected an object"):
        ModelConfig.from_json([])


def test_the_config_of_version_2_is_read():
    flat = {
        "family": "x", "vocab_size": 264, "hidden_size": 96, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 24, "context_length": 512, "norm_eps": 1e-5, "tied": False,
        "num_experts": 8, "experts_per_token": 2, "expert_hidden": 40, "moe_layers": [0, 2],
        "shared_hidden": [0, 50, 0], "qkv_bias": True, "o_bias": False, "qk_norm": "head",
        "clip_qkv": 4.0, "windows": [16, 0, 16], "attention_scale": 0.2, "rope_scale": 1.1,
        "rope_dim": 12, "rope_short_length": 64, "norm_after_rope": True,
    }  # fmt: skip
    config = ModelConfig.from_json(flat)
    spec = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=24, scale=0.2, qkv_bias=True, qk_norm="head",
        norm_eps=1e-5, clip=4.0, norm_after_rope=True, window=16,
        rope=RopeSpec(dim=12, scale=1.1, short_length=64),
    )  # fmt: skip
    assert config.mixers == (spec, dataclasses.replace(spec, window=0))
    assert config.layer_mixers == (0, 1, 0)
    assert "windows" not in config.to_json()
    assert ModelConfig.from_json(config.to_json()) == config
    for wrong in ({"windows": 5}, {"windows": [1, [2]]}, {"windows": [0] * 9}, {"num_layers": "x"}):
        with pytest.raises(FormatError, match="mixers|window|num_layers"):
            ModelConfig.from_json({**flat, **wrong})


def test_a_file_of_version_2_is_read(data, tmp_path):
    def flat(index):
        config = index["config"]
        (mixer,) = config.pop("mixers")
        del config["layer_mixers"], mixer["kind"]
        config["attention_scale"] = mixer.pop("scale")
        config["rope_scale"] = mixer.pop("rope").get("scale", 1.0)
        config.update(mixer)

    old = edit(data, flat)
    old[:64] = struct.pack("<8sII", MAGIC, 2, _core.crc32c(old[16:64])) + old[16:64]
    (tmp_path / "old.moe").write_bytes(old)
    (tmp_path / "new.moe").write_bytes(data)
    assert open_moe(tmp_path / "old.moe").config == open_moe(tmp_path / "new.moe").config


def test_a_fifo_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.moe")
    with pytest.raises(FormatError, match="not a regular file"):
        open_moe(tmp_path / "pipe.moe")


def test_a_second_conversion_to_the_same_name_is_refused(tmp_path):
    config = SourceModel(tiny_checkpoint()).config
    with (
        Writer(tmp_path / "x.moe", config, sections={}, source={}),
        pytest.raises(BlockingIOError, match="another conversion"),
    ):
        Writer(tmp_path / "x.moe", config, sections={}, source={})


def test_an_upgrade_is_verified_like_a_load(data, tmp_path):
    path = tmp_path / "x.moe"
    path.write_bytes(data)
    moe = open_moe(path)
    at = int(moe.experts.offsets[0]) + moe.experts.ends[0] + 5
    data[at] ^= 1
    path.write_bytes(data)
    with edgemoe.load(path) as engine:
        engine.model.store.cache.decode(0, 1)
        with pytest.raises(FormatError, match="rung 1"):
            engine.model.store.cache.decode(0, 2)
        engine.model.store.cache.check_integrity()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a file system in memory")
def test_a_file_system_without_direct_reads_works(tiny_moe):
    path = f"/dev/shm/edgemoe-test-{os.getpid()}.moe"
    try:
        shutil.copy(tiny_moe, path)
        with edgemoe.load(path) as there, edgemoe.load(tiny_moe) as here:
            assert np.array_equal(there.logits(IDS), here.logits(IDS))
    finally:
        os.unlink(path)


def test_a_disk_that_fills_up_loses_nothing(tmp_path, tiny_moe):
    """A limit on file size stands in for a full disk: writing beyond it fails in the same way."""
    out = tmp_path / "out.moe"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from pathlib import Path; from tiny import tiny_checkpoint;"
        "from edgemoe.convert.convert import convert; convert(tiny_checkpoint(), Path(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{out}.part'"
    assert not out.exists()
    convert(tiny_checkpoint(), out)
    assert out.read_bytes() == tiny_moe.read_bytes()
