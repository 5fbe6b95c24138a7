"""Sharing weights from the start of the server on: among its slots, and with the processes of its group."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any

from comfy_parallel.config import Config
from comfy_parallel.slots.slot import slots
from comfy_parallel.weights import loading
from comfy_parallel.weights.files import group, ram

_server: Any = None  # of the group of which this process is the parent; it lasts as long as the process
_group_name: str | None = None  # of the group that this process belongs to


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


def join_others() -> dict[str, str]:
    """Share what is copied and converted from now on with ComfyUIs that this process starts; what these are to be told.

    They are told nothing where that needs another system than Linux.
    """
    if sys.platform != "linux":
        return {}
    name = _group_name or _found()
    store = loading.store()
    if store is not None:
        store.join(group.Group(name))
    return {group.VARIABLE: name}


def _group(env: MutableMapping[str, str]) -> group.Group | None:
    """The one that this process was started in, else one for itself and what it starts; None where it is alone."""
    global _group_name
    _group_name = _group_name or env.get(group.VARIABLE)
    if _group_name is None and any(slot.process is not None for slot in slots()):
        _found()
    if _group_name is None:
        return None
    env[group.VARIABLE] = _group_name
    return group.Group(_group_name)


def _found() -> str:
    """Make this process the parent of a group, as long as it lives; returns its name."""
    global _server, _group_name
    from comfy_parallel.weights.files.group_server import GroupServer

    _server = GroupServer()
    _group_name = str(_server.name)
    return _group_name
