"""What waits and runs at one moment, as the host-facing queue tells it."""

from __future__ import annotations

from typing import NamedTuple

from comfy_parallel.slots.items import QueueItem, view_of


class Snapshot(NamedTuple):
    """All queues at one moment. Lists by slot index; `unassigned` waits for any slot."""

    running: list[list[QueueItem]]
    pending: list[list[QueueItem]]
    unassigned: list[QueueItem]
    resting: list[str]

    @property
    def waiting_to_run_alone(self) -> list[str]:
        """The ids of the jobs that wait, in the queue or between two of their nodes, to be the only ones that run."""
        return self.resting + [
            item[1] for waiting in (*self.pending, self.unassigned) for item in waiting if view_of(item).is_alone
        ]
