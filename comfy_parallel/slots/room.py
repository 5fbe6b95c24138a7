"""How many jobs may wait, in all and of one client."""

from __future__ import annotations

from typing import Any

from comfy_parallel.config import Policy
from comfy_parallel.errors import QueueFull
from comfy_parallel.slots.items import client_of, view_of
from comfy_parallel.slots.shares import jobs


def check_room(waiting: list[Any], policy: Policy, item: Any) -> None:
    """Refuse one more job when as many wait as may.

    Raises:
        QueueFull: naming what the operator can raise.
    """
    most = policy.max_waiting
    if most is not None and len(waiting) >= most and (count := len(jobs(waiting))) >= most:
        raise QueueFull(f"{count} jobs wait, as many as this server takes", "COMFY_PARALLEL_MAX_WAITING")
    if policy.max_waiting_per_client is None or (client := client_of(item)) is None:
        return
    count = sum(view_of(one).client_id == client for one in jobs(waiting))
    if count >= policy.max_waiting_per_client:
        raise QueueFull(
            f"{count} jobs of this client wait, as many as a client may have",
            "COMFY_PARALLEL_MAX_WAITING_PER_CLIENT",
        )
