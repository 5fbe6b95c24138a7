"""A signal that ends the process puts back what runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from comfy_parallel.slots.stopping_at_once import StoppingAtOnce
from tests.fakes import make_front


class Ledger:
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def front() -> Any:
    made = make_front("cpu")
    made._dispatcher.ledger = Ledger()
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_ledger_is_closed_before_the_process_ends(front: Any, number: signal.Signals) -> None:
    ended: list[tuple[int, bool]] = []
    told = threading.Event()

    def end(by: int) -> None:
        ended.append((by, front.ledger.is_closed))
        told.set()

    before = signal.signal(number, signal.SIG_DFL)  # A process that `nohup` started ignores SIGHUP.
    take_back = StoppingAtOnce(front, end).listen()
    try:
        os.kill(os.getpid(), number)
        assert told.wait(60)
        assert signal.getsignal(number) is signal.SIG_DFL, "a second one ends it at once"
    finally:
        take_back()
        signal.signal(number, before)
    assert ended == [(number, True)]
    assert not front.mutex.acquire(timeout=0.1), "no job begins or ends any more"


def test_what_somebody_else_handles_stays_theirs(front: Any) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        take_back = StoppingAtOnce(front, lambda number: pytest.fail("it ends nothing")).listen()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        take_back()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert not front.ledger.is_closed
