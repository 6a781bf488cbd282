"""Calibrations are checked before a conversion begins: names, shapes, sums and checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_checkpoint

from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.convert.source import SourceModel
from edgemoe.errors import FormatError
from edgemoe.quant import Calibration, write_calibration

META = {"source": "test", "model": "tiny", "tokens": "9", "window": "3", "bits": "2 8"}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Returns every kind of tensor that a calibration of the tiny model may have."""
    rng = np.random.default_rng(0)
    E, D, H = 8, 96, 48
    out: dict[str, np.ndarray[Any, Any]] = {
        "dense.layers.0.q.count": np.array([9]), "dense.head.count": np.array([9]),
        "dense.layers.0.q.squares": rng.random(D, np.float32),
        "dense.head.products": np.eye(D, dtype=np.float32),
    }  # fmt: skip
    for layer in (0, 1):
        p = f"experts.{layer}."
        out |= {
            p + "count": np.full(E, 100), p + "gates": rng.random(E), p + "gates2": rng.random(E),
            p + "in.squares": rng.random((E, D), np.float32), p + "output2": rng.random(E),
            p + "hidden.products": np.stack([np.eye(H, dtype=np.float32)] * E),
            p + "output_max": rng.random(E, np.float32), p + "error": rng.random((E, 2)),
            p + "error2": rng.random((E, 2)),
        }  # fmt: skip
    # Layer 1 has the inputs of 200 tokens, every other one of which went to all experts.
    out["experts.1.in.rows"] = rng.standard_normal((200, D)).astype(np.float32)
    out["experts.1.in.chosen"] = np.tile([np.arange(E), np.full(E, E)], (100, 1))
    return out


def written(path: Path, **changes: Any) -> Path:
    """Writes a calibration with some tensors replaced, or left out where None; `__` in names stands for a dot."""
    changed = tensors() | {name.replace("__", "."): value for name, value in changes.items()}
    write_calibration(path, {n: v for n, v in changed.items() if v is not None}, META)
    return path


def refused(path: Path) -> str:
    config = SourceModel(tiny_checkpoint()).config
    with pytest.raises(FormatError) as error:
        calibration = Calibration(path)
        calibration.check(config)
        calibration.verify()
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_sound_one_is_taken(tmp_path: Path) -> None:
    calibration = Calibration(written(tmp_path / "x"))
    calibration.check(SourceModel(tiny_checkpoint()).config)
    calibration.verify()
    assert calibration.layers == (0, 1)
    assert calibration.bits == (2, 8)
    assert calibration.note == ""
    assert calibration.is_full


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("experts__count", np.ones(8, np.int64), "'experts.count' is nothing that this edgemoe knows"),
        ("experts__x__count", np.ones(8, np.int64), "'experts.x.count' is nothing"),
        ("experts__00__count", np.ones(8, np.int64), "'experts.00.count' is nothing"),
        ("experts__99999__count", np.ones(8, np.int64), "'experts.99999.count' is nothing"),
        ("experts__0__in__count", np.ones(8, np.int64), "'experts.0.in.count' is nothing"),
        ("dense__count", np.ones(1, np.int64), "'dense.count' is nothing"),
        ("other", np.ones(1, np.int64), "'other' is nothing"),
        ("experts__0__count", None, "experts.0.gates: float64 [8] does not fit the others"),
        ("experts__0__count", np.ones(8), "experts.0.count: int64 [8] does not fit the others"),
        ("experts__0__gates", np.ones(7), "experts.0.gates: float64 [7] does not fit"),
        ("experts__0__error", np.ones((8, 3)), "experts.0.error: float64 [8, 3] does not fit"),
        ("experts__0__in__squares", np.ones(8, np.float32), "in.squares: float32 [8] does not fit"),
        ("experts__0__in__products", np.ones((8, 9, 8), np.float32), "[8, 9, 8] does not fit"),
        ("dense__head__products", np.ones((8, 9), np.float32), "float32 [8, 9] does not fit"),
        ("dense__head__count", np.ones(2, np.int64), "dense.head.count: int64 [2] does not fit"),
        ("experts__0__in__squares", np.ones((8, 5), np.float32), "has 5 inputs; the model's has 96"),
        ("experts__1__hidden__products", np.ones((8, 9, 9), np.float32), "has 9 inputs; the model's has 48"),
        ("dense__layers__0__q__squares", np.ones(9, np.float32), "has 9 inputs; the model's has 96"),
        ("dense__nobody__squares", np.ones(9, np.float32), "dense.nobody.squares has 9 inputs; the model's has 0"),
        ("experts__0__in__rows", np.ones((9, 96), np.float32), "in.rows: float32 [9, 96] does not fit"),
        ("experts__0__in__chosen", np.ones((9, 2), np.int64), "in.chosen: int64 [9, 2] does not fit"),
        ("experts__1__in__rows", np.ones((200, 5), np.float32), "in.rows has 5 inputs; the model's has 96"),
        ("experts__1__in__rows", np.ones((8, 96), np.float32), "in.rows: float32 [8, 96] does not fit"),
        ("experts__1__in__rows", np.ones((200, 96)), "in.rows: float32 [200, 96] does not fit"),
        ("experts__1__in__chosen", np.ones(9, np.int64), "does not fit the others"),
        ("experts__1__in__chosen", np.full((200, 2), -1), "in.chosen: expected sums, none below 0"),
        ("experts__1__in__chosen", np.full((200, 8), 7), "in.chosen does not fit the counts"),
        ("experts__1__in__chosen", np.full((200, 8), 10**9), "in.chosen does not fit the counts"),
        ("experts__0__count", np.full(8, -1), "experts.0.count: expected sums, none below 0"),
        ("experts__0__error2", np.full((8, 2), -1.0), "experts.0.error2: expected sums, none below 0"),
    ],
)  # fmt: skip
def test_what_is_no_calibration_of_the_model_is_refused(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    assert message in refused(written(tmp_path / "x", **{name: value}))


def test_another_expert_s_sums_are_checked_where_they_are_mixed_in(tmp_path: Path) -> None:
    counts, squares = np.full(8, 100), np.ones((8, 96), np.float32)
    counts[0], squares[3, 5] = 1, -1.0
    path = written(tmp_path / "x", experts__0__count=counts, experts__0__in__squares=squares)
    with pytest.raises(FormatError, match=r"experts\.0\.in\.squares: expected sums, none below 0"):
        Calibration(path).diagonal("experts.0.0.gate")


def test_what_tokens_give_to_a_layer_that_counts_none_is_refused(tmp_path: Path) -> None:
    known = tensors()
    changes = {
        f"experts__7__in__{what}": known[f"experts.1.in.{what}"] for what in ("rows", "chosen")
    }
    assert "experts.7.in.rows: float32 [200, 96] does not fit the others" in refused(
        written(tmp_path / "x", **changes)
    )


def test_the_number_of_experts_is_not_read_from_damaged_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "x")
    content = bytearray(path.read_bytes())
    content[content.index(np.full(8, 100).tobytes())] ^= 1
    path.write_bytes(content)
    calibration = Calibration(path)
    calibration.check(SourceModel(tiny_checkpoint()).config)
    with pytest.raises(FormatError, match=r"damaged: checksum of experts\.0\.count"):
        calibration.verify()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_product_that_is_no_number_is_refused_before_the_work(
    tmp_path: Path, value: float
) -> None:
    products = tensors()["experts.1.hidden.products"]
    products[3, 5, 7] = value  # off the diagonal
    path = written(tmp_path / "x.calib", experts__1__hidden__products=products)
    with pytest.raises(FormatError, match=r"x\.calib: experts\.1\.hidden\.products: holds NaN"):
        convert(tiny_checkpoint(), tmp_path / "x.moe", calibration=Calibration(path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.calib"]


def test_a_flipped_bit_is_found_before_the_work(tmp_path: Path) -> None:
    path = written(tmp_path / "x.calib")
    content = bytearray(path.read_bytes())
    content[content.index(tensors()["dense.layers.0.q.squares"].tobytes()) + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"damaged: checksum of dense\.layers\.0\.q\.squares"):
        convert(tiny_checkpoint(), tmp_path / "x.moe", calibration=Calibration(path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.calib"]


def test_version_1_is_read_with_a_notice_and_version_2_needs_its_checksums(
    tmp_path: Path, tiny_moe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.calib"
    known = load_file(written(path))
    del known["checksums"]
    save_file(known, path, META | {"edgemoe_calibration": "1"})
    calibration = Calibration(path)
    calibration.verify()
    np.testing.assert_array_equal(
        calibration.diagonal("layers.0.v"), known["dense.layers.0.q.squares"] / np.float32(9)
    )
    said = f"{path}: of an earlier version of edgemoe, without checksums to check"
    lines: list[str] = []
    convert(tiny_checkpoint(), tmp_path / "x.moe", calibration=calibration, say=lines.append)
    assert lines == [said]
    run = [
        "allocate",
        str(tiny_moe),
        "--calibration",
        str(path),
        "--avg-bits",
        "3",
        "--levels",
        "2,8",
    ]
    assert main([*run, "-o", str(tmp_path / "bits.json")]) == 0
    assert capsys.readouterr().err.startswith(f"edgemoe allocate: {said}\n")
    for version in ("2", "3", ""):
        save_file(known, path, META | {"edgemoe_calibration": version})
        with pytest.raises(FormatError, match="not a calibration file of version 1 or 2"):
            Calibration(path)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = Calibration(written(tmp_path / "x")).digest()
    assert first == Calibration(written(tmp_path / "y")).digest()
    assert first != Calibration(written(tmp_path / "x", experts__0__gates=np.ones(8))).digest()
