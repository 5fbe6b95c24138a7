"""Threads and pool tasks that a job starts belong to its slot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from comfy_parallel.isolation.threads import start_in_slot, submit_in_slot
from comfy_parallel.slots import device
from comfy_parallel.slots.slot import Slot, current_slot, entered
from tests.fakes import make_slots

pytestmark = pytest.mark.timeout(120)

_device = threading.local()


class SlotThread(threading.Thread):
    start = start_in_slot(threading.Thread.start)


class SlotTimer(threading.Timer):
    start = start_in_slot(threading.Thread.start)


class SlotPool(ThreadPoolExecutor):
    submit = submit_in_slot(ThreadPoolExecutor.submit)


@contextmanager
def fake_current(name: str) -> Iterator[None]:
    """As `device.current`: the thread's current device for the duration of the body."""
    before = getattr(_device, "name", None)
    _device.name = name
    yield
    _device.name = before


@pytest.fixture(autouse=True)
def fake_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", fake_current)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


def here() -> tuple[Slot | None, Any]:
    return current_slot(), getattr(_device, "name", None)


def in_new_thread(**options: Any) -> Any:
    """What a new thread sees."""
    seen: list[Any] = []
    thread = SlotThread(target=lambda: seen.append(here()), **options)
    thread.start()
    thread.join(60)
    return seen[0]


def test_a_thread_belongs_to_the_slot_that_starts_it(slots: tuple[Slot, ...]) -> None:
    for slot in slots:
        with entered(slot):
            assert in_new_thread() == (slot, slot.device)


def test_outside_of_slots_a_thread_belongs_to_none() -> None:
    assert in_new_thread() == (None, None)


def test_the_thread_that_starts_counts_not_the_one_that_makes(slots: tuple[Slot, ...]) -> None:
    seen: list[Any] = []
    with entered(slots[0]):
        thread = SlotThread(target=lambda: seen.append(here()))
    with entered(slots[1]):
        thread.start()
    thread.join(60)
    assert seen == [(slots[1], "cuda:1")]


def test_a_thread_of_a_thread_belongs_to_the_same_slot(slots: tuple[Slot, ...]) -> None:
    seen: list[Any] = []
    with entered(slots[1]):
        thread = SlotThread(target=lambda: seen.append(in_new_thread()))
        thread.start()
    thread.join(60)
    assert seen == [(slots[1], "cuda:1")]


def test_a_subclass_with_its_own_run(slots: tuple[Slot, ...]) -> None:
    class Own(SlotThread):
        seen: Any = None

        def run(self) -> None:
            self.seen = here()

    with entered(slots[1]):
        thread = Own()
        thread.start()
    thread.join(60)
    assert thread.seen == (slots[1], "cuda:1")


def test_arguments_names_and_timers(slots: tuple[Slot, ...]) -> None:
    seen: list[Any] = []
    with entered(slots[1]):
        thread = SlotThread(target=lambda *args, **kwargs: seen.append((args, kwargs)), args=(1,), kwargs={"b": 2})
        timer = SlotTimer(0, lambda: seen.append(here()))
        thread.start()
        thread.join(60)
        timer.start()
    timer.join(60)
    assert seen == [((1,), {"b": 2}), (slots[1], "cuda:1")]


def test_a_thread_can_still_be_started_only_once(slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        thread = SlotThread(target=here)
        thread.start()
        thread.join(60)
        with pytest.raises(RuntimeError, match="once"):
            thread.start()


def test_a_pool_task_belongs_to_the_slot_that_submits_it(slots: tuple[Slot, ...]) -> None:
    with SlotPool(1) as pool:
        for slot in (slots[0], slots[1], slots[0]):
            with entered(slot):
                assert pool.submit(here).result(5) == (slot, slot.device)
        assert pool.submit(here).result(5) == (None, None)


def test_a_pool_first_used_in_a_slot_is_not_of_that_slot_ever_after(slots: tuple[Slot, ...]) -> None:
    class Pool(SlotPool):
        pass

    started = threading.Thread.start
    threading.Thread.start = start_in_slot(started)  # type: ignore[method-assign]
    try:
        with entered(slots[0]):
            pool = Pool(1)
            assert pool.submit(here).result(5) == (slots[0], "cuda:0")
        assert pool.submit(here).result(5) == (None, None)
    finally:
        threading.Thread.start = started  # type: ignore[method-assign]
    pool.shutdown()


def test_pool_tasks_get_arguments_and_give_results_and_errors(slots: tuple[Slot, ...]) -> None:
    with SlotPool(2) as pool, entered(slots[0]):
        assert pool.submit(divmod, 7, 2).result(5) == (3, 1)
        assert pool.submit(dict, fn=1, self=2).result(5) == {"fn": 1, "self": 2}
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(5)


def test_a_slot_without_a_numbered_device_needs_no_current_device(
    slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (cpu,) = make_slots("cpu")
    with entered(cpu):
        assert in_new_thread() == (cpu, None)
