"""Which of the idle slots takes a job that any slot may take. Pure: no lock, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy_parallel.slot import Slot


def choose_slot(client_id: Any, idle: Iterable[Slot]) -> Slot:
    """The idle slot that ran this client's last job, for its executor has that workflow's results cached.

    Otherwise the first in order: an idle server keeps its caches warm in one place. A job never waits for
    a busy slot.
    """
    return min(idle, key=lambda slot: (slot.last_client_id != client_id, slot.index))
