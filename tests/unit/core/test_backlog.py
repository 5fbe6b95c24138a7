"""Order, what is dropped first, and when it is too much."""

from __future__ import annotations

import random

from comfy_parallel.core.backlog import Backlog, Limits, Waiting


def text(number: int, size: int = 1) -> Waiting:
    return Waiting(number, size, may_go=False)


def preview(number: int, size: int = 1) -> Waiting:
    return Waiting(number, size, may_go=True)


def drained(backlog: Backlog) -> list[int]:
    return [backlog.take() for _ in range(len(backlog))]


def test_what_fits_comes_in_order() -> None:
    backlog = Backlog(Limits(messages=4))
    for one in (text(0), preview(1), text(2), preview(3)):
        backlog.put(one)
    assert not backlog.is_over
    assert (drained(backlog), backlog.num_dropped, backlog.size_bytes) == ([0, 1, 2, 3], 0, 0)


def test_the_oldest_previews_go_first() -> None:
    backlog = Backlog(Limits(messages=6))
    for one in (preview(0), text(1), preview(2), text(3), preview(4), text(5), preview(6)):
        backlog.put(one)
    assert not backlog.is_over
    assert (drained(backlog), backlog.num_dropped) == ([1, 3, 4, 5, 6], 2)


def test_previews_alone_never_are_too_many() -> None:
    backlog = Backlog(Limits(messages=10, size_bytes=1000))
    for number in range(500):
        backlog.put(preview(number, size=300))
        assert not backlog.is_over
    assert backlog.num_dropped + len(backlog) == 500
    assert drained(backlog)[-1] == 499


def test_too_many_or_too_long_texts_are_over() -> None:
    many, long = Backlog(Limits(messages=3)), Backlog(Limits(size_bytes=10))
    for number in range(4):
        many.put(text(number))
        assert many.is_over == (number == 3)
    for number in range(2):
        long.put(text(number, size=11))
        assert long.is_over == (number == 1)
    long.clear()
    assert (len(long), long.size_bytes, long.is_over) == (0, 0, False)


def test_one_message_that_is_larger_than_all_that_may_wait_is_sent() -> None:
    backlog = Backlog(Limits(size_bytes=10))
    for one in (text(0, size=1000), text(1), preview(2), text(3)):
        backlog.put(one)
        assert not backlog.is_over
    assert drained(backlog) == [0, 1, 2, 3]
    backlog.put(preview(4, size=1000))
    assert (drained(backlog), backlog.num_dropped) == ([4], 0)


def test_whatever_comes_the_sums_are_right_and_texts_keep_their_order() -> None:
    chance = random.Random(7)
    for _ in range(50):
        backlog, texts, taken = Backlog(Limits(messages=20, size_bytes=500)), [], []
        for number in range(200):
            if chance.random() < 0.45 and len(backlog):
                taken.append(backlog.take())
                continue
            one = Waiting(number, chance.randrange(60), may_go=chance.random() < 0.7)
            backlog.put(one)
            if not one.may_go:
                texts.append(number)
            if backlog.is_over:
                break
        taken += drained(backlog)
        assert (backlog.size_bytes, len(backlog)) == (0, 0)
        assert taken == sorted(taken)
        assert set(texts) <= set(taken)
