"""Slots that use one model take turns with it, and each finds it as loaded by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from comfy_parallel.isolation import loaded_models, model_turns
from comfy_parallel.isolation.loaded_models import LoadedModels, drop_dead
from comfy_parallel.slots.slot import Slot, entered
from tests.fakes import make_slots

WAIT_S = 60.0


class Model:
    """Something that can be cached and handed around."""


class Patcher:
    def __init__(self, model: Model) -> None:
        self.model = model

    def loaded_size(self) -> int:
        return 1


class Loaded:
    device = "cpu"

    def __init__(self, model: Model) -> None:
        self.model = Patcher(model)
        self.real_model = lambda: model


@pytest.fixture
def slots() -> Iterator[tuple[Slot, ...]]:
    made = make_slots("cpu", "cpu")
    yield made
    for slot in made:
        with entered(slot):
            model_turns.job_ended()


def nothing() -> None:
    """What is called while waiting."""


def take(slot: Slot, *models: Model, while_waiting: Callable[[], None] = nothing) -> None:
    with entered(slot):
        model_turns.take(models, while_waiting)


def end_node(slot: Slot, *, is_going_on: bool = False) -> None:
    with entered(slot):
        model_turns.node_ended(is_going_on=is_going_on)


def start(slot: Slot, *models: Model) -> tuple[threading.Thread, threading.Event]:
    """Take these models in a thread; the event is set when it has waited, the thread ends when it has them."""
    waited = threading.Event()
    thread = threading.Thread(target=take, args=(slot, *models), kwargs={"while_waiting": waited.set})
    thread.start()
    return thread, waited


def test_another_slot_waits_until_the_node_has_ended(slots: tuple[Slot, ...]) -> None:
    model = Model()
    take(slots[0], model)
    thread, waited = start(slots[1], model)
    assert waited.wait(WAIT_S)
    assert thread.is_alive()
    end_node(slots[0])
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_models_of_their_own_are_waited_for_by_nobody(slots: tuple[Slot, ...]) -> None:
    take(slots[0], Model())
    take(slots[1], Model(), while_waiting=pytest.fail)


def test_a_node_that_goes_on_keeps_the_turn_until_its_job_ends(slots: tuple[Slot, ...]) -> None:
    model = Model()
    take(slots[0], model)
    end_node(slots[0], is_going_on=True)
    end_node(slots[0])
    thread, waited = start(slots[1], model)
    assert waited.wait(WAIT_S)
    with entered(slots[0]):
        model_turns.job_ended()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_models_that_two_slots_have_used_have_one_turn_so_that_turns_do_not_cross(slots: tuple[Slot, ...]) -> None:
    one, other = Model(), Model()
    for slot in slots:
        take(slot, one, other)
        end_node(slot)
    take(slots[0], one)
    thread, waited = start(slots[1], other)
    assert waited.wait(WAIT_S)
    take(slots[0], other, while_waiting=pytest.fail)
    end_node(slots[0])
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_two_that_wait_for_each_other_are_told(slots: tuple[Slot, ...]) -> None:
    one, other = Model(), Model()
    take(slots[0], one)
    take(slots[1], other)
    thread, waited = start(slots[1], one)
    assert waited.wait(WAIT_S)
    with pytest.raises(model_turns.CrossedModels, match="=alone"):
        take(slots[0], other)
    end_node(slots[0])
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_an_interrupted_job_waits_no_longer(slots: tuple[Slot, ...]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    model = Model()
    take(slots[0], model)
    with pytest.raises(KeyboardInterrupt):
        take(slots[1], model, while_waiting=interrupt)
    end_node(slots[0])
    take(slots[0], model, while_waiting=pytest.fail)


def test_what_one_slot_has_loaded_the_next_finds_in_its_own_list(slots: tuple[Slot, ...]) -> None:
    seen = LoadedModels()
    model, own = Model(), Model()
    entries = [Loaded(own), Loaded(model)]
    with entered(slots[0]):
        seen.extend(entries)
    take(slots[0], model)
    end_node(slots[0])
    take(slots[1], model)
    with entered(slots[1]):
        assert list(seen) == [entries[1]]
    with entered(slots[0]):
        assert len(seen) == 2  # it may be walking them
        stand_in: Any = seen[1]
        assert (stand_in.model.model, stand_in.model_memory(), stand_in.model_unload()) == (None, 0, True)
        drop_dead()
        assert list(seen) == [entries[0]]
    assert [found["name"] for found in loaded_models.models_of(slots[0])] == ["Model"]


def test_a_slot_does_not_unload_what_another_has_by_now(slots: tuple[Slot, ...]) -> None:
    model, unloaded = Model(), []

    def unload() -> bool:
        unloaded.append(model)
        return True

    take(slots[0], model)
    end_node(slots[0])
    take(slots[1], model)
    with entered(slots[0]):
        assert model_turns.unload(model, unload)
    assert not unloaded
    with entered(slots[1]):
        assert model_turns.unload(model, unload)
    assert unloaded == [model]


def test_outside_of_slots_nobody_waits(slots: tuple[Slot, ...]) -> None:
    model = Model()
    take(slots[0], model)
    with entered(None):
        model_turns.take([model], pytest.fail)
        model_turns.node_ended(is_going_on=False)
        model_turns.job_ended()
    thread, waited = start(slots[1], model)
    assert waited.wait(WAIT_S)  # slot 0 still has it
    end_node(slots[0])
    thread.join(WAIT_S)
    assert not thread.is_alive()
