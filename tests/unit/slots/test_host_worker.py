"""The host's call of its worker is made again for each slot, whatever the host gives to its worker."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import pytest

from comfy_parallel.errors import HostMismatch
from comfy_parallel.slots import worker
from comfy_parallel.slots.host_worker import RunWorker, worker_of
from tests.fakes import make_front

calls: list[Any] = []


class Front:
    """Stands for the queue: the first that asks it for a job is the host's worker."""

    def __init__(self) -> None:
        self.run_worker: RunWorker | None = None

    def get(self) -> None:
        self.run_worker = worker_of(sys._getframe(1), self)


def of_two(q: Any, server_instance: Any) -> None:
    q.get() if isinstance(q, Front) else calls.append((q, server_instance))


def of_three(q: Any, server_instance: Any, asset_manager: Any) -> None:
    q.get() if isinstance(q, Front) else calls.append((q, server_instance, asset_manager))


def with_default(q: Any, server_instance: Any, asset_manager: Any = None) -> None:
    q.get() if isinstance(q, Front) else calls.append((q, server_instance, asset_manager))


def queue_later(server_instance: Any, q: Any) -> None:
    q.get() if isinstance(q, Front) else calls.append((server_instance, q))


def by_name(server_instance: Any, /, *others: Any, q: Any, **more: Any) -> None:
    q.get() if isinstance(q, Front) else calls.append((server_instance, others, q, more))


def with_cells(q: Any, server_instance: Any) -> None:
    """Its arguments are read by a function inside."""

    def inner() -> tuple[Any, Any]:
        return q, server_instance

    q.get() if isinstance(q, Front) else calls.append(inner())


@pytest.mark.parametrize(
    ("hosts_worker", "given", "named", "expected"),
    [
        (of_two, ("Q", "S"), {}, ("Q", "S")),
        (of_three, ("Q", "S", "M"), {}, ("Q", "S", "M")),
        (of_three, ("Q",), {"asset_manager": "M", "server_instance": "S"}, ("Q", "S", "M")),
        (with_default, ("Q", "S"), {}, ("Q", "S", None)),
        (queue_later, ("S", "Q"), {}, ("S", "Q")),
        (by_name, ("S", 1, 2), {"q": "Q", "flag": 3}, ("S", (1, 2), "Q", {"flag": 3})),
        (with_cells, ("Q", "S"), {}, ("Q", "S")),
    ],
)
def test_every_argument_of_the_hosts_own_call_is_passed_on(
    hosts_worker: Any, given: tuple[Any, ...], named: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    front = Front()
    hosts_worker(
        *(front if value == "Q" else value for value in given), **named | ({"q": front} if "q" in named else {})
    )
    assert front.run_worker is not None
    calls.clear()
    front.run_worker("own queue")
    front.run_worker("another")
    assert calls == [replaced(expected, "own queue"), replaced(expected, "another")]


def replaced(values: tuple[Any, ...], queue: str) -> tuple[Any, ...]:
    return tuple(queue if value == "Q" else value for value in values)


def test_a_worker_that_is_no_module_level_function_is_refused() -> None:
    def local_worker(q: Any) -> None:
        q.get()

    with pytest.raises(HostMismatch, match="local_worker: the host's worker is no module-level function"):
        local_worker(Front())


held = Front()


def without_queue() -> None:
    held.get()


def test_a_worker_that_was_not_given_the_queue_is_refused() -> None:
    """Every slot would take its jobs from the front."""
    with pytest.raises(HostMismatch, match="without_queue: .* was not given the queue"):
        without_queue()


# Where the host's worker is found.


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What workers would have been started with."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(worker, "start_workers", lambda *given: found.append(given))
    return found


@pytest.mark.parametrize("name", ["__main__", "main"])
def test_the_hosts_worker_is_replaced_in_the_hosts_main_module(
    make_module: Any, started: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    front = make_front("cpu")
    monkeypatch.delitem(sys.modules, "main", raising=False)
    main = make_module(name, "def prompt_worker(q, server, *more, **named): calls.append((q, more, named))", calls=[])
    for _ in range(2):
        worker.take_over(front, front.is_behind)
    main.prompt_worker(front, front.server, 3, other=4)
    ((found, run, queue),) = started
    assert (found, queue, main.calls) == (front, front, [])
    run("own")
    assert main.calls == [("own", (3,), {"other": 4})]


def test_a_worker_that_is_given_no_queue_of_ours_is_refused(make_module: Any, started: list[Any]) -> None:
    main = make_module("__main__", "def prompt_worker(q): pass")
    worker.take_over(make_front("cpu"), lambda value: False)
    with pytest.raises(HostMismatch, match="was not given the queue"):
        main.prompt_worker(object())


def packs_get(queue: Any, timeout: float | None = None) -> Any:
    """A node pack's function that was made a method of the queue."""
    return type(queue).get(queue, timeout)


def asking_worker(queue: Any, server: Any, more: int = 1) -> Any:
    if server == "run":
        return calls.append((queue, more))
    return queue.get(timeout=1000.0)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_worker_that_is_called_in_another_way_is_found_among_the_callers_of_get(
    started: list[Any], is_wrapped: bool
) -> None:
    front = make_front("cpu", on_first_get=worker.start_from_call)
    if is_wrapped:
        front.get = MethodType(packs_get, front)
    with pytest.raises(RuntimeError, match="stopped"):
        asking_worker(front, "ask", 2)
    ((found, run, queue),) = started
    assert (found, queue) == (front, front)


def test_who_is_no_worker_is_refused(started: list[Any]) -> None:
    front = make_front("cpu", on_first_get=worker.start_from_call)

    def local_worker() -> None:
        front.get(timeout=1000.0)

    with pytest.raises(HostMismatch, match="local_worker"):
        local_worker()
    assert started == []


def test_once_the_slots_work_nobody_else_takes_jobs(started: list[Any]) -> None:
    front = make_front("cpu", on_first_get=worker.start_from_call)
    front.start(front)
    with pytest.raises(RuntimeError, match="prompt_queues"):
        asking_worker(front, "ask")
