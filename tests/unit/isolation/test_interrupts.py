"""An interrupt stops the job that is meant and no other."""

from __future__ import annotations

import pytest

from comfy_parallel.core.scope import Scope, scoped
from comfy_parallel.isolation.interrupts import (
    clear_interrupt,
    is_interrupted,
    request_interrupt,
    take_interrupt,
)
from comfy_parallel.slots.slot import Run, Slot, entered, interrupt_job
from tests.fakes import make_slots


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    """Slots 0 and 1 run the jobs `a` and `b`, slot 2 is idle."""
    made = make_slots("cuda:0", "cuda:1", "cuda:2")
    made[0].run, made[1].run = Run("a"), Run("b")
    return made


def interrupted(slots: tuple[Slot, ...]) -> list[str]:
    return [slot.run.prompt_id for slot in slots if slot.run is not None and slot.run.interrupted]


def start_job(slot: Slot) -> None:
    """What the host does at the start of each job."""
    with entered(slot):
        clear_interrupt()


def test_without_a_scope_every_running_job_is_meant(slots: tuple[Slot, ...]) -> None:
    assert request_interrupt() == 2
    assert interrupted(slots) == ["a", "b"]


@pytest.mark.parametrize(("slot", "stopped"), [(0, ["a"]), (1, ["b"]), (2, [])])
def test_a_scope_of_one_slot(slots: tuple[Slot, ...], slot: int, stopped: list[str]) -> None:
    with scoped(Scope(slot=slot)):
        assert request_interrupt() == len(stopped)
    assert interrupted(slots) == stopped


@pytest.mark.parametrize(("prompt_id", "stopped"), [("a", ["a"]), ("b", ["b"]), ("waiting", [])])
def test_a_scope_of_one_job(slots: tuple[Slot, ...], prompt_id: str, stopped: list[str]) -> None:
    with scoped(Scope(prompt_id=prompt_id)):
        assert request_interrupt() == len(stopped)
    assert interrupted(slots) == stopped


def test_a_node_interrupts_its_own_job(slots: tuple[Slot, ...]) -> None:
    with entered(slots[1]):
        assert request_interrupt() == 1
    assert interrupted(slots) == ["b"]


def test_a_node_on_an_idle_slot_interrupts_nothing(slots: tuple[Slot, ...]) -> None:
    with entered(slots[2]):
        assert request_interrupt() == 0
    assert interrupted(slots) == []


@pytest.mark.parametrize(("prompt_id", "found"), [("a", True), ("b", True), ("c", False)])
def test_by_id_wherever_it_runs(slots: tuple[Slot, ...], prompt_id: str, found: bool) -> None:
    assert interrupt_job(prompt_id) is found
    assert interrupted(slots) == ([prompt_id] if found else [])


def test_a_job_sees_only_its_own_interrupt(slots: tuple[Slot, ...]) -> None:
    interrupt_job("a")
    seen = []
    for slot in slots:
        with entered(slot):
            seen.append(is_interrupted())
    assert seen == [True, False, False]


def test_outside_slots_any_interrupt_shows(slots: tuple[Slot, ...]) -> None:
    assert is_interrupted() is False
    interrupt_job("b")
    assert is_interrupted() is True


def test_an_interrupt_is_taken_once(slots: tuple[Slot, ...]) -> None:
    interrupt_job("a")
    with entered(slots[0]):
        assert [take_interrupt(), take_interrupt()] == [True, False]
    assert interrupted(slots) == []


def test_it_is_taken_by_its_own_job_only(slots: tuple[Slot, ...]) -> None:
    interrupt_job("a")
    assert take_interrupt() is False
    for slot in slots[1:]:
        with entered(slot):
            assert take_interrupt() is False
    assert interrupted(slots) == ["a"]


def test_an_interrupt_between_dequeue_and_start_is_not_lost(slots: tuple[Slot, ...]) -> None:
    interrupt_job("a")
    start_job(slots[0])
    assert interrupted(slots) == ["a"]


def test_a_node_may_clear_its_own_interrupt_during_the_job(slots: tuple[Slot, ...]) -> None:
    start_job(slots[0])
    request_interrupt()
    with entered(slots[0]):
        clear_interrupt()
    assert interrupted(slots) == ["b"]


def test_clearing_outside_a_running_job_clears_nothing(slots: tuple[Slot, ...]) -> None:
    request_interrupt()
    clear_interrupt()
    with entered(slots[2]):
        clear_interrupt()
    assert interrupted(slots) == ["a", "b"]


def test_the_next_job_of_a_slot_starts_without_the_flag(slots: tuple[Slot, ...]) -> None:
    start_job(slots[0])
    interrupt_job("a")
    slots[0].run = Run("c")
    start_job(slots[0])
    with entered(slots[0]):
        assert is_interrupted() is False
        assert take_interrupt() is False


def test_without_slots_there_is_nothing_to_interrupt() -> None:
    assert request_interrupt() == 0
    assert is_interrupted() is False
    assert take_interrupt() is False
    clear_interrupt()
