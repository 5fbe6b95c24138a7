"""A job that keeps its slot's outputs has nothing forgotten while it runs, however it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.isolation.kept_outputs import keep_during, keeping_outputs
from comfy_parallel.slots.slot import Slot, entered


class Cache:
    """Counts how often it was cleaned."""

    cleaned = 0

    def clean_unused(self) -> None:
        self.cleaned += 1


class Executor:
    def __init__(self) -> None:
        self.caches = SimpleNamespace(all=[Cache(), Cache()])

    def execute(self, prompt: Any, prompt_id: str, fails: bool = False) -> str:
        for cache in self.caches.all:
            cache.clean_unused()
        if fails:
            raise SystemExit
        return prompt_id

    @property
    def cleaned(self) -> list[int]:
        return [cache.cleaned for cache in self.caches.all]


execute = keeping_outputs(Executor.execute)


def run(executor: Executor, slot: Slot, prompt_id: str, client_id: Any = None, **options: bool) -> Any:
    slot.last_client_id = client_id
    with entered(slot):
        return execute(executor, {}, prompt_id, **options)


def test_only_that_job_keeps_them() -> None:
    executor, slot = Executor(), Slot(0, "cpu")
    keep_during("ahead")
    assert run(executor, slot, "ahead") == "ahead"
    assert executor.cleaned == [0, 0]
    run(executor, slot, "later")
    run(executor, slot, "ahead")  # its id again is another job
    assert executor.cleaned == [2, 2]


def test_a_job_that_fails_leaves_the_cache_as_the_hosts() -> None:
    executor, slot = Executor(), Slot(0, "cpu")
    keep_during("ahead")
    with pytest.raises(SystemExit):
        run(executor, slot, "ahead", fails=True)
    run(executor, slot, "later")
    assert executor.cleaned == [1, 1]
    assert all(vars(cache) == {"cleaned": 1} for cache in executor.caches.all)


def test_the_slot_stays_the_one_of_the_client_whose_outputs_it_has() -> None:
    executor, slots = Executor(), (Slot(0, "cpu"), Slot(1, "cpu"))
    for slot, client_id in zip(slots, ("a", "b"), strict=True):
        run(executor, slot, "first", client_id)
    for slot, client_id in zip(slots, ("a", "b"), strict=True):
        keep_during("ahead")
        run(executor, slot, "ahead", None)
        assert slot.last_client_id == client_id


def test_a_slot_that_ran_nothing_else_is_nobodys() -> None:
    slot = Slot(0, "cpu")
    keep_during("ahead")
    run(Executor(), slot, "ahead", None)
    assert slot.last_client_id is not None


def test_outside_of_slots_nothing_changes() -> None:
    executor = Executor()
    execute(executor, {}, "ahead")
    assert executor.cleaned == [1, 1]
