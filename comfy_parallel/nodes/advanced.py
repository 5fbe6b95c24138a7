"""Nodes that are more than a loader with a device: a device for each part of a checkpoint, and the selector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_parallel.nodes.loaders import (
    CATEGORY,
    DEVICE,
    SLOT,
    VIRTUAL_CATEGORY,
    Devices,
    Spread,
    call,
    chosen,
    device_input,
    outputs,
    virtual_inputs,
)
from comfy_parallel.slots.choice import loading_on

_CHECKPOINT = "CheckpointLoaderSimple"
_UNET = "UNETLoader"
_PARTS = ("unet_device", "clip_device", "vae_device")
_SPREAD_PARTS = ("unet", "clip")
_EXPERT = "expert_mode_allocations"


def nodes(known: Mapping[str, Any], devices: Devices, spread: Spread) -> dict[str, type]:
    """The classes, by the names that workflows use."""
    made = {"DeviceSelectorMultiGPU": _selector(devices)}
    if _UNET in known:
        made["UNetLoaderLP"] = _low_precision(known[_UNET])
    if _CHECKPOINT in known:
        made["CheckpointLoaderAdvancedMultiGPU"] = _checkpoint(known[_CHECKPOINT], devices)
        made["CheckpointLoaderAdvancedDisTorch2MultiGPU"] = _spread_checkpoint(known[_CHECKPOINT], devices, spread)
    return made


def _selector(devices: Devices) -> type:
    class DeviceSelectorMultiGPU:
        RETURN_TYPES = (DEVICE,)
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


def _low_precision(original: Any) -> type:
    class UNetLoaderLP:
        RETURN_TYPES = tuple(original.RETURN_TYPES)
        FUNCTION = "load"
        CATEGORY = CATEGORY
        DESCRIPTION = "Loads a model whole, as UNETLoader does. LoRAs of less precision: the loader with virtual VRAM."

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            return {"required": {"unet_name": original.INPUT_TYPES()["required"]["unet_name"]}}

        def load(self, unet_name: str) -> tuple[Any, ...]:
            return outputs(call(original, {"unet_name": unet_name, "weight_dtype": "default"}))

    return UNetLoaderLP


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
            return _load_parts(original, ckpt_name, [chosen(parts.get(part, SLOT), devices()) for part in _PARTS])

    return CheckpointLoaderAdvancedMultiGPU


def _load_parts(original: Any, ckpt_name: str, parts: Sequence[str | None]) -> tuple[Any, ...]:
    """The parts of a checkpoint, each loaded for its device; the file is read once for each device."""
    loaded: dict[str | None, tuple[Any, ...]] = {}
    for device in dict.fromkeys(parts):
        with loading_on(device):
            loaded[device] = outputs(call(original, {"ckpt_name": ckpt_name}))
    return tuple(loaded[device][index] for index, device in enumerate(parts))


def _spread_checkpoint(original: Any, devices: Devices, spread: Spread) -> type:
    class CheckpointLoaderAdvancedDisTorch2MultiGPU:
        RETURN_TYPES = tuple(original.RETURN_TYPES)
        FUNCTION = "load"
        CATEGORY = VIRTUAL_CATEGORY
        DESCRIPTION = "Loads a checkpoint whose model and text encoder each live where you say."

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            required = dict(original.INPUT_TYPES()["required"])
            virtual = virtual_inputs(devices(), True)
            for part in _SPREAD_PARTS:
                required[f"{part}_compute_device"] = device_input(devices())
                for name in ("virtual_vram_gb", "donor_device"):
                    required[f"{part}_{name}"] = virtual[name]
            required["vae_device"] = device_input(devices())
            experts = {f"{part}_{_EXPERT}": virtual[_EXPERT] for part in _SPREAD_PARTS}
            switches = {name: virtual[name] for name in ("high_precision_loras", "eject_models")}
            return {"required": required, "optional": {**experts, **switches}}

        def load(
            self,
            ckpt_name: str,
            vae_device: str,
            high_precision_loras: bool = True,
            eject_models: bool = True,
            **of: Any,
        ) -> dict[str, Any]:
            compute = [of[f"{part}_compute_device"] for part in _SPREAD_PARTS]
            parts = _load_parts(original, ckpt_name, [chosen(name, devices()) for name in (*compute, vae_device)])
            placed, shown = [], []
            for part, loaded in zip(_SPREAD_PARTS, parts, strict=False):
                (model,), lines = spread(
                    (loaded,),
                    devices=devices(),
                    gigabytes=of[f"{part}_virtual_vram_gb"],
                    donors=of[f"{part}_donor_device"],
                    expert=of.get(f"{part}_{_EXPERT}", ""),
                    eject=eject_models,
                    exact=high_precision_loras,
                )
                placed.append(model)
                shown += [f"{part}:", *lines]
            return {"ui": {"text": shown}, "result": (*placed, parts[2])}

    return CheckpointLoaderAdvancedDisTorch2MultiGPU
