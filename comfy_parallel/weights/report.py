"""What `GET /parallel/weights` tells: the files in use, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_parallel.slots.slot import Slot, slots
from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import copies


def weights_json(name_of: Callable[[str], str]) -> dict[str, Any]:
    """The reply of `GET /parallel/weights`. `name_of` gives a path's name as the loader nodes know it."""
    store = loading.store()
    if store is None:
        return {"mode": "off", "ram": ram(), "slots": [], "files": []}
    return {
        "mode": store.mode,
        "ram": ram(),
        "slots": [{"gpu_id": slot.index, "copied_bytes": sizes} for slot, sizes in copied_bytes()],
        "files": [
            {
                "name": name_of(file.path),
                "size_bytes": file.identity.size,
                "mapped_bytes": file.mapped_bytes,
                "copied_bytes": file.copied_bytes,
                "converted_bytes": file.converted_bytes,
                "pinned_bytes": file.pinned_bytes,
                "slots": file.slots,
            }
            for file in store.files()
            if file.regions()
        ],
    }


def ram() -> dict[str, int]:
    """How much RAM copied, converted and pinned weights may have, and have."""
    store = loading.store()
    return {
        "budget_bytes": 0 if store is None else store.budget_bytes,
        "used_bytes": 0 if store is None else store.used_bytes,
    }


def file_loads(slot: Slot) -> int:
    """How many weight files a slot's jobs have loaded."""
    return loading.file_loads(slot)


def copied_bytes() -> list[tuple[Slot, dict[str, int]]]:
    """What was copied to each slot's device, by what from."""
    return [(slot, copies.bytes_from(slot)) for slot in slots()]
