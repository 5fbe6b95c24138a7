"""Node classes that load on a device of one's choice, made from the host's own loader classes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import allocation
from comfy_parallel.nodes.table import Loader
from comfy_parallel.slots.choice import loading_on

SLOT = allocation.SLOT
CATEGORY = "multigpu"
DEVICE = "MULTIGPUDEVICE"  # the type of a device's name between nodes
VIRTUAL_CATEGORY = "multigpu/distorch_2"
_DEVICE_TIP = "Where this model lives and computes. slot: on the device of the slot that runs the job."
_WAIT_TIP = "Where the weights wait that are not needed now."
_ON_A_DEVICE = "Loads as the plain loader does, on the device that you choose; other slots do not see the choice."
_SPREAD = "Loads as the plain loader does; a part of the weights lives on another device. The image stays the same."
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
        instead_of = row.own[0] if row.own else ""
        return _inputs(original, _device_inputs(row, devices()), instead_of=instead_of, early=row.early)

    def load(self: Any, **inputs: Any) -> Any:
        name = inputs.pop(row.device, SLOT) if row.device else SLOT
        device = chosen(SLOT if name is None else name, devices())
        offload = inputs.pop(row.offload, None) if row.offload else swap_device(inputs) if row.swaps else None
        noted = {row.noted: inputs.pop(row.noted, allocation.CPU)} if row.noted else {}
        if row.own is not None and row.own[0] in _names(original):
            inputs[row.own[0]] = row.own[2 if device == allocation.CPU else 1]
        with loading_on(device, offload), _named_in_module(original, device, offload):
            result = call(original, inputs)
        if noted:
            return ({**outputs(result)[0], **noted}, *outputs(result)[1:])
        return (*outputs(result), name) if row.gives else result

    node = _node(f"{row.name}MultiGPU", original, input_types, load, CATEGORY, _ON_A_DEVICE)
    if row.gives:
        types: Any = node
        types.RETURN_TYPES, types.RETURN_NAMES = (*types.RETURN_TYPES, DEVICE), (*types.RETURN_NAMES, row.device)
    return node


def _device_inputs(row: Loader, devices: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if row.device:
        made[row.device] = (DEVICE, {"tooltip": _DEVICE_TIP}) if row.is_link else device_input(devices)
    for name in filter(None, (row.offload, row.noted)):
        made[name] = (list(devices), {"default": allocation.CPU, "tooltip": _WAIT_TIP})
    return made


def swap_device(inputs: Mapping[str, Any]) -> str | None:
    """Where the blocks of a model wait, as the node that swaps them has noted it with the model; None if it has not."""
    options = getattr(inputs.get("model"), "model_options", {}).get("transformer_options", {})
    found = (options.get("block_swap_args") or {}).get("swap_device")
    return None if found is None else str(found)


@contextmanager
def _named_in_module(original: type, device: str | None, offload: str | None) -> Iterator[None]:
    """Packs that choose a device when they are imported keep it by these names, of which each slot has its own."""
    module = sys.modules.get(original.__module__)
    names = {"device": device, "offload_device": offload}
    before = {name: vars(module).get(name) for name, value in names.items() if module is not None and value is not None}
    before = {name: getattr(module, name) for name, value in before.items() if type(value).__name__ == "device"}
    try:
        for name, value in before.items():
            kind: Any = type(value)
            setattr(module, name, kind(names[name]))
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


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

    return _node(f"{row.name}DisTorch2MultiGPU", original, input_types, load, VIRTUAL_CATEGORY, _SPREAD)


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

    return _node(f"{row.name}DisTorchMultiGPU", original, input_types, load, f"{CATEGORY}/legacy", _SPREAD)


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


def _inputs(original: Any, added: Mapping[str, Any], *, instead_of: str = "", early: bool = False) -> dict[str, Any]:
    """The original's inputs and others. A workflow keeps the values of widgets by their order.

    Args:
        instead_of: the input whose place the first of them takes.
        early: they come before the optional ones, else last.
    """
    inputs: dict[str, Any] = copy.copy(original.INPUT_TYPES())
    left = dict(added)
    for kind in ("required", "optional"):
        kept: dict[str, Any] = {}
        for name, spec in inputs.get(kind, {}).items():
            if name == instead_of:
                first = next(iter(left))
                kept[first] = left.pop(first)
            elif name not in added:
                kept[name] = spec
        inputs[kind] = kept
    inputs["required" if early else "optional"] |= left
    return inputs


def _names(original: Any) -> set[str]:
    inputs = original.INPUT_TYPES()
    return {name for kind in ("required", "optional") for name in inputs.get(kind, {})}


def _node(name: str, original: Any, input_types: Any, load: Any, category: str, does: str) -> type:
    """A node class that takes what the original takes, and gives what it gives; `does` says what it does besides."""
    fields = {
        "INPUT_TYPES": classmethod(input_types),
        "RETURN_TYPES": tuple(original.RETURN_TYPES),
        "RETURN_NAMES": tuple(getattr(original, "RETURN_NAMES", None) or original.RETURN_TYPES),
        "FUNCTION": "load",
        "CATEGORY": category,
        "DESCRIPTION": " ".join(filter(None, [getattr(original, "DESCRIPTION", None), does])),
        "load": load,
    }
    return type(name, (), fields)
