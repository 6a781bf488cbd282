"""A server of the tiny model, for all tests."""

from __future__ import annotations

import pytest
from served import running


@pytest.fixture(scope="session")
def server(tiny_moe):
    """A server of the tiny model, for all tests."""
    with running(tiny_moe) as found:
        yield found
