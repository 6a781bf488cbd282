"""Answers count as right as in greedy decoding or by likelihood, and are compared with a reference item by item."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from edgemoe.cli.main import main
from edgemoe.file.reader import open_moe
from edgemoe.lab.quality.made_tasks import MADE, made
from edgemoe.lab.quality.quality import Trial
from edgemoe.lab.quality.tasks import Item, Outcome, judge, read_items, scores
from edgemoe.text.sampler import SamplingParams
from edgemoe.text.tokenizer import Tokenizer

TRIAL = Trial(bits=8, dense_bits=8)


@pytest.fixture(scope="module")
def tokenizer(tiny_moe: Path) -> Tokenizer:
    return Tokenizer.from_files(open_moe(tiny_moe).sections)


def test_made_items_are_the_same_for_a_seed_and_have_their_answer_inside() -> None:
    items = made(list(MADE), 5, seed=3)
    assert items[5:10] == made(["copying"], 5, seed=3)  # whatever other tasks are made
    assert items != made(list(MADE), 5, seed=4)
    assert len({item.prompt for item in items}) == len(items)
    for item in items:
        if item.task == "arithmetic":
            a, b = re.findall(r"\d+", item.prompt.splitlines()[-1])
            assert item.answer == f" {int(a) + int(b)}\n"
        elif item.task == "copying":
            assert f"List:{item.answer}Copy:" == item.prompt[-len(item.answer) - 10 :]
        else:
            assert item.prompt.splitlines()[-1] + item.answer in item.prompt
    # Python guarantees only random.random() across versions: these items must never change.
    assert made(["arithmetic"], 1, seed=0)[0].prompt.endswith("\n25 + 76 =")


def test_an_answer_is_right_if_greedy_decoding_writes_it(
    tiny_moe: Path, tokenizer: Tokenizer
) -> None:
    prompt = "He said that"
    start, params = tokenizer.encode(prompt), SamplingParams(temperature=0, max_tokens=2)
    with edgemoe.load(tiny_moe, bits=8, dense_bits=8, context=64) as engine:
        greedy = list(engine.generate(start, params))
        rows = engine.logits([*start, *greedy]).astype(np.float64)[len(start) - 1 : -1]
    text = tokenizer.decode(greedy)
    assert tokenizer.encode(prompt + text) == [*start, *greedy]
    item = Item("t", prompt, text)
    (outcome,) = judge(tiny_moe, TRIAL, [item], tokenizer)
    likelihood = rows[[0, 1], greedy] - np.log(np.exp(rows).sum(axis=1))
    assert outcome == Outcome("t", True, pytest.approx(likelihood.sum(), abs=1e-5))
    (wrong,) = judge(tiny_moe, TRIAL, [replace(item, answer=text[0] + " zebra")], tokenizer)
    assert not wrong.is_right  # although it begins right


def test_without_items_there_is_nothing_to_judge(tiny_moe: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="items: expected at least 1, got none"):
        judge(tiny_moe, TRIAL, [], tokenizer)


def test_the_likeliest_choice_counts(tiny_moe: Path, tokenizer: Tokenizer) -> None:
    texts = (" ship", " old man", " and then the whale")
    with edgemoe.load(tiny_moe, bits=8, dense_bits=8, context=64) as engine:
        sums = []
        for text in texts:
            start, ids = (
                tokenizer.encode("The sea and the"),
                tokenizer.encode("The sea and the" + text),
            )
            rows = engine.logits(ids).astype(np.float64)[len(start) - 1 : -1]
            rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
            sums.append(rows[np.arange(len(rows)), ids[len(start) :]].sum())
    items = [Item("t", "The sea and the", text, texts) for text in texts]
    for step in (False, True):  # token by token is the same
        found = judge(tiny_moe, replace(TRIAL, decode=step), items, tokenizer)
        assert [o.is_right for o in found] == [s == max(sums) for s in sums]
        assert [o.logprob for o in found] == pytest.approx(sums, abs=1e-5)


def test_changes_are_of_pairs() -> None:
    def outcomes(rights: list[int], logprobs: list[float]) -> list[Outcome]:
        return [Outcome("t", bool(r), p) for r, p in zip(rights, logprobs, strict=True)]

    known = outcomes([1, 1, 0, 1], [-1.0, -2.0, -3.0, -4.0])
    (score,) = scores(outcomes([1, 0, 0, 0], [-1.5, -2.5, -3.5, -4.5]), known)
    assert (score.items, score.right, score.right_change) == (4, 0.25, -0.5)
    assert score.right_change_error == pytest.approx(np.std([0, -1, 0, -1]) / 2)
    assert score.logprob_change == -0.5
    assert score.logprob_change_error == 0  # all change equally: the spread of items is no error
    assert [s.task for s in scores([*known, Outcome("u", True, 0.0)], None)] == ["t", "u"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object"),
        ('{"answer": "x"}', "prompt: expected a text"),
        ('{"prompt": "x"}', "answer: expected a text, or choices"),
        ('{"prompt": "x", "choices": ["a", "a"], "answer": 0}', "at least two, all different"),
        ('{"prompt": "x", "choices": ["a", 1], "answer": 0}', "choices: expected a list of texts"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": 2}', "a number from 0 to 1, or one"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": true}', "a number from 0 to 1, or one"),
        ("", "expected items"),
    ],
)
def test_a_wrong_item_is_named_by_its_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    good = '{"prompt": "x", "choices": ["a", "b"], "answer": "b"}\n'
    path.write_text((good if line else "") + line)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_items(path)
    assert not line or str(error.value).startswith(f"{path}:2: ")
    path.write_text(good)
    assert read_items(path) == [Item("my", "x", "b", ("a", "b"))]


def test_the_command_counts_beside_the_reference(tiny_moe: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    flags = ["--tasks", "copying", "--items", "2", "--bits", "8", "2", "--json", out]
    assert main(["quality", *map(str, [tiny_moe, *flags])]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["8", "8", "copying", "2"],
        ["2", "2", "copying", "2"],
    ]
    assert "| reference | " in lines[0]
    same, low = json.loads(out.read_text())["rows"]
    assert same["right_change"] is None
    assert low["logprob"] == pytest.approx(same["logprob"] + low["logprob_change"])
    for wrong, said in (
        (["--store"], "--tasks: expected without --store"),
        (["--chunk", "64"], "--tasks: expected without --chunk"),
        (["--items", "0"], "--items: expected at least 1"),
        (["--reference", str(tmp_path)], "expected a level or a .moe file"),
    ):
        assert main(["quality", str(tiny_moe), "--tasks", "copying", *wrong]) == 1
        assert said in capsys.readouterr().err
