"""Settings that a library keeps once per process: what a job sets is put back when the job ends."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from comfy_parallel.slots.slot import SlotLocal

logger = logging.getLogger(__name__)

_before: SlotLocal[dict[tuple[ModuleType, str], Any]] = SlotLocal(dict)


def note(module: ModuleType, name: str) -> None:
    """Remember what a setting was before the slot's job set it."""
    if module.__name__.partition(".")[0] == "torch":
        _before.get().setdefault((module, name), getattr(module, name))


def end_job() -> None:
    """Put back what the slot's job has set and left."""
    noted = _before.get()
    while noted:
        (module, name), before = noted.popitem()
        if getattr(module, name) != before:
            logger.info("A job left %s.%s at %r; put back to %r", module.__name__, name, getattr(module, name), before)
            setattr(module, name, before)
