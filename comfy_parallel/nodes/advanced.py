"""Nodes that are more than a loader with a device: a device for each part of a checkpoint, and the selector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_parallel.nodes.loaders import CATEGORY, SLOT, Devices, call, chosen, device_input, outputs
from comfy_parallel.slots.choice import loading_on

_CHECKPOINT = "CheckpointLoaderSimple"
_PARTS = ("unet_device", "clip_device", "vae_device")


def nodes(known: Mapping[str, Any], devices: Devices) -> dict[str, type]:
    """The classes, by the names that workflows use."""
    made = {"DeviceSelectorMultiGPU": _selector(devices)}
    if _CHECKPOINT in known:
        made["CheckpointLoaderAdvancedMultiGPU"] = _checkpoint(known[_CHECKPOINT], devices)
    return made


def _selector(devices: Devices) -> type:
    class DeviceSelectorMultiGPU:
        RETURN_TYPES = ("MULTIGPUDEVICE",)
        RETURN_NAMES = ("device",)
        FUNCTION = "select"
        CATEGORY = CATEGORY
        DESCRIPTION = "Names a device for other nodes."

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            return {"required": {"device": device_input(devices())}}

        def select(self, device: str) -> tuple[str]:
            return (device,)

    return DeviceSelectorMultiGPU


def _checkpoint(original: Any, devices: Devices) -> type:
    class CheckpointLoaderAdvancedMultiGPU:
        RETURN_TYPES = tuple(original.RETURN_TYPES)
        FUNCTION = "load"
        CATEGORY = CATEGORY
        DESCRIPTION = "Loads a checkpoint with a device for each of its parts. Its weights are in RAM once."

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            inputs: dict[str, Any] = original.INPUT_TYPES()
            parts = dict.fromkeys(_PARTS, device_input(devices()))
            return {"required": {**inputs["required"], **parts}}

        def load(self, ckpt_name: str, **parts: str) -> tuple[Any, ...]:
            chosen_parts = [chosen(parts.get(part, SLOT), devices()) for part in _PARTS]
            loaded: dict[str | None, tuple[Any, ...]] = {}
            for device in dict.fromkeys(chosen_parts):
                with loading_on(device):
                    loaded[device] = outputs(call(original, {"ckpt_name": ckpt_name}))
            return tuple(loaded[device][index] for index, device in enumerate(chosen_parts))

    return CheckpointLoaderAdvancedMultiGPU
