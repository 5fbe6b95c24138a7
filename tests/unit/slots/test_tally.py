"""The line in the log about a slot's jobs: when it comes, what it says, and that nobody waits for it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.slots import tally
from tests.fakes import host_item, in_thread, make_slots, run_next

LINE = re.compile(
    r"📊 \[GPU (\d+)\] tasks=(\d+), success=([\d.]+)%, queue=(\d+), wait=(\d+)ms, exec=(-?\d+)ms, oom=(\d+), "
    r"interrupted=(\d+)"
)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """The numbers of every line so far."""
    with caplog.at_level(logging.INFO, tally.__name__):
        yield lambda: [found.groups() for record in caplog.records if (found := LINE.fullmatch(record.getMessage()))]


class Clock:
    """The real one, and what a test adds to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added, real = 0.0, time.monotonic
        monkeypatch.setattr("time.monotonic", lambda: real() + self.added)


def run(queue: Any, count: int, status: Any = None) -> None:
    for number in range(count):
        queue.put(host_item(f"job {number}"))
        run_next(queue, status)


def test_it_comes_after_every_tenth_job(front: Any, lines: Any) -> None:
    queue = front.slot_queues[1]
    run(queue, 9)
    assert lines() == []
    run(queue, 1)
    assert [numbers[:3] for numbers in lines()] == [("1", "10", "100.0")]
    run(queue, 25)
    assert [numbers[1] for numbers in lines()] == ["10", "20", "30"]


def test_it_comes_with_the_first_job_that_ends_a_minute_after_the_last(
    front: Any, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, queue = Clock(monkeypatch), front.slot_queues[0]
    run(queue, 9)
    clock.added += 60
    run(queue, 1)
    run(queue, 1)
    assert [numbers[1] for numbers in lines()] == ["10"]
    clock.added += 60
    run(queue, 1)
    assert [numbers[1] for numbers in lines()] == ["10", "12"]
    run(queue, 9)
    assert len(lines()) == 2


def test_it_tells_outcomes_since_the_start_and_times_since_the_last_line(lines: Any) -> None:
    (slot,) = make_slots("cpu")
    told, stats = tally.Tally(slot), slot.stats
    stats.succeeded, stats.failed, stats.interrupted, stats.out_of_memory = 8, 1, 1, 1
    stats.waits.sum_s, stats.runs.sum_s = 0.25, 15.0
    told.job_ended(lambda: 3)
    stats.succeeded, stats.waits.sum_s, stats.runs.sum_s = 18, 2.25, 16.0
    told.job_ended(lambda: 0)
    assert lines() == [
        ("0", "10", "80.0", "3", "25", "1500", "1", "1"),
        ("0", "20", "90.0", "0", "200", "100", "1", "1"),
    ]


def test_it_counts_what_waits_for_this_slot_or_for_any(front: Any, lines: Any) -> None:
    queue, other = front.slot_queues
    run(queue, 9)
    for name in ("runs", "one", "two"):
        queue.put(host_item(name))
    other.put(host_item("bound to the other"))
    front.put(host_item("open"))
    run_next(queue)
    assert [numbers[3] for numbers in lines()] == ["3"]


def test_nobody_waits_for_the_log(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log on a slow disk or a full pipe must not keep other slots from their jobs."""
    seen: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(in_thread(front.get_tasks_remaining).result(timeout=60) and "blocked" or "free")

    handler = Handler()
    monkeypatch.setattr(tally.logger, "handlers", [handler])
    monkeypatch.setattr(tally.logger, "level", logging.INFO)
    run(front.slot_queues[0], 10)
    assert seen == ["free"]


def test_a_worker_that_dies_over_its_jobs_is_counted_too(front: Any, lines: Any) -> None:
    queue = front.slot_queues[0]
    for number in range(10):
        queue.put(host_item(f"job {number}"))
        assert queue.get(timeout=0) is not None
        queue.fail_running(SystemExit(1))
    assert [numbers[1:3] for numbers in lines()] == [("10", "0.0")]
