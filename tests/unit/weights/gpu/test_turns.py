"""Turns of the slots that load at the same time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from comfy_parallel.weights.gpu import turns
from tests.fakes import in_thread

pytestmark = pytest.mark.timeout(30)

LONG_S = 20


def wait_in_line(count: int) -> None:
    deadline = time.monotonic() + LONG_S
    while len(turns._waiting) != count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_waits_longest_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LONGEST_S", LONG_S)
    order: list[int] = []

    def take(number: int) -> None:
        with turns.turn():
            order.append(number)

    taken: list[Future[None]] = []
    with turns.turn():
        for number in range(5):
            taken.append(in_thread(take, number))
            wait_in_line(number + 1)
        assert order == []
    for one in taken:
        one.result(LONG_S)
    assert order == [0, 1, 2, 3, 4]


def test_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LONGEST_S", LONG_S)
    inside, most = [0], [0]

    def take_often() -> None:
        for _ in range(200):
            with turns.turn():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    for one in [in_thread(take_often) for _ in range(4)]:
        one.result(LONG_S)
    assert most == [1]
    assert not turns._is_taken


def test_nobody_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LONGEST_S", 0.01)
    was_in, may_end = threading.Event(), threading.Event()

    def take() -> None:
        with turns.turn():
            was_in.set()
            may_end.wait(LONG_S)

    with turns.turn():
        taken = in_thread(take)
        assert was_in.wait(LONG_S)
        assert not turns._waiting
    with turns.turn():
        assert turns._is_taken, "it is not theirs to give back"
        may_end.set()
        taken.result(LONG_S)
        assert turns._is_taken
    assert not turns._is_taken


def test_after_an_error_the_next_is_let_in() -> None:
    with pytest.raises(RuntimeError, match="not now"), turns.turn():
        raise RuntimeError("not now")
    assert not turns._is_taken
