"""The host's call of its worker is made again for each slot, whatever the host gives to its worker."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from comfy_parallel.errors import HostMismatch
from comfy_parallel.slots.host_worker import RunWorker, worker_of

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
    ("worker", "given", "named", "expected"),
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
    worker: Any, given: tuple[Any, ...], named: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    front = Front()
    worker(*(front if value == "Q" else value for value in given), **named | ({"q": front} if "q" in named else {}))
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
