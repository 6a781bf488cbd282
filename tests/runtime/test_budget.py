"""Sizes of memory as they are written."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.runtime.budget import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30), ("512MB", 512 << 20), ("1.5G", 3 << 29), (" 7 kib ", 7 << 10), ("12", 12),
        ("3B", 3), ("2TiB", 2 << 40), (".5K", 512), (4096, 4096), (np.int32(7), 7),
    ],
)  # fmt: skip
def test_a_size_is_read(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["１GiB", "12QiB", "", "GiB", "-1", "0", "1e400", "inf", "nan", "1_000", "4GiBB", "1 000", "4K\u212a",
     "\u212a", "1\u212aiB", 1.5, True, None, -3, 0, "9" * 400 + "TiB"],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_words(text) -> None:
    with pytest.raises(ValueError, match=r"^size: expected [^\n]*got "):
        parse_size(text)
