"""What `GET /parallel/weights` tells: the files in use, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from comfy_parallel.slots.slot import Slot, slots
from comfy_parallel.weights import loading
from comfy_parallel.weights.files import ram as files_ram
from comfy_parallel.weights.gpu import copies

_IN_RAM = ("mapped_bytes", "copied_bytes", "converted_bytes", "pinned_bytes")


def weights_json(name_of: Callable[[str], str]) -> dict[str, Any]:
    """What `GET /parallel/weights` tells of files. `name_of` gives a path's name as the loader nodes know it."""
    told = of_this_process(name_of)
    for slot in slots():
        _add(told, slot, _told_by(slot))
    told["slots"].sort(key=lambda one: one["gpu_id"])
    return told


def of_this_process(name_of: Callable[[str], str]) -> dict[str, Any]:
    """The same of the slots that run in this process."""
    store = loading.store()
    if store is None:
        return {"mode": "off", "ram": ram(), "slots": [], "files": []}
    return {
        "mode": store.mode,
        "ram": ram(),
        "slots": [_slot_json(slot) for slot in slots() if slot.process is None],
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


def _slot_json(slot: Slot) -> dict[str, Any]:
    return {"gpu_id": slot.index, "copied_bytes": copies.bytes_from(slot), "file_loads": loading.file_loads(slot)}


def _add(told: dict[str, Any], slot: Slot, theirs: dict[str, Any]) -> None:
    """Add what the process of a slot tells. Processes share the memory of a file, so the most is what there is."""
    told["slots"] += [{**one, "gpu_id": slot.index} for one in theirs.get("slots", ())]
    known = {(file["name"], file["size_bytes"]): file for file in told["files"]}
    for file in theirs.get("files", ()):
        ours = known.get((file["name"], file["size_bytes"]))
        users = [slot.index] if file["slots"] else []
        if ours is None:
            told["files"].append({**file, "slots": users})
        else:
            ours |= {name: max(ours[name], file[name]) for name in _IN_RAM}
            ours["slots"] = sorted({*ours["slots"], *users})


def processes_json() -> dict[str, Any]:
    """What `GET /parallel/weights` tells of processes: the memory of each, with its share of what several map.

    It takes milliseconds for each GiB, so not for every look.
    """
    pids = {os.getpid(): [slot.index for slot in slots() if slot.process is None]}
    pids |= {slot.process.pid: [slot.index] for slot in slots() if slot.process is not None and slot.process.pid}
    found = [{"pid": pid, "gpu_ids": indices, "pss_bytes": files_ram.pss_bytes(pid)} for pid, indices in pids.items()]
    return {"pss_bytes": sum(one["pss_bytes"] or 0 for one in found), "processes": found}


def ram() -> dict[str, int]:
    """How much RAM copied, converted and pinned weights may have, and have."""
    store = loading.store()
    return {
        "budget_bytes": 0 if store is None else store.budget_bytes,
        "used_bytes": 0 if store is None else store.used_bytes,
    }


def file_loads(slot: Slot) -> int:
    """How many weight files a slot's jobs have loaded."""
    if slot.process is None:
        return loading.file_loads(slot)
    return sum(one["file_loads"] for one in _told_by(slot).get("slots", ()))


def copied_bytes() -> list[tuple[Slot, dict[str, int]]]:
    """What was copied to each slot's device, by what from."""
    found: list[tuple[Slot, dict[str, int]]] = []
    for slot in slots():
        if slot.process is None:
            found.append((slot, copies.bytes_from(slot)))
        else:
            found += [(slot, one["copied_bytes"]) for one in _told_by(slot).get("slots", ())]
    return found


def _told_by(slot: Slot) -> dict[str, Any]:
    """What the process of a slot has told last; nothing while it starts."""
    told: dict[str, Any] = {} if slot.process is None else slot.process.report.get("weights") or {}
    return told
