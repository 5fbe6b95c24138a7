"""Slots, and variables that every slot has its own of."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from comfy_parallel.core.shares import Share
from comfy_parallel.core.states import SlotEvent
from comfy_parallel.slots.slot import RECENT, Run, Slot, SlotLocal, current_slot, entered, set_slots, slots
from tests.fakes import in_thread, make_slots


def test_a_slot_is_entered_and_left() -> None:
    first, second = make_slots("cuda:0", "cuda:1")
    with entered(first):
        with entered(second):
            assert current_slot() is second
        with entered(None):
            assert current_slot() is None
        assert current_slot() is first
    assert current_slot() is None


def test_a_slot_is_left_by_an_error_too() -> None:
    (slot,) = make_slots("cpu")
    with pytest.raises(KeyError), entered(slot):
        raise KeyError
    assert current_slot() is None


def test_coroutines_and_to_thread_stay_in_the_slot_and_plain_threads_do_not() -> None:
    (slot,) = make_slots("cpu")

    async def look() -> list[Slot | None]:
        in_task = asyncio.create_task(asyncio.sleep(0, current_slot()))
        return [current_slot(), await in_task, await asyncio.to_thread(current_slot)]

    with entered(slot):
        assert asyncio.run(look()) == [slot, slot, slot]
        assert in_thread(current_slot).result(5) is None


def test_states() -> None:
    (slot,) = make_slots("cuda:3")
    assert slot.state == "starting"
    slot.change(SlotEvent.READY)
    assert slot.state == "idle"
    slot.change(SlotEvent.TAKE)
    assert slot.state == "running"
    assert (slot.name, repr(slot)) == ("slot 0 (cuda:3)", "<Slot 0 cuda:3 running>")


def test_the_slots_of_the_process() -> None:
    assert slots() == ()
    made = make_slots("cpu", "cpu")
    assert slots() is made
    set_slots(())
    assert slots() == ()


def test_a_variable_has_one_value_per_slot_and_one_outside() -> None:
    first, second = make_slots("cuda:0", "cuda:1")
    variable: SlotLocal[list[int]] = SlotLocal(list)
    variable.get().append(0)
    with entered(first):
        variable.get().append(1)
    with entered(second):
        variable.set([2])
    assert [variable.of(slot) for slot in (None, first, second)] == [[0], [1], [2]]
    assert variable.get() == [0]


def test_values_are_made_on_first_use_and_once() -> None:
    (slot,) = make_slots("cpu")
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    variable = SlotLocal(make)
    assert made == []
    with entered(slot):
        assert variable.get() is variable.get() is variable.of(slot)
    assert len(made) == 1


def test_variables_are_independent() -> None:
    one, other = SlotLocal(int), SlotLocal(int)
    one.set(5)
    assert (one.get(), other.get()) == (5, 0)


def test_threads_of_one_slot_that_make_a_value_at_once_get_the_same() -> None:
    (slot,) = make_slots("cpu")
    both_make = threading.Barrier(2)

    def make() -> object:
        both_make.wait(60)
        return object()

    variable = SlotLocal(make)
    values = [future.result(5) for future in [in_thread(variable.of, slot) for _ in range(2)]]
    assert values[0] is values[1]


def test_none_is_a_value() -> None:
    variable: SlotLocal[int | None] = SlotLocal(lambda: 5)
    variable.set(None)
    assert variable.get() is None


def test_a_slot_remembers_its_last_jobs_and_counts_them_by_time() -> None:
    (slot,) = make_slots("cpu")
    for number in range(RECENT + 2):
        slot.begin_run(Run(f"job {number}"), waited_s=2.0)
        failed: dict[str, Any] = {"status_str": "error"}
        slot.end_run(failed if number == RECENT + 1 else None)
    assert len(slot.stats.last) == RECENT
    last = slot.stats.last[-1]
    assert (last.prompt_id, last.outcome, last.waited_s) == (f"job {RECENT + 1}", "failed", 2.0)
    assert slot.stats.last[-2].outcome == "succeeded"
    assert sum(point[1] for point in slot.stats.series.points(last.ended_at)) == RECENT + 2


def test_shares_of_other_slots_jobs_are_no_jobs() -> None:
    (slot,) = make_slots("cpu")
    slot.begin_run(Run("child", share=Share("job", 1, 2)), waited_s=2.0)
    slot.end_run({"status_str": "error"})
    stats = slot.stats
    assert (stats.shares, stats.succeeded, stats.failed, len(stats.last)) == (1, 0, 0, 0)
    assert (stats.wait_seconds, stats.runs.sum_s) == (0.0, 0.0)
    assert stats.busy_seconds == stats.share_seconds > 0
    assert stats.latest is not None
    assert stats.latest.outcome == "failed"
