"""A job that runs out of memory once succeeds, and one that does so twice fails with advice."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest

from comfy_parallel.isolation import out_of_memory
from comfy_parallel.slots.slot import Run, Slot, entered


class Shortage(Exception):
    """The host's own kind of error."""


class Cache(Enum):
    CLASSIC = 0
    NONE = 1


class Executor:
    """Runs jobs whose node fails with these errors, one in each run."""

    cache_type = Cache.CLASSIC

    def __init__(self, *errors: Exception | None, executed: tuple[str, ...] = ()) -> None:
        self.errors, self.executed = list(errors), executed
        self.told: list[str] = []
        self.runs = 0
        self.history_result: dict[str, Any] = {}

    def execute(self, prompt: Any, prompt_id: str) -> None:
        self.runs += 1
        self.history_result = {"outputs": {f"run {self.runs}": {}}, "meta": {}}
        error = self.errors.pop(0)
        if error is not None:
            details = {"node_id": "n", "exception_message": str(error)}
            deferring(type(self)._tell)(
                self, prompt_id, {"n": {"class_type": "Big"}}, [], self.executed, details, error
            )

    def _tell(self, prompt_id: Any, prompt: Any, outputs: Any, executed: Any, error: Any, ex: Any) -> None:
        self.told.append(error["exception_message"])


def deferring(handle: Callable[..., None], oom: type[BaseException] = Shortage) -> Callable[..., None]:
    return out_of_memory.deferring(handle, oom, lambda error: "illegal" in str(error))


@pytest.fixture
def freed() -> list[str]:
    return []


def run(executor: Executor, freed: list[str], slot: Slot | None = None) -> Slot:
    slot = slot or Slot(0, "cuda:0")
    slot.run = Run("a-job", started=True)
    retrying = out_of_memory.retrying(Executor.execute, lambda: freed.append("models"), lambda: freed.append("cache"))
    with entered(slot):
        retrying(executor, {}, "a-job")
    return slot


@pytest.mark.parametrize("error", [Shortage(), MemoryError(), RuntimeError("illegal")])
def test_it_runs_once_more_and_nobody_hears_of_it(error: Exception, freed: list[str]) -> None:
    executor = Executor(error, None)
    slot = run(executor, freed)
    assert (executor.runs, executor.told, freed) == (2, [], ["models", "cache"])
    assert set(executor.history_result["outputs"]) == {"run 1", "run 2"}
    assert slot.stats.memory_retries == 1
    assert slot.run is not None
    assert not slot.run.started


def test_twice_is_an_error_that_says_what_to_do(freed: list[str]) -> None:
    executor = Executor(Shortage("first"), Shortage("second"))
    run(executor, freed)
    assert (executor.runs, len(executor.told), freed) == (2, 1, ["models", "cache"])
    assert executor.told[0].startswith("second")
    assert "slot 0 (cuda:0)" in executor.told[0]
    assert "node n (Big) ran out of memory again" in executor.told[0]


def test_another_error_is_told_at_once_also_in_the_second_run(freed: list[str]) -> None:
    executor = Executor(ValueError("other"))
    run(executor, freed)
    assert (executor.runs, executor.told, freed) == (1, ["other"], [])
    executor = Executor(Shortage("first"), ValueError("other"))
    run(executor, freed)
    assert (executor.runs, executor.told) == (2, ["other"])


def test_outside_slots_all_is_as_in_the_host(freed: list[str]) -> None:
    executor = Executor(Shortage("first"))
    retrying = out_of_memory.retrying(Executor.execute, lambda: freed.append("models"), lambda: None)
    retrying(executor, {}, "a-job")
    assert (executor.runs, executor.told, freed) == (1, ["first"], [])


def test_where_nothing_is_cached_nodes_do_not_run_twice(freed: list[str]) -> None:
    executor = Executor(Shortage("first"), None, executed=("saved",))
    executor.cache_type = Cache.NONE
    run(executor, freed)
    assert executor.runs == 1
    assert "--cache-none" in executor.told[0]
    executor = Executor(Shortage("first"), None)
    executor.cache_type = Cache.NONE
    run(executor, freed)
    assert executor.runs == 2


def test_a_host_without_an_error_of_its_own_repeats_no_ordinary_failure() -> None:
    told: list[str] = []
    handle = deferring(lambda self, i, p, o, x, error, ex: told.append(error["exception_message"]), Exception)
    with entered(Slot(0, "cpu")):
        handle(None, "a-job", {}, [], [], {"node_id": "n", "exception_message": "plain"}, ValueError())
    assert told == ["plain"]
