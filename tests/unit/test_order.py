"""The order in which test files start."""

from __future__ import annotations

from tests import order


def test_every_file_that_has_a_time_exists() -> None:
    assert [name for name in order.SECONDS if not (order.TESTS_DIR / name).is_file()] == []


def test_the_longest_file_is_first_and_the_others_keep_their_order() -> None:
    longest = max(order.SECONDS, key=lambda name: order.SECONDS[name])
    names = ["unit/test_a.py", "unit/test_b.py", longest]
    names.sort(key=lambda name: -order.seconds(order.TESTS_DIR / name))
    assert names == [longest, "unit/test_a.py", "unit/test_b.py"]
