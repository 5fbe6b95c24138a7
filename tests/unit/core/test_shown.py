"""What clients sent is shown in few characters."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.shown import clipped, shown


@pytest.mark.parametrize("value", ["a", "ü" * 50, b"\xff", 7, None, [1, "x"], {"a": 1}])
def test_what_is_short_is_shown_as_it_is(value: Any) -> None:
    assert shown(value) == repr(value)


@pytest.mark.parametrize("value", ["a" * 10_000_000, "\0" * 10_000_000, b"x" * 10_000_000, ["a" * 10_000] * 100])
def test_what_is_long_is_cut(value: Any) -> None:
    text = shown(value)
    assert len(text) < 300
    assert "..." in text


def test_a_text_says_how_much_of_it_was_left_out() -> None:
    assert clipped("x" * 10, 10) == "x" * 10
    assert clipped("x" * 12, 10) == "x" * 10 + "... (2 more characters)"
