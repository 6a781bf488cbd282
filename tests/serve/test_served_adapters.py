"""One server for a model and its adapters: each request names one, and gets the reply of that fine-tune alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from served import running
from tiny import tiny_checkpoint
from tuned import DENSE, tune

import edgemoe
from edgemoe.convert.adapter import convert_adapter
from edgemoe.convert.convert import convert
from edgemoe.file.reader import open_moe
from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions
from edgemoe.serve.service import _fingerprint

TEXT = "Once upon a time there was a model which had been told to speak of nothing but itself, " * 2
NAMES = ("tiny", "tiny:law", "tiny:care")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    convert(tiny_checkpoint(), folder / "base.moe")
    for name, tuned in {"law": tune(), "care": tune(dense=DENSE, seed=2)}.items():
        convert(tuned, folder / f"{name}.moe")
        convert_adapter(tuned, folder / f"{name}.moea", open_moe(folder / "base.moe"))
    return folder


@pytest.fixture(scope="module")
def expected(files):
    """The reply of each fine-tune alone, and the hash of its last logits."""
    out = {}
    for name, file in zip(NAMES, ("base", "law", "care"), strict=True):
        with edgemoe.load(files / f"{file}.moe", ram="64MiB") as engine:
            ids = engine.tokenizer.encode(TEXT)
            params = replace(engine.sampling, seed=5, max_tokens=12, ignore_eos=True)
            text = engine.tokenizer.decode(list(engine.generate(ids, params)))
            out[name] = text, engine.stats.logits_hash
    assert len(set(out.values())) == 3
    return out


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    given = [files / "law.moea", files / "care.moea"]
    folder = str(tmp_path_factory.mktemp("prefixes"))
    with running(
        files / "base.moe", options={"adapters": given}, prefixes=folder, pool_bytes=1 << 20
    ) as found:
        yield found


def said(client, name, **more):
    done = client.completions.create(
        model=name, prompt=TEXT, seed=5, max_tokens=12, extra_body={"ignore_eos": True, **more}
    )
    assert done.model == more.get("shown", name if ":" in name else "tiny")
    return (done.choices[0].text, done.edgemoe["logits_hash"]), done.usage


def test_a_fingerprint_is_of_all_weights(files, tmp_path):
    """Dense weights count too."""
    base, found = open_moe(files / "base.moe"), []
    for seed in (1, 1, 2):
        convert_adapter(tune((), DENSE[:1], seed=seed), tmp_path / "x.moea", base)
        options = EngineOptions(adapters=tmp_path / "x.moea", ram="64MiB")
        found.append(_fingerprint(open_model(files / "base.moe", options)))
    assert found[0] == found[1] != found[2]


def test_the_list_has_each(server):
    models = server.get("/v1/models").json()["data"]
    assert [m["id"] for m in models] == list(NAMES)
    assert [m.get("parent") for m in models] == [None, "tiny", "tiny"]


def test_several_at_once_say_what_each_says_alone(server, expected):
    with (
        openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client,
        ThreadPoolExecutor(4) as pool,
    ):
        order = [*NAMES, *reversed(NAMES), *NAMES]
        for name, (found, _) in zip(order, pool.map(lambda n: said(client, n), order), strict=True):
            assert found == expected[name]


def test_prefixes_are_kept_for_each(server, expected):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        for name in (*NAMES, *NAMES):
            found, usage = said(client, name)
            assert found == expected[name]
        assert usage.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 1
    server.settle()


def test_one_sequence_serves_them_in_turn(files, expected, tmp_path):
    """Each request takes over the sequence of another, whose state is kept in memory, then on disk, and comes back."""
    given = {"law": files / "law.moea", "care": files / "care.moea"}
    for pool_bytes in (0, 1 << 20):
        with running(
            files / "base.moe", options={"adapters": given, "sequences": 1},
            prefixes=str(tmp_path / f"p{pool_bytes}"), pool_bytes=pool_bytes,
        ) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:  # fmt: skip
            for turn in range(2):
                for name in NAMES:
                    found, usage = said(client, name)
                    assert found == expected[name]
                    assert (usage.prompt_tokens_details.cached_tokens > 100) == (turn > 0)


def test_names_and_fields(server, expected):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
        assert said(client, "law", shown="tiny:law")[0] == expected["tiny:law"]
        assert said(client, "gpt-4")[0] == expected["tiny"]
        assert said(client, "tiny", adapter="care", shown="tiny:care")[0] == expected["tiny:care"]
        for body in ({"model": "tiny:low"}, {"model": "tiny", "adapter": "low"}):
            reply = server.post("/v1/completions", {"prompt": "x", **body})
            assert reply.status_code == 404
            message = reply.json()["error"]["message"]
            assert message.endswith("expected one of none, law, care, got 'low'")
    for path, body in (
        ("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 3}),
    ):  # fmt: skip
        body |= {
            "model": "tiny:law",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 3,
        }
        assert server.post(path, body).json()["model"] == "tiny:law"
    assert (
        server.post(
            "/v1/responses", {"model": "law", "input": "Hello", "max_output_tokens": 3}
        ).json()["model"]
        == "tiny:law"
    )
