"""The node classes that we add to the host, by the names that workflows use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from comfy_parallel.nodes import advanced, loaders, originals, virtual_vram
from comfy_parallel.nodes.table import CORE, PACKS, Loader
from comfy_parallel.slots import device

ORIGINAL = "ComfyUI-MultiGPU"


def nodes(known: Mapping[str, type], device_type: str, pack_folders: Iterable[Path]) -> dict[str, type]:
    """All that can be made of the classes that the host knows now; none beside the pack whose names these are."""
    if originals.installed(ORIGINAL, pack_folders, "distorch_2.py", instead_of="device-choosing nodes"):
        return {}
    devices = partial(device_names, device_type)
    made: dict[str, type] = dict(advanced.nodes(known, devices, virtual_vram.spread_result))
    for row in (*CORE, *PACKS):
        if row.name in known:
            made.update(_both(row, known[row.name], devices))
    return {name: node for name, node in made.items() if name not in known}


def device_names(device_type: str) -> Sequence[str]:
    """The devices that this machine has, as torch writes them; `cpu` first."""
    if device_type in ("cpu", "mps"):
        return list(dict.fromkeys(("cpu", device_type)))
    if device_type == "privateuseone":
        return ["cpu", "privateuseone:0"]
    return ["cpu", *(f"{device_type}:{index}" for index in range(device.device_count(device_type)))]


def _both(row: Loader, original: Any, devices: loaders.Devices) -> dict[str, type]:
    made = {f"{row.name}MultiGPU": loaders.with_device(row, original, devices)}
    if row.virtual:
        name = f"{row.name}DisTorch2MultiGPU"
        made[name] = loaders.with_virtual_vram(row, original, devices, virtual_vram.spread_result)
    if row.legacy:
        name = f"{row.name}DisTorchMultiGPU"
        made[name] = loaders.with_legacy_vram(row, original, devices, virtual_vram.spread_result)
    return made
