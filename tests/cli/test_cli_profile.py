"""`edgemoe profile`, from a trace to the report page, on the tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import tiny_checkpoint

import edgemoe
from edgemoe.cli.main import main
from edgemoe.convert.convert import convert
from edgemoe.file.reader import open_moe
from edgemoe.file.tensors import view
from edgemoe.lab.routing.replay import Tape, make_scheduler, replay
from edgemoe.lab.routing.study import measured
from edgemoe.lab.routing.timing import Timing
from edgemoe.runtime.trace import read


@pytest.fixture(scope="module")
def traced(tiny_moe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    text = folder / "text.txt"
    text.write_text("The sea, the sea! " * 8, encoding="utf-8")
    path = folder / "x.trace"
    arguments = ["trace", str(tiny_moe), "--text", str(text), "-o", str(path), "--prompt", "20"]
    assert main(["profile", *arguments, "--look-ahead", "1", "--bits", "4", "-t", "1"]) == 0
    return path


def run(*arguments):
    return main(["profile", *map(str, arguments)])


def test_a_trace_follows_the_text(traced, tiny_moe, tmp_path, capsys):
    trace = read(traced)
    _, tokens = trace.passes()
    assert tokens.tolist() == [20] + [1] * 124
    assert (trace.header.bits, trace.header.look_ahead, trace.header.reads_ahead) == (4, 1, False)
    ahead = trace.by_token("ahead_experts", single=True)
    assert (ahead[:, 0] < 8).all()
    assert (ahead[:, 1] == 0xFFFF).all()  # no layer follows
    assert trace.by_token("token")[:, 0].tolist() == list(range(144))
    other = tmp_path / "random.trace"
    assert run("trace", tiny_moe, "-o", other, "-n", 30, "--prompt", 29, "--look-ahead", 0) == 0
    assert read(other).passes()[1].tolist() == [29, 1]
    assert "30 tokens" in capsys.readouterr().err


def test_a_report_says_what_numpy_says(traced, capsys, tmp_path):
    assert run("report", traced, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    experts = read(traced).by_token("experts")
    counts = [[int((experts[:, layer] == e).sum()) for e in range(8)] for layer in range(2)]
    assert report["usage"]["counts"] == counts
    top = report["usage"]["top"][0]
    assert top["share"] == pytest.approx(np.max(counts) / 144)
    assert [r["window"] for r in report["locality"]["srp"]] == [4, 16, 64]
    assert {r["rule"] for r in report["locality"]["hit_rates"]} == {"lru", "lfu", "sch", "belady"}
    assert {p["name"] for p in report["predictors"]} >= {"router ahead", "transition table"}
    parts = report["waits"]["per_token"]
    assert 1e6 / sum(parts.values()) == pytest.approx(report["waits"]["rate"])
    assert run("report", traced) == 0
    out = capsys.readouterr().out
    for word in ("SRP", "Belady", "router ahead", "waiting for reads", "Most used experts"):
        assert word in out
    assert "its end is missing" not in out
    cut = tmp_path / "cut.trace"
    cut.write_bytes(traced.read_bytes()[:-5])
    assert run("report", cut) == 0
    assert "threads; its end is missing\n" in capsys.readouterr().out


def test_a_replay_prints_a_row_per_line_and_budget(traced, capsys):
    arguments = ["--budgets", "25%", "60KiB", "--policies", "lru", "lfu"]
    assert run("replay", traced, *arguments, "--set", "on-demand.look-ahead=false") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2 * 6
    assert run("replay", traced, *arguments, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["replays"]) == 12
    for budget in {r["budget_bytes"] for r in report["replays"]}:
        hits = {r["name"]: r["hits"] for r in report["replays"] if r["budget_bytes"] == budget}
        assert hits["Belady"] >= max(hits["lru"], hits["lfu"])


def test_a_table_is_counted_and_used(traced, tiny_moe, tmp_path, capsys):
    model = shutil.copy(tiny_moe, tmp_path / "x.moe")
    assert run("train", model, traced, traced, "--table") == 0
    said = capsys.readouterr().err
    tokens = len(read(traced).by_token("experts"))
    assert f"# {2 * tokens} tokens" in said
    assert "--scheduler expertwise uses it" in said
    totals = view(open_moe(model).sections["transitions"])[0]["transitions.totals"]
    assert totals.sum() == 2 * tokens * 2 * 2  # both times; two layers, two experts per token
    with edgemoe.load(model, scheduler="expertwise") as engine:
        learned = engine.scheduler.state()
    assert np.array_equal(learned["transitions.totals"], totals)
    other = tmp_path / "other.moe"
    convert(tiny_checkpoint(experts=4), other)
    assert run("train", other, traced, "--table") == 1
    assert (
        "expected traces of 2 layers of 4 experts, 2 per token; got one of 2 of 8"
        in capsys.readouterr().err
    )


def test_the_page_needs_nothing_else(traced, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page, pictures = tmp_path / "x.html", tmp_path / "png"
    assert run("plot", traced, "-o", page, "--png", pictures, "--budgets", "25%", "50%") == 0
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == len(list(pictures.glob("*.png"))) == 4
    links = re.findall(
        r"(?:src|href)\s*=\s*\"(?!data:)[^\"]*|url\(|@import|<script|https?://", text
    )
    assert links == []
    assert text.count("<table>") == text.count("</table>") > 5
    assert "Belady" in text
    for picture in pictures.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{tmp}/none"], "No such file"),
        (["report", "{tmp}/broken"], "not a trace"),
        (["replay", "{trace}", "--budgets", "0%"], "budgets: expected shares"),
        (["replay", "{trace}", "--budgets", "soon"], "expected something like 4GiB"),
        (["replay", "{trace}", "--budgets", "1KiB"], "one expert takes"),
        (["replay", "{trace}", "--schedulers", "nosuch"], "scheduler: expected one of"),
        (["replay", "{trace}", "--set", "mc.most=2"], "--set mc: expected one of --schedulers"),
        (["replay", "{trace}", "--set", "on-demand.t1=2"], "option t1: there is no such"),
        (["replay", "{trace}", "--policies", "fifo"], "policy: expected one of lru, lfu"),
        (["replay", "{trace}", "--set", "look-ahead=1"], "expected SCHEDULER.KEY=VALUE"),
        (["trace", "{moe}", "-o", "{tmp}/t", "-n", "1"], "at least 2"),
        (["trace", "{moe}", "-o", "{tmp}/t", "--text", "{tmp}/empty"], "at least 2 tokens"),
        (["trace", "{moe}", "-o", "{tmp}/t", "--set", "x"], "expected KEY=VALUE"),
        (["trace", "{moe}", "-o", "{tmp}/broken"], "left as it is"),
        (["trace", "{moe}", "-o", "{tmp}/t", "--look-ahead", "9"], "look_ahead: expected 0 to 4"),
        (["trace", "{moe}", "-o", "{tmp}/t", "--text", "{tmp}/latin"], "expected UTF-8"),
        (["trace", "{moe}", "-o", "{tmp}/t", "--prompt", "0"], "prompt: expected 1 to"),
    ],
)
def test_a_mistake_gets_one_clear_line(traced, tiny_moe, tmp_path, capsys, arguments, message):
    (tmp_path / "broken").write_bytes(b"what?\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty").write_bytes(b"")
    places = {"tmp": tmp_path, "trace": traced, "moe": tiny_moe}
    assert run(*(a.format(**places) for a in arguments)) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("# ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"edgemoe profile {arguments[0]}: ")
    assert message in lines[0]
    assert (tmp_path / "broken").read_bytes() == b"what?\n"


def test_a_short_trace_is_reported_as_far_as_it_goes(tiny_moe, tmp_path, capsys):
    pieces = tmp_path / "pieces.trace"
    assert run("trace", tiny_moe, "-o", pieces, "-n", 40, "--pieces", 20) == 0
    assert run("report", pieces) == 0
    told = capsys.readouterr()
    assert "Segment routing best performance" in told.out
    assert "Time of a single token" not in told.out
    assert told.err.count("# left out: ") == 2
    assert run("report", pieces, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["usage"]["tokens"] == 40
    assert report["waits"] is report["predictors"] is None


def test_a_result_that_could_not_be_kept_is_refused_first(
    traced, tiny_moe, tmp_path, capsys, monkeypatch
):
    import os

    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as tests may run as root
    assert run("plot", traced, "-o", tmp_path / "x.html") == 1
    assert capsys.readouterr().err.endswith("x.html: cannot be written\n")
    assert main(["quality", str(tiny_moe), "--json", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err.endswith("x.json: cannot be written\n")


def test_the_page_does_not_replace_what_it_is_made_from(traced, tiny_moe, tmp_path, capsys):
    trace, model = (shutil.copy(p, tmp_path / p.name) for p in (traced, tiny_moe))
    for target in (trace, model):
        before = target.read_bytes()
        assert run("plot", trace, "-o", target) == 1
        assert "expected another file to write" in capsys.readouterr().err
        assert target.read_bytes() == before


def test_wrong_usage_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["profile", "dance"])
    assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        main(["profile", "replay"])
    assert end.value.code == 2


def test_plots_without_matplotlib_name_the_extra(traced, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from edgemoe.cli.main import main\n"
        "sys.exit(main(['profile', 'plot', *sys.argv[1:]]))"
    )
    got = subprocess.run(
        [sys.executable, "-c", code, traced, "-o", tmp_path / "x.html", "--budgets", "50%"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert got.returncode == 1
    assert "pip install 'edgemoe[lab]'" in got.stderr
    assert "replaying" not in got.stderr  # before anything is done
    assert not (tmp_path / "x.html").exists()


TIMING = Timing(before_us=(50.0, 50.0), expert_us=20.0, miss_us=1.0, latency_us=90.0, rate=900.0)


def test_the_page_sets_measured_quality_beside_speed(
    traced, tiny_moe, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        "edgemoe.lab.routing.timing.fit", lambda trace: TIMING
    )  # all fitted: no reads
    model, page = tmp_path / "x.moe", tmp_path / "x.html"
    shutil.copy(tiny_moe, model)
    settings = ["--chunk", "48", "--chunks", "2", "--dense-bits", "8", "-t", "1", "--store"]
    assert main(["quality", str(model), *settings, "--bits", "8", "4", "2"]) == 0
    lossy = ["--decode", "--run", "hobbit", "bits=4", "look_ahead=0"]
    lossy += ["--run", "on-demand", "cache_prior=0.1"]
    assert main(["quality", str(model), *settings, *lossy]) == 0
    capsys.readouterr()
    assert run("plot", traced, "-o", page, "--budgets", "50%", "--model", model) == 0
    assert page.read_text(encoding="utf-8").count('src="data:image/png;base64,') == 5
    told = capsys.readouterr().err
    assert "# not drawn: 8 bits: the trace has 2, 3, 4 bits" in told
    assert "cache_prior=0.1: " in told


def test_measured_settings_are_replayed_at_their_bits(traced):
    trace = read(traced)
    row = {"scheduler": "on-demand", "options": {"look_ahead": "off"}, "dense_bits": 8}
    row |= {"kl": 0.1, "loss_change": 0.02, "loss_error": 0.001}
    rows = [{**row, "bits": bits} for bits in (4, 2)]
    (four, two), refused = measured(trace, rows, timing=TIMING, sections={})
    assert not refused
    tape = Tape(trace)
    budget = trace.header.slots_bytes
    scheduler = make_scheduler(
        tape, "on-demand", budget_bytes=budget, options={"look_ahead": False}
    )
    assert four["rate"] == replay(tape, scheduler, budget_bytes=budget, timing=TIMING).rate
    assert two["rate"] > four["rate"]
    assert two["change"] == pytest.approx(np.expm1(0.02))
    assert two["name"] == "2 bits, on-demand look_ahead=off"


def test_auto_of_a_file_without_an_allocation_is_all_that_it_has(traced):
    row = {"scheduler": "on-demand", "options": {}, "dense_bits": 8, "kl": None}
    trace = read(traced)
    found, refused = measured(
        trace, [{**row, "bits": b} for b in ("auto", 4)], timing=TIMING, sections={}
    )
    assert not refused
    assert found[0]["rate"] == found[1]["rate"]


def test_fit_prints_settings_that_the_same_trace_accepts(traced, capsys):
    assert run("fit", traced, "--budget", "40%") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split(" | ")[0].strip("| ") for x in lines[4:9]] == [
        "lru", "lfu", "next-use", "hobbit, equal weights", "hobbit, fitted",
    ]  # fmt: skip
    given = re.findall(r"--set (\w+)=(\S+)", lines[-1])
    assert [name for name, _ in given] == [
        "eviction",
        "w_recency",
        "w_frequency",
        "w_high",
        "w_distance",
    ]
    settings = [x for name, value in given for x in ("--set", f"on-demand.{name}={value}")]
    assert run("replay", traced, "--budgets", "40%", *settings) == 0
    assert run("fit", traced, "--scheduler", "expertflow") == 1
    assert "eviction: this scheduler decides itself what is dropped" in capsys.readouterr().err
