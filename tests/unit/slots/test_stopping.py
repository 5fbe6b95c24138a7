"""SIGTERM drains the server."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.slots import stopping
from comfy_parallel.slots.stopping import Stopping
from tests.fakes import host_item, make_front, succeeded, take

LONG_S = 120.0  # longer than what does not wait takes on a busy machine


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_LAST_EVENTS_S", 0.05)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture
def front() -> Any:
    """Slot 0 of two runs a job; two more wait."""
    made = make_front("cpu", "cpu")
    made.slot_queues[0].put(host_item("runs", 3))
    assert take(made.slot_queues[0]) == "runs"
    made.slot_queues[0].put(host_item("bound", 5))
    made.put(host_item("auto", 4))
    return made


def run_until_ended(loop: asyncio.AbstractEventLoop, front: Any, drain_s: float, *, signals: int = 1) -> float:
    """The seconds from the first SIGTERM until the loop ends as with Ctrl+C."""
    take_back = Stopping(front, drain_s, loop).listen()
    started = time.monotonic()
    for number in range(signals):
        loop.call_later(0.1 * number, os.kill, os.getpid(), signal.SIGTERM)
    loop.call_later(240, loop.stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
    finally:
        take_back()
    return time.monotonic() - started


def end(front: Any) -> None:
    queue = front.slot_queues[0]
    queue.task_done(next(iter(queue.currently_running)), {"outputs": {}}, status=succeeded())


def test_the_running_job_ends_and_each_that_waits_is_told(
    loop: asyncio.AbstractEventLoop, front: Any, caplog: pytest.LogCaptureFixture
) -> None:
    threading.Timer(0.5, end, [front]).start()
    assert run_until_ended(loop, front, LONG_S) < LONG_S
    assert list(front.get_history()) == ["runs"]
    assert "2 jobs are lost, because the queue is kept in memory only" in caplog.text
    assert "lost, it waits: job number 5, prompt_id 'bound'" in caplog.text
    assert "lost, it waits: job number 4, prompt_id 'auto'" in caplog.text
    assert "still runs" not in caplog.text


def test_a_job_that_takes_too_long_is_told(
    loop: asyncio.AbstractEventLoop, front: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_until_ended(loop, front, 0.3) < LONG_S
    assert "lost, it still runs: job number 3, prompt_id 'runs'" in caplog.text


def test_a_second_signal_ends_it_at_once(loop: asyncio.AbstractEventLoop, front: Any) -> None:
    assert run_until_ended(loop, front, LONG_S, signals=2) < LONG_S


def test_nothing_that_runs_is_nothing_to_wait_for(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_until_ended(loop, make_front("cpu"), LONG_S) < LONG_S
    assert "lost" not in caplog.text


def test_a_packs_own_handler_is_called_at_the_end(loop: asyncio.AbstractEventLoop) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        run_until_ended(loop, make_front("cpu"), LONG_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [signal.SIGTERM]


def test_outside_the_main_thread_it_says_that_it_has_no_effect(
    loop: asyncio.AbstractEventLoop, front: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=Stopping(front, 1, loop).listen)
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert "COMFY_PARALLEL_DRAIN_S has no effect" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
