"""Error messages are bounded in length, whatever a file puts into them."""

from __future__ import annotations

import pytest

from edgemoe.errors import FormatError, quoted, shortened, size_text


@pytest.mark.parametrize("value", ["cat", 7, 2.5, None, True, [1, 2], {"a": [1]}, (), b"x"])
def test_short_values_are_quoted_as_they_are(value: object) -> None:
    assert quoted(value) == repr(value)


def test_long_and_deep_values_are_cut() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    wide = [[["x" * 1000] * 1000] * 1000] * 1000
    for value in ("y" * 300_000, list(range(300_000)), 10**4000, deep, wide, {"k" * 9000: wide}):
        assert len(quoted(value)) <= 120
    assert quoted("a" * 50 + "b" * 1000).startswith("'aaaa")


def test_a_shortened_text_keeps_both_ends() -> None:
    assert shortened("abc", 3) == "abc"
    cut = shortened("begin" + "-" * 1000 + "end", 40)
    assert len(cut) == 40
    assert cut.startswith("begin")
    assert cut.endswith("end")
    assert "..." in cut


def test_a_format_error_is_bounded() -> None:
    text = str(FormatError(f"model.moe: ladder {'1, ' * 100_000} does not climb"))
    assert len(text) == 2000
    assert text.startswith("model.moe")
    assert text.endswith("does not climb")


def test_a_size_has_three_digits_and_its_unit() -> None:
    sizes = {
        0: "0 B",
        1023: "1023 B",
        1024: "1 KiB",
        1500: "1.46 KiB",
        200 << 20: "200 MiB",
        1015 << 20: "1015 MiB",
    }
    for size, text in {
        **sizes,
        3 << 29: "1.5 GiB",
        57 << 30: "57 GiB",
        5000 << 30: "5000 GiB",
    }.items():
        assert size_text(size) == text
