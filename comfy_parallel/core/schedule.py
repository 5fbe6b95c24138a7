"""Which of the idle slots takes a job that any slot may take. Pure: no lock, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar


class Candidate(Protocol):
    """What is looked at of a slot."""

    index: int
    last_client_id: Any


AnySlot = TypeVar("AnySlot", bound=Candidate)


def chosen_slot(client_id: Any, queues: Sequence[Any], asking: Any = None) -> Any:
    """The slot that is to take a job of this client; None while all are busy. `asking` is the queue that asks."""
    idle = _idle_slots(client_id, queues, asking)
    return choose_slot(client_id, idle) if idle else None


def _idle_slots(client_id: Any, queues: Sequence[Any], asking: Any = None) -> list[Any]:
    """The slots that may take a job of this client: those that wait, and that whose queue asks.

    If none of them ran its client's last job, also one that did and is about to come back: the client has heard
    of that job's end and sent this one at once.
    """
    idle = [queue.slot for queue in queues if queue.is_waiting or queue is asking]
    if all(slot.last_client_id != client_id for slot in idle):
        returning = [queue.slot for queue in queues if queue.is_returning]
        idle += [slot for slot in returning if slot.last_client_id == client_id]
    return idle


def choose_slot(client_id: Any, idle: Iterable[AnySlot]) -> AnySlot:
    """The idle slot that ran this client's last job, for its executor has that workflow's results cached.

    Otherwise the first in order: an idle server keeps its caches warm in one place. A job never waits for
    a slot that runs another.
    """
    return min(idle, key=lambda slot: (slot.last_client_id != client_id, slot.index))
