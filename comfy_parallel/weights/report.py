"""What `GET /parallel/weights` tells: the files in use, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_parallel.slots.slot import slots
from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import copies


def weights_json(name_of: Callable[[str], str]) -> dict[str, Any]:
    """The reply of `GET /parallel/weights`. `name_of` gives a path's name as the loader nodes know it."""
    store = loading.store()
    if store is None:
        return {"mode": "off", "ram": {"budget_bytes": 0, "used_bytes": 0}, "slots": [], "files": []}
    return {
        "mode": store.mode,
        "ram": {"budget_bytes": store.budget_bytes, "used_bytes": store.used_bytes},
        "slots": [{"gpu_id": slot.index, "copied_bytes": copies.bytes_from(slot)} for slot in slots()],
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
