"""Threads that a job starts belong to the job's slot: same slot, same current device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_parallel.slots import device
from comfy_parallel.slots.slot import Slot, current_slot, entered


def start_in_slot(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Thread.start`: the new thread runs in the slot of the thread that starts it."""

    @functools.wraps(original)
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        slot = current_slot()
        if slot is not None:
            self.run = _in_slot(slot, self.run)
        return original(self, *args, **kwargs)

    return start


def submit_in_slot(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ThreadPoolExecutor.submit`: the task runs in the submitter's slot, the pool's thread in none."""

    @functools.wraps(original)
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        slot = current_slot()
        if slot is None:
            return original(self, fn, *args, **kwargs)
        with entered(None):  # A pool outlives the job: the threads it starts now must not stay in this slot.
            return original(self, _in_slot(slot, fn), *args, **kwargs)

    return submit


def _in_slot(slot: Slot, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with entered(slot), device.current(slot.device):
            return function(*args, **kwargs)

    return run
