"""Which jobs may wait: how many, in all and of one client, and only where they can run."""

from __future__ import annotations

from typing import Any

from comfy_parallel.config import Policy
from comfy_parallel.errors import CannotRunThere, QueueFull
from comfy_parallel.slots.items import client_of, view_of
from comfy_parallel.slots.shares import jobs


def check_may_wait(waiting: list[Any], policy: Policy, item: Any, target: int | None) -> None:
    """Refuse one more job when as many wait as may, or when it is bound to a slot that cannot run it.

    Raises:
        QueueFull: naming what the operator can raise.
        CannotRunThere: naming what that slot lacks.
    """
    if target is not None and (reason := view_of(item).barred.get(target)) is not None:
        raise CannotRunThere(reason)
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
