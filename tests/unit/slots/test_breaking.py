"""A slot that fails its jobs in a row is suspended, and tried again after a pause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from comfy_parallel.core.breaker import Limits
from comfy_parallel.core.states import SlotState
from comfy_parallel.errors import DeviceError
from comfy_parallel.slots.breaking import Breaking
from tests.fakes import failed, host_item, make_front, run_next, succeeded, take

ERROR = ("execution_error", {"exception_type": "RuntimeError"})


class Bench:
    """Three slots, a clock that is moved by hand, and a device that may be broken."""

    def __init__(self) -> None:
        self.front: Any = make_front("cpu", "cpu", "cpu")
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.is_lost = False
        limits = Limits(in_a_row=3, first_pause_s=10, longest_pause_s=40)
        breaking = Breaking(self.front.slot_queues, limits, self.check, lambda s, act: self.timers.append((s, act)))
        for queue in self.front.slot_queues:
            queue.when_ended = breaking.job_ended
            assert take(queue) is None

    def check(self, device: str) -> None:
        if self.is_lost:
            raise DeviceError("cpu cannot be initialised")

    def run(self, slot: int, *, ok: bool) -> None:
        queue = self.front.slot_queues[slot]
        self.front.put(host_item("a"))
        run_next(queue, succeeded() if ok else failed(ERROR))
        assert take(queue) is None

    def states(self) -> list[SlotState]:
        return [queue.slot.state for queue in self.front.slot_queues]

    def fire(self) -> float:
        seconds, act = self.timers.pop(0)
        act()
        return seconds


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    for _ in range(3):
        assert SlotState.SUSPENDED not in made.states()
        made.run(0, ok=False)
    assert made.states()[0] is SlotState.SUSPENDED
    return made


def test_what_waits_for_any_slot_goes_to_the_others_and_what_is_bound_to_it_waits(bench: Bench) -> None:
    bench.front.slot_queues[0].put(host_item("bound"))
    bench.front.put(host_item("any"))
    assert take(bench.front.slot_queues[0]) is None
    run_next(bench.front.slot_queues[1], succeeded())
    assert [item[1] for item in bench.front.snapshot().pending[0]] == ["bound"]
    assert bench.fire() == 10
    run_next(bench.front.slot_queues[0], succeeded())
    assert bench.front.snapshot().pending[0] == []
    assert bench.front.slot_queues[0].slot.why_suspended is None


def test_a_device_that_does_not_work_is_not_tried_with_a_job(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.is_lost = True
    assert [bench.fire() for _ in range(4)] == [10, 20, 40, 40]
    assert bench.states()[0] is SlotState.SUSPENDED
    assert "cpu cannot be initialised" in (bench.front.slot_queues[0].slot.why_suspended or "")
    bench.is_lost = False
    bench.fire()
    assert bench.states()[0] is not SlotState.SUSPENDED
    assert "stays suspended" in caplog.text


def test_another_failure_suspends_it_at_once_for_longer(bench: Bench) -> None:
    bench.fire()
    bench.run(0, ok=False)
    assert (bench.states()[0], bench.fire()) == (SlotState.SUSPENDED, 20)


def test_jobs_that_fail_on_the_others_too_resume_it(bench: Bench) -> None:
    bench.run(1, ok=False)
    assert bench.states()[0] is SlotState.SUSPENDED
    bench.run(2, ok=False)
    assert SlotState.SUSPENDED not in bench.states()
    bench.fire()
    assert SlotState.SUSPENDED not in bench.states()


def test_the_pause_of_an_earlier_suspension_does_not_end_a_later_one(bench: Bench) -> None:
    bench.run(1, ok=False)
    bench.run(2, ok=False)
    assert SlotState.SUSPENDED not in bench.states()
    bench.run(0, ok=True)
    for _ in range(3):
        bench.run(0, ok=False)
    assert bench.states()[0] is SlotState.SUSPENDED
    bench.fire()
    assert bench.states()[0] is SlotState.SUSPENDED
    bench.fire()
    assert bench.states()[0] is not SlotState.SUSPENDED


def test_a_pause_of_the_operators_is_not_ended(bench: Bench) -> None:
    bench.front.closing.pause([0])
    bench.fire()
    assert bench.states()[0] is SlotState.PAUSED
    bench.front.closing.resume([0])
    assert bench.states()[0] not in (SlotState.PAUSED, SlotState.SUSPENDED)


def test_jobs_of_one_client_that_are_bound_to_it_suspend_no_slot(bench: Bench) -> None:
    queue = bench.front.slot_queues[1]
    for _ in range(9):
        queue.put(host_item("a"))
        run_next(queue, failed(ERROR))
        assert take(queue) is None
    assert bench.states()[1] is not SlotState.SUSPENDED


def test_an_interrupted_job_says_nothing(bench: Bench) -> None:
    queue = bench.front.slot_queues[1]
    for _ in range(5):
        queue.put(host_item("a"))
        run_next(queue, failed(("execution_interrupted", {})))
        assert take(queue) is None
    assert bench.states()[1] is not SlotState.SUSPENDED
