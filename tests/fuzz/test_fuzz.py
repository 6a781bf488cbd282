"""A short run of every fuzzer: its valid cases, those that once caused a finding, and some others, always the same."""

from __future__ import annotations

import dataclasses
from itertools import islice

import pytest

from fuzz.harness import cases, corpus, try_case
from fuzz.targets import TARGETS

_OTHERS = 40


@pytest.mark.parametrize("name", TARGETS)
def test_sound_cases_are_read(name, tmp_path):
    strict = dataclasses.replace(TARGETS[name], documented=(), seconds=60)
    if name == "template":  # most of its pieces are refused
        strict = TARGETS[name]
    for case in TARGETS[name].seeds():
        assert try_case(strict, case, tmp_path / "case") is None


@pytest.mark.parametrize("name", TARGETS)
def test_no_case_ends_in_another_way_than_is_documented(name, tmp_path):
    target = dataclasses.replace(TARGETS[name], seconds=60)
    known = len(target.seeds()) + len(corpus(target))
    for number, case in enumerate(islice(cases(target, 0), known + _OTHERS)):
        finding = try_case(target, case, tmp_path / "case")
        assert finding is None, f"case {number}: {finding}"
