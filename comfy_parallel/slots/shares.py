"""Shares of running jobs among what waits: jobs of the same scheduler, of which clients do not know."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from comfy_parallel.core.shares import Share
from comfy_parallel.slots.dispatcher import Dispatcher
from comfy_parallel.slots.items import QueueItem


class Shares:
    """Queues shares and takes them back."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def put(self, item: tuple[Any, ...], share: Share, job: QueueItem, not_on: frozenset[int] = frozenset()) -> None:
        """Let a share of a running job wait for a slot, `not_on` these, where the job itself had waited."""
        queued = QueueItem(item)
        queued.share, queued.not_on, queued.queued_at = share, not_on, time.monotonic()
        queued.priority, queued.place, queued.peer, queued.party = job.priority, job.place, job.peer, job.party
        with self._dispatcher.mutex:
            self._dispatcher.shares.add(queued.prompt_id)
            self._dispatcher.enqueue(queued)

    def drop(self, prompt_id: str) -> bool:
        """Take a share out of those that wait; False when none with this id waits."""
        with self._dispatcher.mutex:
            for position, item in enumerate(self._dispatcher.waiting):
                if is_share(item) and item.prompt_id == prompt_id:
                    self._dispatcher.discard(position)
                    self._dispatcher.shares.discard(prompt_id)
                    return True
        return False


def is_share(item: Any) -> bool:
    """Whether this is a share of another job."""
    return type(item) is QueueItem and item.share is not None


def jobs(items: Iterable[Any]) -> list[Any]:
    """Those that clients know of."""
    return [item for item in items if not is_share(item)]
