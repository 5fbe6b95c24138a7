"""Sharing weights from the start of the server on: among its slots, and with the processes of its group."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from comfy_parallel.config import Config
from comfy_parallel.slots.slot import slots
from comfy_parallel.weights import loading
from comfy_parallel.weights.files import group, ram

_server: Any = None  # of the group of which this process is the parent; it lasts as long as the process


def begin(config: Config, front: Any, env: MutableMapping[str, str], *, may_pin: bool) -> None:
    """Share weights through a store.

    Args:
        env: the environment of the processes that this one starts, which are told of the group.
        may_pin: whether memory may be pinned at all.
    """
    from comfy_parallel.weights.files.store import Store

    def free(index: int) -> None:
        for name in ("unload_models", "free_memory"):
            front.slot_queues[index].set_flag(name, True)

    budget = ram.budget_bytes(config.ram_gb)
    loading.use(Store(config.weights or "map", budget, pins=may_pin, group=_group(env)), free)
    front.between_jobs = loading.between_jobs


def _group(env: MutableMapping[str, str]) -> group.Group | None:
    """The one that this process was started in, else one for itself and the processes of its slots."""
    global _server
    if group.VARIABLE not in env and any(slot.process is not None for slot in slots()):
        from comfy_parallel.weights.files.group_server import GroupServer

        _server = _server or GroupServer()
        env[group.VARIABLE] = _server.name
    name = env.get(group.VARIABLE)
    return None if name is None else group.Group(name)
