"""Node classes that load on a device of one's choice, made from the host's own loader classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import allocation
from comfy_parallel.nodes.table import Loader
from comfy_parallel.slots.choice import loading_on

SLOT = allocation.SLOT
CATEGORY = "multigpu"
VIRTUAL_CATEGORY = "multigpu/distorch_2"
_DEVICE_TIP = "Where this model lives and computes. slot: on the device of the slot that runs the job."
_GB = {"default": 4.0, "min": 0.0, "max": 128.0, "step": 0.1}

Devices = Callable[[], Sequence[str]]
Spread = Callable[..., Any]


def device_input(devices: Sequence[str]) -> tuple[Any, ...]:
    """An input that offers the slot's own device and all others."""
    return ([SLOT, *devices], {"default": SLOT, "tooltip": _DEVICE_TIP})


def chosen(device: str, devices: Sequence[str]) -> str | None:
    """The device that an input names; None for the slot's own.

    Raises:
        AllocationError: when this machine has no such device.
    """
    if device == SLOT:
        return None
    if device not in devices:
        raise AllocationError(f"there is no device {device!r} here; choose {SLOT}, or one of {', '.join(devices)}")
    return device


def with_device(row: Loader, original: type, devices: Devices) -> type:
    """The original with an input that chooses the device."""

    def input_types(cls: type) -> dict[str, Any]:
        return _inputs(original, {row.device: device_input(devices())})

    def load(self: Any, **inputs: Any) -> Any:
        device = chosen(inputs.pop(row.device, SLOT), devices())
        with loading_on(device):
            return call(original, inputs)

    return _node(f"{row.name}MultiGPU", original, input_types, load, CATEGORY)


def with_virtual_vram(row: Loader, original: type, devices: Devices, spread: Spread) -> type:
    """The original with inputs that say how much of the model lives on other devices.

    `spread(result, request…)` places what the original has loaded; it returns that and lines that tell the plan.
    """

    def input_types(cls: type) -> dict[str, Any]:
        return _inputs(original, {row.compute: device_input(devices()), **virtual_inputs(devices(), row.eject)})

    def load(self: Any, **inputs: Any) -> Any:
        device = chosen(inputs.pop(row.compute, SLOT), devices())
        asked = {
            "devices": devices(),
            "gigabytes": inputs.pop("virtual_vram_gb", _GB["default"]),
            "donors": inputs.pop("donor_device", allocation.CPU),
            "expert": inputs.pop("expert_mode_allocations", ""),
            "eject": inputs.pop("eject_models", row.eject),
            "exact": inputs.pop("high_precision_loras", True),
        }
        return _spread_over(original, inputs, device, spread, asked)

    return _node(f"{row.name}DisTorch2MultiGPU", original, input_types, load, VIRTUAL_CATEGORY)


def with_legacy_vram(row: Loader, original: type, devices: Devices, spread: Spread) -> type:
    """The same under the inputs that older workflows have."""

    def input_types(cls: type) -> dict[str, Any]:
        virtual = virtual_inputs(devices(), eject=False)
        others = (
            "BOOLEAN",
            {"default": False, "tooltip": "Use the memory of the other devices before that of the CPU."},
        )
        return _inputs(
            original,
            {
                "device": device_input(devices()),
                "virtual_vram_gb": virtual["virtual_vram_gb"],
                "use_other_vram": others,
                "expert_mode_allocations": virtual["expert_mode_allocations"],
            },
        )

    def load(self: Any, **inputs: Any) -> Any:
        device = chosen(inputs.pop("device", SLOT), devices())
        others = [name for name in devices() if name not in (allocation.CPU, device)]
        asked = {
            "devices": devices(),
            "gigabytes": inputs.pop("virtual_vram_gb", _GB["default"]),
            "donors": ",".join([*(others if inputs.pop("use_other_vram", False) else []), allocation.CPU]),
            "expert": inputs.pop("expert_mode_allocations", ""),
            "eject": False,
            "exact": True,
        }
        return _spread_over(original, inputs, device, spread, asked)

    return _node(f"{row.name}DisTorchMultiGPU", original, input_types, load, f"{CATEGORY}/legacy")


def _spread_over(
    original: type, inputs: Mapping[str, Any], device: str | None, spread: Spread, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """What a node gives that loads for a device and places what it has loaded, with the plan to show."""
    with loading_on(device):
        result, lines = spread(outputs(call(original, inputs)), **asked)
    return {"ui": {"text": lines}, "result": result}


def virtual_inputs(devices: Sequence[str], eject: bool) -> dict[str, Any]:
    """The inputs of virtual VRAM, with what they mean."""
    donors = list(devices)
    return {
        "virtual_vram_gb": ("FLOAT", {**_GB, "tooltip": "How many GB of the model leave the device that computes."}),
        "donor_device": (donors, {"default": allocation.CPU, "tooltip": "The device that holds them."}),
        "expert_mode_allocations": (
            "STRING",
            {"default": "", "tooltip": "As cuda:0,4gb;cpu,* or cuda:0,25%;cpu,75%; wins over the two above."},
        ),
        "eject_models": (
            "BOOLEAN",
            {"default": eject, "tooltip": "Unload the other models of this slot from the device when this one loads."},
        ),
        "high_precision_loras": (
            "BOOLEAN",
            {"default": True, "tooltip": "The image is that of the plain loader; off: less RAM, LoRAs less exact."},
        ),
    }


def call(original: type, inputs: Mapping[str, Any]) -> Any:
    """Run a node class of either kind that the host has."""
    if hasattr(original, "define_schema"):
        return original.execute(**inputs)  # type: ignore[attr-defined]
    return getattr(original(), original.FUNCTION)(**inputs)  # type: ignore[attr-defined]


def outputs(result: Any) -> tuple[Any, ...]:
    """What a node gives, without what it shows."""
    result = getattr(result, "result", result)
    return tuple(result["result"] if isinstance(result, dict) else result)


def _inputs(original: Any, added: Mapping[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = copy.copy(original.INPUT_TYPES())
    for kind in ("required", "optional"):
        inputs[kind] = {name: spec for name, spec in inputs.get(kind, {}).items() if name not in added}
    inputs["optional"] = {**inputs["optional"], **added}
    return inputs


def _node(name: str, original: Any, input_types: Any, load: Any, category: str) -> type:
    """A node class that takes what the original takes, and gives what it gives."""
    fields = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(original.RETURN_TYPES),
        "RETURN_NAMES": tuple(getattr(original, "RETURN_NAMES", None) or original.RETURN_TYPES),
        "FUNCTION": "load",
        "CATEGORY": category,
        "DESCRIPTION": getattr(original, "DESCRIPTION", "") or "",
        "load": load,
    }
    return type(name, (), fields)
