"""The queue's lock is an RLock that a job cannot keep for ever."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest

from comfy_parallel.slots.queue_mutex import QueueMutex
from comfy_parallel.slots.slot import Run, Slot, entered

LIMIT_S = 0.2


@pytest.fixture
def mutex() -> QueueMutex:
    return QueueMutex(LIMIT_S)


@pytest.fixture
def slot() -> Slot:
    made = Slot(1, "cpu")
    made.run = Run("stuck")
    return made


class InThread:
    """Holds the lock as `take` does until it is told to go on, then does `after`; notes what that raised."""

    def __init__(self, take: Callable[[], object], after: Callable[[], object] = lambda: None) -> None:
        self._take, self._after = take, after
        self._holds, self._goes_on = threading.Event(), threading.Event()
        self.error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._holds.wait(60)

    def _run(self) -> None:
        self._take()
        self._holds.set()
        self._goes_on.wait(60)
        try:
            self._after()
        except RuntimeError as error:
            self.error = error

    def go_on(self) -> None:
        self._goes_on.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


def job_takes(mutex: QueueMutex, slot: Slot, times: int = 1) -> Callable[[], None]:
    def take() -> None:
        with entered(slot):
            for _ in range(times):
                mutex.public.acquire()

    return take


def test_a_job_that_keeps_it_loses_it(mutex: QueueMutex, slot: Slot, caplog: pytest.LogCaptureFixture) -> None:
    def give_back_both() -> None:
        mutex.public.release()
        with mutex.public:  # It may use the lock again.
            pass
        mutex.public.release()

    holder = InThread(job_takes(mutex, slot, 2), give_back_both)
    assert mutex.acquire(timeout=60)
    assert "slot 1 (cpu): job stuck has not given back the queue's lock" in caplog.text
    assert "test_queue_mutex.py" in caplog.text, "where it is"
    assert slot.run is not None
    assert slot.run.trouble is not None
    mutex.release()
    holder.go_on()
    assert holder.error is None, "what it gives back later has no effect"
    with mutex:
        pass


@pytest.mark.parametrize("of", ["our code", "the server", "our code in a job's call"])
def test_nobody_else_loses_it(mutex: QueueMutex, slot: Slot, of: str, caplog: pytest.LogCaptureFixture) -> None:
    def give_back() -> None:
        if of != "the server":
            mutex.release()
        if of != "our code":
            mutex.public.release()

    def take() -> None:
        if of == "our code":
            mutex.acquire()
        elif of == "the server":
            mutex.public.acquire()
        else:
            job_takes(mutex, slot)()
            mutex.acquire()

    holder = InThread(take, give_back)
    began = time.monotonic()
    assert not mutex.acquire(timeout=3 * LIMIT_S)
    assert time.monotonic() - began >= 3 * LIMIT_S
    assert not mutex.acquire(False)
    holder.go_on()
    assert mutex.acquire(timeout=60)
    assert not caplog.records


def test_one_of_many_takes_it_over_and_the_others_follow(mutex: QueueMutex, slot: Slot) -> None:
    holder = InThread(job_takes(mutex, slot))
    inside, most = 0, []

    def use() -> None:
        nonlocal inside
        with mutex:
            inside += 1
            most.append(inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8
    holder.go_on()


def test_what_a_job_left_is_dropped_at_its_end(mutex: QueueMutex, slot: Slot, caplog: pytest.LogCaptureFixture) -> None:
    holder = InThread(job_takes(mutex, slot, 3), mutex.drop_left)
    holder.go_on()
    assert mutex.acquire(timeout=LIMIT_S / 2)
    assert not mutex.drop_left(), "our own code needs it"
    mutex.release()
    assert not mutex.drop_left()
    assert not caplog.records


def test_it_is_an_rlock(mutex: QueueMutex) -> None:
    with pytest.raises(RuntimeError):
        mutex.release()
    with mutex, mutex.public:
        assert mutex.acquire(False)
        mutex.release()
        condition = threading.Condition(mutex)  # type: ignore[arg-type]
        other = threading.Thread(target=lambda: notify(condition))
        other.start()
        assert condition.wait(60), "all holds are let go of while it waits"
    other.join(60)
    assert InThread(mutex.acquire, mutex.release).go_on() is None
    with pytest.raises(RuntimeError):
        threading.Condition(mutex).notify()  # type: ignore[arg-type]


def notify(condition: threading.Condition) -> None:
    with condition:
        condition.notify()


def test_a_hold_that_comes_and_goes_is_not_taken_over(
    mutex: QueueMutex, slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    ends = threading.Event()

    def work() -> None:
        with entered(slot):
            while not ends.is_set():
                with mutex.public:
                    time.sleep(LIMIT_S / 20)
                time.sleep(LIMIT_S / 40)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    with caplog.at_level(logging.ERROR):
        for thread in threads:
            thread.start()
        time.sleep(4 * LIMIT_S)
        assert mutex.acquire(timeout=60)
        mutex.release()
    ends.set()
    assert not caplog.records
