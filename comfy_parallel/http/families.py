"""What all of our metrics have in common: how they are named, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client.core import Metric

from comfy_parallel.slots.slot import Slot, slots

LABELS = ["gpu_id", "device"]


def labels_of(slot: Slot) -> list[str]:
    """The values of `LABELS` for a slot."""
    return [str(slot.index), slot.place]


def per_slot(kind: Any, name: str, help: str, value: Callable[[Slot], float]) -> Metric:
    """One sample for each slot."""
    family: Any = kind(f"comfy_parallel_{name}", help, labels=LABELS)
    for slot in slots():
        family.add_metric(labels_of(slot), value(slot))
    return family  # type: ignore[no-any-return]
