"""The page without a browser: its files, who may fetch them, and the events that viewers get."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import numpy as np
import pytest
from served import measured_file, running
from tiny import tiny_checkpoint

import edgemoe.serve
from edgemoe.convert.convert import convert
from edgemoe.file.append import add_sections
from edgemoe.file.reader import open_moe
from edgemoe.model import KvTable, KvTypes
from edgemoe.serve.app import make_app
from edgemoe.serve.shelf import Shelf

PAGE = Path(edgemoe.serve.__file__).parent / "page"
HTML = {"Accept": "text/html,*/*"}


def chat(**more):
    return {"messages": [{"role": "user", "content": "Say it."}], **more}


def told(server, count=1, asks=False):
    """Returns the first `count` events of a viewer.

    With `asks`, a reply is requested after the first event, and events are returned until all of it is reported.
    """
    found, made = [], -1
    with httpx.stream("GET", server.url + "/events", timeout=20) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                found.append((name, json.loads(line[6:])))
                if asks and len(found) == 1:
                    server.post("/v1/chat/completions", chat(max_tokens=5, seed=1))
                    made = server.service.batcher.made
                is_told = found[-1][1].get("count", {}).get("made") == made
                if is_told if asks else len(found) == count:
                    return found
    raise AssertionError("the stream has ended")


def test_browsers_get_the_page_and_programs_a_line(server):
    page = server.get("/", headers=HTML)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == (PAGE / "index.html").read_text()
    assert server.get("/").text.startswith("edgemoe ")


def test_every_file_is_served_and_nothing_else(server):
    files = [p for p in PAGE.rglob("*.*") if p.suffix in (".js", ".css", ".svg", ".html")]
    assert len(files) > 15
    client = httpx.Client(base_url=server.url, timeout=60)
    for path in files:
        done = client.get(f"/page/{path.relative_to(PAGE).as_posix()}")
        assert done.content == path.read_bytes()
        if path.suffix == ".js":
            assert done.headers["content-type"].startswith("text/javascript")
        again = client.get(done.url.path, headers={"If-None-Match": done.headers["etag"]})
        assert again.status_code == 304
    for name in (
        "../app.py",
        "%2e%2e/app.py",
        "..%2fapp.py",
        "/etc/passwd",
        "vendor",
        "vendor/",
        "x.js",
        "",
    ):
        assert client.get(f"/page/{name}").status_code == 404
    client.close()


def test_every_file_is_in_the_package():
    listed = (PAGE.parents[2] / "pyproject.toml").read_text()
    assert '"edgemoe.serve" = ["page/*", "page/vendor/*"]' in listed
    assert {p.parent for p in PAGE.rglob("*") if p.is_file()} == {PAGE, PAGE / "vendor"}


def test_scripts_come_from_here_alone(server):
    policy = server.get("/", headers=HTML).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    page = (PAGE / "index.html").read_text()
    assert "http" not in page
    assert "style=" not in page
    assert " on" not in page.replace(" one", "").replace(" once", "").replace(" only", "").replace(
        " on</", ""
    )
    for path in PAGE.glob("*.js"):
        assert "innerHTML" not in path.read_text(), path


def test_what_is_vendored_is_what_was_released():
    listed = dict(
        reversed(line.split()) for line in (PAGE / "vendor" / "SHA256SUMS").read_text().splitlines()
    )
    files = {p.name: p for p in (PAGE / "vendor").glob("*.js")}
    assert listed.keys() == files.keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name]
        assert (PAGE / "vendor" / f"{path.stem}.LICENSE").exists()


def test_files_need_no_key_and_figures_do(tiny_moe):
    with running(tiny_moe, keys=("sesame",)) as server:
        assert server.get("/", headers=HTML).status_code == 200
        assert server.get("/page/main.js").status_code == 200
        assert "tiny" not in server.get("/").text
        for path in ("/events", "/page", "/v1/models"):
            assert server.get(path).status_code == 401
        assert server.get("/events", headers={"Host": "evil.com"}).status_code == 403
        (name, all_), *_ = told_with_key(server)
        assert name == "all"
        assert all_["name"] == "tiny"


def told_with_key(server):
    key = {"Authorization": "Bearer sesame"}
    with httpx.stream("GET", server.url + "/events", headers=key, timeout=20) as stream:
        lines = stream.iter_lines()
        return [(next(lines)[7:], json.loads(next(lines)[6:]))]


def test_a_server_without_page(tiny_moe):
    with running(tiny_moe, has_page=False) as server:
        assert server.get("/", headers=HTML).headers["content-type"].startswith("text/plain")
        assert server.get("/page/main.js").status_code == 404
        assert server.get("/events").status_code == 404


def test_a_viewer_is_told_what_is_in_memory(server):
    (_, first), *later = told(server, asks=True)
    store = server.service.model.store
    bits = np.frombuffer(base64.b64decode(first["map"]), np.uint8).copy()
    assert bits.shape == (first["layers"] * first["experts"],)
    has_run = np.zeros(len(bits), bool)
    for name, now in later:
        assert name == "now"
        state = bits.copy()
        if "map" in now:
            state = np.frombuffer(base64.b64decode(now["map"]), np.uint8)
        elif "cells" in now:
            words = np.frombuffer(base64.b64decode(now["cells"]), np.uint32)
            state[words >> 8] = words & 255
        bits, has_run = state & 15, has_run | ((state & 32) > 0)
    assert now["count"]["hits"] + now["count"]["misses"] > 0
    level_bits = np.array([0, *store.level_bits])
    np.testing.assert_array_equal(bits, level_bits[store.residency.reshape(-1)])
    assert has_run.any()
    assert (bits[has_run] > 0).all()  # what ran is in memory, as all fit


def test_reads_and_runs_are_counted(tiny_moe):
    with running(tiny_moe) as server:
        store = server.service.model.store
        assert not store.runs.any()
        server.post("/v1/chat/completions", chat(max_tokens=3, seed=1))
        c = server.service.model.config
        tokens = server.service.batcher.computed + server.service.batcher.made - 1
        assert store.runs.sum() == tokens * len(c.moe_layers) * c.experts_per_token
        assert store.reads.sum() == server.service.model.store.stats["reads"] > 0
        assert ((store.reads > 0) == (store.residency > 0)).all()
        assert store.lacks.sum() == store.stats["misses"] > 0
        assert not store.lacks[store.reads == 0].any()


@pytest.fixture
def measured(tiny_moe, tmp_path):
    return measured_file(tiny_moe, tmp_path / "measured.moe")


def test_the_shelf_has_what_was_measured_and_the_other_models(
    measured, tiny_moe, tmp_path, monkeypatch
):
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("EDGEMOE_MODELS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (folder / "self.moe").symlink_to(measured)
    (folder / "other.moe").symlink_to(tiny_moe)
    (folder / "rubbish.moe").write_text("x")
    with running(measured, options={"bits": "auto"}) as server:
        told = server.get("/shelf").json()
        assert told["has_allocation"]
        assert told["measured_on"] == "text: a novel"
        assert set(told["quality"]) == {"2", "4", "8"}  # measured with the present settings
        assert told["quality"]["8"] == {"is_reference": True}
        assert told["quality"]["4"]["change"] == pytest.approx(0.01005, abs=1e-5)
        other, rubbish = told["models"]
        assert (other["name"], other["plan"][0]["bits"], other["plan"][0]["resident"]) == (
            "other",
            8,
            1.0,
        )
        assert rubbish["name"] == "rubbish"
        assert "truncated" in rubbish["broken"] or "magic" in rubbish["broken"]
        # Switches to bits per expert, and back.
        assert server.service.model.options.bits == "auto"
        now = server.post("/settings", {"bits": 2}).json()
        assert (now["set"]["bits"], now["set"]["is_auto"]) == (2, False)
        now = server.post("/settings", {"bits": "auto"}).json()
        assert (now["set"]["bits"], now["set"]["is_auto"]) == (4, True)
        assert "3" in now["notes"][0]
        assert server.post("/settings", {"bits": "most"}).status_code == 400


def test_sections_of_other_models_are_not_read_beside_the_budget(tiny_moe, tmp_path, monkeypatch):
    """Nor are sections of its own model that have nothing to do with quality; the events are the same."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("EDGEMOE_MODELS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for path in (folder / "other.moe", tmp_path / "own.moe"):
        path.write_bytes(tiny_moe.read_bytes())
        add_sections(path, {"large": bytes(24 << 20), "quality": b"{}"})
    with running(tmp_path / "own.moe") as server:
        shelf = Shelf(server.service.model)
        shelf._told()  # so that imports are not measured
        tracemalloc.start()
        try:
            (told,) = shelf._told()["models"]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 4 << 20
        assert told["plan"] == list(shelf._plan(open_moe(tiny_moe)))


def test_a_plan_of_the_shelf_is_the_engine_s(tiny_moe):
    moe = open_moe(tiny_moe)
    with running(tiny_moe, options={"ram": 24 << 20}) as server:
        model = server.service.model
        rows = list(Shelf(model)._plan(moe))
        assert rows[0]["resident"] == pytest.approx(
            min(1, model.budget.slots / model.budget.experts), abs=0.05
        )
        small = dataclasses.replace(model.budget, ram=1 << 20)
        monkey = SimpleNamespace(budget=small, options=model.options, threads=1)
        rows = list(Shelf(monkey)._plan(moe))
        assert [row["bits"] for row in rows] == [8, 6, 4, 3, 2]
        assert all("too small" in row["why_not"] for row in rows)


def test_a_plan_of_the_shelf_has_the_other_model_s_cache_types(tiny_moe, tmp_path, monkeypatch):
    """A table of each layer's types is of one model alone."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("EDGEMOE_MODELS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    convert(tiny_checkpoint(layers=3), folder / "bare.moe")
    shutil.copy(folder / "bare.moe", folder / "small.moe")
    for path, layers in ((folder / "small.moe", 3), (tmp_path / "own.moe", 2)):
        if layers == 2:
            shutil.copy(tiny_moe, path)
        of = KvTable.identity(open_moe(path))
        table = KvTable(of=of, layers=(("q4_0", "q4_0"),) * layers)
        add_sections(path, {"kv_types": table.to_json()})
    options = {"cache_type_k": "auto", "cache_type_v": "auto", "ram": 24 << 20}
    with running(tmp_path / "own.moe", options=options) as server:
        bare, small = server.get("/shelf").json()["models"]
        assert (bare["name"], small["name"]) == ("bare", "small")
        types = Shelf(server.service.model)._types
        assert types(open_moe(folder / "bare.moe")) == KvTypes()
        assert types(open_moe(folder / "small.moe")).of(2) == KvTypes("q4_0", "q4_0")
        assert bare["plan"][0]["resident"] <= small["plan"][0]["resident"]


def test_all_routes_are_described(tiny_moe, tmp_path):
    others = {
        "/openapi.json", "/page/{name}", "/v1/embeddings", "/embeddings", "/v1/health", "/models",
        "/chat/completions", "/completions", "/responses",
    }  # fmt: skip
    every = {"prefixes": str(tmp_path), "has_metrics": True, "has_page": True}
    for settings in (every, {"prefixes": None, "has_metrics": False, "has_page": False}):
        with running(tiny_moe, **settings) as server:
            described = server.get("/openapi.json").json()["paths"]
            routes = {
                re.sub(":[a-z]+}", "}", r.path): r.methods - {"HEAD"}
                for r in make_app(server.service).routes
            }
        if settings is every:
            assert described.keys() == routes.keys() - others
        else:
            lacks = {"/slots/{slot}", "/metrics", "/events", "/shelf", "/settings"}
            assert described.keys() == routes.keys() - others - lacks
        for path, what in described.items():
            assert {how.upper() for how in what} == routes[path], path


def test_the_log_has_no_text(server):
    server.post("/v1/chat/completions", chat(max_tokens=2, user="someone"))
    server.post("/v1/chat/completions", {"messages": "wrong"})
    first = told(server)[0][1]
    good, bad = [e for e in first["log"] if e["route"] == "/v1/chat/completions"][-2:]
    assert good["status"] == 200
    assert good["made"] == 2
    assert good["end"] == "length"
    assert good["ignored"] == ["user"]
    assert bad["status"] == 400
    assert "Say it" not in json.dumps(first["log"])


def test_viewers_are_limited_and_leave_nothing(server):
    with contextlib.ExitStack() as stack:
        open_streams = []
        for _ in range(8):
            stream = stack.enter_context(httpx.stream("GET", server.url + "/events", timeout=20))
            open_streams.append(stream.iter_lines())
            next(open_streams[-1])
        assert server.get("/events").status_code == 429
    end = time.monotonic() + 10
    while True:
        with httpx.stream("GET", server.url + "/events", timeout=20) as stream:
            if stream.status_code == 200:
                break
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("path", sorted(p.name for p in PAGE.glob("*.js")))
def test_files_are_small(path):
    assert len((PAGE / path).read_text().splitlines()) <= 350


def test_settings_are_changed_for_the_next_pass(tiny_moe):
    with running(tiny_moe) as server:
        before = server.post("/v1/chat/completions", chat(max_tokens=5, seed=1)).json()
        done = server.post("/settings", {"bits": 2, "experts": 1})
        assert done.status_code == 200
        assert done.json()["set"]["bits"] == 2
        assert done.json()["set"]["experts"] == 1
        assert [note.split(":")[0] for note in done.json()["notes"]] == ["lossy", "lossy"]
        after = server.post("/v1/chat/completions", chat(max_tokens=5, seed=1)).json()
        assert (
            after["system_fingerprint"]
            == done.json()["fingerprint"]
            != before["system_fingerprint"]
        )
        assert after["edgemoe"]["average_bits"] == 2
        assert after["edgemoe"]["notes"] == done.json()["notes"]
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert server.post("/settings", {"bits": None, "experts": None}).json()["notes"] == []
        again = server.post("/v1/chat/completions", chat(max_tokens=5, seed=1)).json()
        assert again["choices"] == before["choices"]
        assert again["edgemoe"]["logits_hash"] == before["edgemoe"]["logits_hash"]
        assert again["system_fingerprint"] == before["system_fingerprint"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bits": 5}, "bits"), ({"bits": "x"}, "bits"), ({"experts": 0}, "experts"), ({"experts": 99}, "experts"),
        ({"scheduler": "x"}, "scheduler"), ({"options": {"x": 1}}, "options"),
        ({"ram": 1}, "ram"), ({"scheduler": None}, "scheduler"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(server, body, param):
    done = server.post("/settings", body)
    assert done.status_code == 400
    assert done.json()["error"]["param"] == param
    assert server.service.model.notes == ()


def test_pages_from_elsewhere_change_nothing(server):
    for origin in ("http://evil.test", "null", server.url.replace("http://", "http://x.")):
        done = server.post("/settings", {"bits": 2}, headers={"Origin": origin})
        assert done.status_code == 403
    assert server.service.model.notes == ()
    done = server.post("/settings", {}, headers={"Origin": server.url})
    assert done.status_code == 200
