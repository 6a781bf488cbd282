"""Shared fixtures."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
# Tests use some of the benchmarks' modules. Last in the path, as some of them have the names of standard modules.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import hypothesis
import pytest

from edgemoe import _core, hardware

hypothesis.settings.register_profile("same", derandomize=True)  # the same cases every time
hypothesis.settings.load_profile("same")
# A process started in the background ignores Ctrl-C, and so would the programs that it starts and that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=_core.usable_isas().split())
def isa(request):
    """Each instruction set of this processor in turn; its name."""
    before = _core.isa()
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(before)


@pytest.fixture
def isas():
    """The names of all instruction sets of this processor. The one in use is restored afterwards."""
    before = _core.isa()
    yield _core.usable_isas().split()
    _core.use_isa(before)


@pytest.fixture
def small_process(monkeypatch) -> None:
    """Budgets count a process as small as a program's own; that of the tests grows with what others load."""
    monkeypatch.setattr(hardware, "process_bytes", lambda: 50 << 20)


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real model with tokenizer and ChatML template: 2 layers of 8 experts, 512 tokens of context."""
    from tiny import tiny_checkpoint

    from edgemoe.convert.convert import convert

    path = tmp_path_factory.mktemp("tiny") / "tiny.moe"
    convert(tiny_checkpoint(), path)
    return path
