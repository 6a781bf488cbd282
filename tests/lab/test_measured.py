"""`--max-quality-loss` picks the cheapest of the measured settings whose loss is surely below the limit."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgemoe.cli import main as edgemoe_cli
from edgemoe.cli import run as run_cli
from edgemoe.cli.measured import share
from edgemoe.cli.table import change
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.choice import applies, choose, find, merged, sections_sum, stored
from edgemoe.quant import Allocation
from edgemoe.store import expert_bytes


def row(bits, loss, error=0.0, *, dense=8, scheduler="on-demand", read=None, slots=0, **options):
    return {
        "scheduler": scheduler, "options": options, "bits": bits, "dense_bits": dense,
        "cache_types": ["f16", "f16"], "kl": loss, "loss_change": loss, "loss_error": error,
        "read_per_token": read, "slots_bytes": slots, "sections": None, "chunks": 30,
    }  # fmt: skip


def names(choice):
    r = choice.row
    return r and (r["bits"], r["dense_bits"], r["scheduler"], *r["options"])


LEVELS = [row(8, 0.0), row(6, 0.001, 0.001), row(4, 0.005, 0.004), row(2, 0.02, 0.001)]


@pytest.mark.parametrize(
    ("max_loss", "expected"),
    [
        (0.0, None),
        (0.002, None),  # 0.001 + 1.645 * 0.001 is more
        (0.003, (6, 8, "on-demand")),
        (0.01, (6, 8, "on-demand")),  # 4 bits could be 0.0116
        (0.012, (4, 8, "on-demand")),
        (0.021, (4, 8, "on-demand")),
        (0.022, (2, 8, "on-demand")),
        (0.5, (2, 8, "on-demand")),
    ],
)
def test_the_fewest_bits_that_are_surely_good_enough(tiny_moe, max_loss, expected) -> None:
    moe = open_moe(tiny_moe)
    # Even with all experts in memory fewer bits are cheaper, as they take less of its bandwidth.
    for slots in (0, 100_000, 10**9):
        found = choose(
            moe, LEVELS, max_loss=max_loss, cache_types=("f16", "f16"), slots=lambda _, s=slots: s
        )
        assert names(found) == expected
    if expected is None:
        assert found.nearest["bits"] == 6


def test_errors_of_an_earlier_version_are_thought_larger(tiny_moe) -> None:
    """They took the tokens of a chunk as independent."""
    old = [{name: value for name, value in r.items() if name != "chunks"} for r in LEVELS]
    for rows, expected in ((LEVELS, 4), (old, 6)):
        found = choose(
            open_moe(tiny_moe), rows, max_loss=0.012, cache_types=("f16", "f16"), slots=lambda _: 0
        )
        assert found.row["bits"] == expected


def test_rows_that_do_not_apply_are_left_out(tiny_moe, tmp_path) -> None:
    path = Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))
    rows = [row("auto", 0.0), {**row(2, 0.0), "cache_types": ["q8_0", "f16"]}]

    def pick(caches=("f16", "f16")):
        return names(
            choose(open_moe(path), rows, max_loss=0.01, cache_types=caches, slots=lambda _: 0)
        )

    add_sections(path, {"allocation": allocation(3)})
    assert pick() is None  # measured with another allocation
    plain = {"dense_bits": 8, "scheduler": "on-demand", "options": {}}
    rows[0]["sections"] = sections_sum(open_moe(path), bits="auto", **plain)
    assert pick() == ("auto", 8, "on-demand")
    assert pick(("q8_0", "f16")) == (2, 8, "on-demand")
    add_sections(path, {"allocation": allocation(8)})
    assert pick() is None


@pytest.mark.parametrize("name", ["allocation", "bit-routers", "paths"])
def test_a_row_of_what_a_section_decided_goes_with_it(tiny_moe, tmp_path, name) -> None:
    path = Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))
    how = {"scheduler": "d2moe", "options": {"frees": "off"}, "bits": 8}

    def mine():
        moe = open_moe(path)
        rows = [row(8, 0.0, read=2.0), row(8, 0.001, scheduler="d2moe", read=1.0, frees="off")]
        rows[1]["sections"] = found
        choice = choose(moe, rows, max_loss=0.01, cache_types=("f16", "f16"), slots=lambda _: 0)
        return choice.row, find(moe, rows, **how, dense_bits=8, cache_types=("f16", "f16"))

    found = None
    assert all(mine())
    add_sections(path, {name: b"trained"})
    assert mine() == (None, None)  # it was measured without the section
    found = sections_sum(open_moe(path), **how, dense_bits=8)
    assert all(mine())
    add_sections(path, {name: b"trained again"})
    assert mine() == (None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": [4]}, {"bits": math.inf}, {"options": 3}, {"loss_change": None}, {"slots_bytes": {}},
        {"loss_error": math.nan}, {"cache_types": 2}, {"dense_bits": "8"}, {"loss_change": 1e9},
        {"read_per_token": "much"}, {"scheduler": None}, {"bits": 10**400},
    ],
)  # fmt: skip
def test_a_damaged_report_is_none(tiny_moe, tmp_path, change) -> None:
    path = Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))
    report = {"measured_on": "text: x", "tokens": "0", "reference": [8, 8], "rows": [row(4, 0.1)]}
    add_sections(path, {"quality": json.dumps(report).encode()})
    assert stored(open_moe(path)) == report
    report["rows"].append({**row(2, 0.1), **change})
    for content in (json.dumps(report), "[" * 100_000, json.dumps({**report, "measured_on": 1})):
        add_sections(path, {"quality": content.encode()})
        assert stored(open_moe(path)) is None
        assert edgemoe_cli.main(["inspect", str(path)]) == 0


def allocation(bits: int) -> bytes:
    each = np.full((2, 8), bits, np.int8)
    return Allocation(method="test", layers=(0, 1), bits=each).to_json()


def test_fewer_dense_bits_leave_more_slots(tiny_moe) -> None:
    moe = open_moe(tiny_moe)
    rows = [row(8, 0.0), row(6, 0.0, dense=8), row(6, 0.0, dense=6), row(4, 0.0, dense=8)]
    rows[2]["sections"] = sections_sum(moe, bits=6, dense_bits=6, scheduler="on-demand", options={})

    def pick(room):
        return names(
            choose(moe, rows, max_loss=0.01, cache_types=("f16", "f16"), slots=room.__getitem__)
        )

    assert pick({8: 0, 6: 1000}) == (4, 8, "on-demand")
    assert pick({8: 0, 6: 10**9}) == (6, 6, "on-demand")  # reads nothing


def before_look_ups(report):
    """Returns a report as stored by versions that looked embedding rows up at the level itself."""
    rows = [{**row, "sections": None} for row in report["rows"]]
    return {**report, "rows": rows, "reference_sections": None}


def test_few_dense_bits_of_before_the_rows_were_looked_up_are_measured_again(
    tiny_moe, tmp_path, capsys
) -> None:
    path = Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))
    short = ("--chunk", "24", "--chunks", "2", "-t", "1", "--store")
    store = ("quality", str(path), *short, "--bits", "8", "4")
    assert edgemoe_cli.main(store) == 0
    now = stored(open_moe(path))
    assert [(r["bits"], r["dense_bits"]) for r in now["rows"]] == [(8, 8), (4, 4)]

    def run(*flags) -> str:
        argv = (str(path), "-p", "Hi", "-n", "1", "--temp", "0", "-t", "1", *flags)
        assert run_cli.main(argv) == 0
        return capsys.readouterr().err

    few = ("--bits", "4", "--dense-bits", "4")
    assert " --bits 4 --dense-bits 4, perplexity" in run("--max-quality-loss", "99%")
    assert "# measured: perplexity " in run(*few)
    old = before_look_ups(now)
    add_sections(path, {"quality": json.dumps(old).encode()})
    assert [r["dense_bits"] for r in stored(open_moe(path))["rows"] if applies(open_moe(path), r)] == [8]  # fmt: skip
    again = f"edgemoe quality {path} --store measures again\n"
    said = run("--max-quality-loss", "99%")
    assert f"for these flags and this memory; 1 of its rows no longer hold: {again}" in said
    assert f"# what was measured of these settings no longer holds: {again}" in run(*few)
    assert edgemoe_cli.main(["inspect", str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f" on-demand at 4 and 4 bits; {again.strip()}" in last
    assert edgemoe_cli.main(store) == 0
    assert stored(open_moe(path)) == now


def test_rows_beside_a_reference_of_before_are_no_rows(tiny_moe, tmp_path, capsys) -> None:
    path = Path(shutil.copy(tiny_moe, tmp_path / "x.moe"))
    short = ("--chunk", "24", "--chunks", "2", "-t", "1", "--store", "--reference", "4")
    store = ("quality", str(path), *short, "--bits", "8", "4")
    assert edgemoe_cli.main(store) == 0
    report = json.loads(open_moe(path).sections["quality"])
    assert stored(open_moe(path))["reference"] == [4, 4]
    old = json.dumps(before_look_ups(report)).encode()
    assert merged(old, report) == report
    add_sections(path, {"quality": old})
    assert stored(open_moe(path)) is None
    capsys.readouterr()
    assert edgemoe_cli.main(["inspect", str(path)]) == 0
    assert " have changed: all rows; " in capsys.readouterr().out.splitlines()[-1]
    assert edgemoe_cli.main(store) == 0
    assert "--store will replace what cannot be compared with these" in capsys.readouterr().err
    assert len(stored(open_moe(path))["rows"]) == 2


def test_options_save_what_they_were_measured_to_save(tiny_moe) -> None:
    moe = open_moe(tiny_moe)
    total = 16 * expert_bytes(moe, 5)
    base, half = row(8, 0.0, read=1000, slots=total // 2), total // 2
    hobbit = row(8, 0.0, 0.001, scheduler="hobbit", read=600, slots=half, t1=0.4)
    slow = row(8, 0.0, scheduler="mc", read=1100, slots=half)

    def pick(rows, slots):
        found = choose(moe, rows, max_loss=0.01, cache_types=("f16", "f16"), slots=lambda _: slots)
        return names(found)

    assert pick([base, hobbit, slow], half) == (8, 8, "hobbit", "t1")
    assert pick([base, slow], half) is None
    assert pick([base, hobbit], half - 1) is None  # more misses than were measured
    assert pick([base, hobbit], total) is None  # nothing is read
    assert pick([row(8, 0.0), hobbit], half) is None  # no row to compare with
    assert pick([base, hobbit, row(4, 0.0)], half) == (4, 8, "on-demand")


def test_stored_rows_stay_beside_new_ones_of_the_same_tokens() -> None:
    old = {"tokens": "a", "reference": [8, 8], "rows": [row(8, 0.0), row(6, 0.1)]}
    new = {"tokens": "a", "reference": [8, 8], "rows": [row(6, 0.2), row(6, 0.3, top_p="0.9")]}
    together = merged(json.dumps(old).encode(), new)["rows"]
    assert [r["loss_change"] for r in together] == [0.0, 0.2, 0.3]
    for other in ({"tokens": "b"}, {"reference": [4, 4]}, {"rows": [{"kl": 1}]}):
        assert merged(json.dumps({**old, **other}).encode(), new) == new
    assert merged(None, new) == merged(b"?", new) == new
    for damaged in (b"[1]", b"[]", b"null", b'"rows"', b"1"):  # JSON, but no report
        assert merged(damaged, new) == new


def test_a_share_is_a_number_or_a_percentage() -> None:
    assert share("0.01") == share("1%") == 0.01
    for text in ("1", "-1%", "x", "nan", "", "%", "100%"):
        with pytest.raises(ValueError, match="expected a share of perplexity like 0.01 or 1%"):
            share(text)


# ------------------------------------------------------------ the commands


@pytest.fixture(autouse=True)
def no_input(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture(scope="module")
def measured(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copy(tiny_moe, tmp_path_factory.mktemp("max-loss") / "x.moe"))
    short = ("--chunk", "24", "--chunks", "3", "-t", "1", "--store")
    assert edgemoe_cli.main(["quality", str(path), *short, "--dense-bits", "8"]) == 0
    runs = ("--run", "on-demand", "bits=8", "--run", "on-demand", "miss_bits=2", "--decode")
    assert edgemoe_cli.main(["quality", str(path), *short, *runs]) == 0
    return path


def test_settings_and_levels_are_stored_together(measured: Path, capsys) -> None:
    report = stored(open_moe(measured))
    assert report["reference"] == [8, 8]
    found = [(r["bits"], r["options"], r["read_per_token"] is not None) for r in report["rows"]]
    assert found == [
        (8, {}, False), (6, {}, False), (4, {}, False), (3, {}, False), (2, {}, False),
        (8, {}, True), (8, {"miss_bits": "2"}, True),
    ]  # fmt: skip
    assert report["rows"][5]["loss_change"] == 0
    assert edgemoe_cli.main(["inspect", str(measured)]) == 0
    assert "| on-demand miss_bits=2 | 7." in capsys.readouterr().out


def test_run_and_bench_pick_and_say_so(measured: Path, capsys) -> None:
    rows = {r["bits"]: r for r in stored(open_moe(measured))["rows"][1:5]}
    limit = math.expm1(max(r["loss_change"] + 1.645 * r["loss_error"] for r in rows.values()))
    # A limit above the highest of these losses admits the fewest bits.
    flags = ("--max-quality-loss", f"{limit + 1e-9:.9f}")
    argv = (str(measured), "-p", "Hi", "-n", "1", "--temp", "0", "-t", "1", *flags)
    assert run_cli.main(argv) == 0
    picked = capsys.readouterr().err
    assert f"# --max-quality-loss {flags[1]}: --bits 2 --dense-bits 8, perplexity " in picked
    assert "the package's own (Moby-Dick, speeches), 3 chunks of 24 tokens" in picked
    assert "# lossy: experts at 2 of the file's 8 bits" in picked
    assert ", 2 bits," in picked
    assert edgemoe_cli.main(["bench", str(measured), "-p", "0", "-n", "2", "-r", "1", *flags]) == 0
    assert ": --bits 2 --dense-bits 8, perplexity" in capsys.readouterr().err
    assert run_cli.main((*argv, "--scheduler", "auto")) == 0  # it decides the rest
    assert f"{flags[1]}: --bits 2 --dense-bits 8, perplexity" in capsys.readouterr().err
    assert run_cli.main((*argv[:-1], "0")) == 0
    picked = capsys.readouterr().err
    assert "--max-quality-loss 0: exact: the next cheaper setting, " in picked
    assert "lossy" not in picked


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (("hobbit", "t1=x"), "t1: expected a number, got 'x'"),
        (("mc", "t1=1"), "option t1: there is no such"),
        (("on-demand", "miss_bits=soon"), "miss_bits: expected a whole number"),
        (("on-demand", "bits=x"), "bits: expected a whole number, got 'x'"),
        (("nosuch",), "scheduler: expected one of on-demand"),
    ],
)
def test_a_mistake_in_the_last_run_is_found_before_the_first(tiny_moe, capsys, run, message):
    assert edgemoe_cli.main(["quality", str(tiny_moe), "--run", "on-demand", "--run", *run]) == 1
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_rows_that_are_lost_are_announced(measured: Path, tmp_path, capsys) -> None:
    path = shutil.copy(measured, tmp_path / "y.moe")
    short = ("--chunk", "24", "-t", "1", "--store", "--dense-bits", "8", "--bits", "8", "4")
    assert edgemoe_cli.main(["quality", str(path), *short, "--chunks", "3"]) == 0
    assert "replace" not in capsys.readouterr().err
    assert edgemoe_cli.main(["quality", str(path), *short, "--chunks", "2"]) == 0
    err = capsys.readouterr().err
    assert "--store will replace 7 rows that cannot be compared with these: text: " in err
    assert "3 chunks of 24 tokens" in err


def test_ctrl_c_keeps_the_rows_that_are_done(tiny_moe, tmp_path, capsys, monkeypatch) -> None:
    import edgemoe.lab.quality.quality as lab

    path, real = shutil.copy(tiny_moe, tmp_path / "z.moe"), lab.measure

    def until_three(model, trial, *rest, **named):
        if trial.bits == 3:
            raise KeyboardInterrupt
        return real(model, trial, *rest, **named)

    monkeypatch.setattr(lab, "measure", until_three)
    short = ("--chunk", "24", "--chunks", "2", "-t", "1", "--store")
    assert edgemoe_cli.main(["quality", str(path), *short]) == 130
    assert "interrupted; the rows above are all" in capsys.readouterr().err
    assert [r["bits"] for r in stored(open_moe(path))["rows"]] == [8, 6, 4]


def test_a_lossy_run_says_what_was_measured_of_it(measured: Path, capsys) -> None:
    argv = (str(measured), "-p", "Hi", "-n", "1", "--temp", "0", "-t", "1")
    rows = stored(open_moe(measured))["rows"]
    for flags, number in ((("--bits", "4"), 2), (("--set", "miss-bits=2"), 6)):
        assert run_cli.main((*argv, *flags)) == 0
        said = capsys.readouterr().err
        assert f"# measured: perplexity {change(rows[number])} on the " in said
        assert (", with 0 MiB for experts\n" in said) == (flags[0] == "--set")
    for flags in ((), ("--bits", "4", "-ctk", "q8_0"), ("--bits", "4", "--experts", "1")):
        assert run_cli.main((*argv, *flags)) == 0
        assert "measured" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("--bits", "4"), 2, "picks the settings itself; expected no --bits"),
        (("--set", "top_p=0.9"), 2, "picks the settings itself; expected no --set"),
        (("--scheduler", "mc"), 2, "picks the settings itself; expected no --scheduler but auto"),
        (("--max-quality-loss", "2"), 2, "expected a share of perplexity like 0.01 or 1%, got '2'"),
        ((), 1, "edgemoe quality MODEL --store measures it"),
    ],
)
def test_what_cannot_be_picked_is_one_line(tiny_moe, capsys, argv, code, message) -> None:
    def status() -> int:
        try:
            return run_cli.main((str(tiny_moe), "-p", "Hi", "--max-quality-loss", "1%", *argv))
        except SystemExit as left:
            return left.code

    assert status() == code
    err = capsys.readouterr().err
    assert message.replace("MODEL", str(tiny_moe)) in err
    assert err.strip().count("\n") == 0


def test_bits_of_each_expert_are_no_option(tiny_moe, capsys, tmp_path) -> None:
    (tmp_path / "x.toml").write_text("bits = 4")
    for given in ("bits=4", f"@{tmp_path / 'x.toml'}"):
        assert run_cli.main((str(tiny_moe), "-p", "Hi", "--set", given)) == 1
        assert (
            "option bits: there is no such; expected one of: look_ahead" in capsys.readouterr().err
        )


def test_options_of_settings_are_of_every_trial(tiny_moe, capsys) -> None:
    argv = ("quality", str(tiny_moe), "--chunk", "32", "--chunks", "2")
    assert edgemoe_cli.main((*argv, "--bits", "2", "4", "--set", "dense_bits=3")) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[2:4] for line in lines] == [[" 4 ", " 3 "], [" 2 ", " 3 "]]
    for name in ("bits", "dense_bits"):
        assert edgemoe_cli.main((*argv, "--run", "on-demand", f"{name}=x")) == 1
        assert f"{name}: expected a whole number, got 'x'" in capsys.readouterr().err


def test_rows_that_cannot_be_compared_are_replaced_and_it_says_so(measured, tmp_path, capsys):
    path = Path(shutil.copy(measured, tmp_path / "x.moe"))
    count = len(stored(open_moe(path))["rows"])
    argv = ("quality", str(path), "--chunk", "32", "--chunks", "1", "--bits", "4", "--store")
    assert edgemoe_cli.main(argv) == 0
    assert (
        f", in place of {count} rows of other tokens or another reference;"
        in capsys.readouterr().err
    )
    assert len(stored(open_moe(path))["rows"]) == 1
    assert edgemoe_cli.main((*argv[:-2], "2", "--store")) == 0
    assert ", beside 1 rows of before;" in capsys.readouterr().err
