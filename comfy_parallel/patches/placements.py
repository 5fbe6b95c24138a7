"""Patches for models that are placed on several devices: what others of the slot or of the donor make room for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_parallel.nodes import donors
from comfy_parallel.nodes.placed import placement_of
from comfy_parallel.patches.device_choice import FEATURE
from comfy_parallel.patching.engine import Patch

_ALL = 1e30  # bytes
_UNTIL = "the host places models on several devices"


def _ejecting(original: Callable[..., Any], free_memory: Callable[..., Any], loaded_models: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_models_gpu(models: Any, *args: Any, **kwargs: Any) -> Any:
        models = list(models)
        for patcher in models:
            if _is_to_eject(patcher, loaded_models):
                used = [loaded for loaded in loaded_models if any(loaded.model is one for one in models)]
                free_memory(_ALL, patcher.load_device, used)
        return original(models, *args, **kwargs)

    return load_models_gpu


def _is_to_eject(patcher: Any, loaded_models: Any) -> bool:
    """Whether it is about to be loaded, and asks for the others of its slot to leave the device."""
    placement = placement_of(patcher)
    if placement is None or not placement.eject or patcher.load_device.type == "cpu":
        return False
    return all(getattr(loaded.model, "model", None) is not patcher.model for loaded in loaded_models)


def _counting(original: Callable[..., Any], get_torch_device: Callable[[], Any]) -> Callable[..., Any]:
    return functools.wraps(original)(donors.counting(original, functools.partial(_name, get_torch_device)))


def _yielding(original: Callable[..., Any], get_free_memory: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(original)(donors.yielding(original, get_free_memory, str))


def _name(get_torch_device: Callable[[], Any], device: Any) -> str:
    return str(get_torch_device() if device is None else device)


PATCHES: tuple[Patch, ...] = (
    Patch(
        target="comfy.model_management:load_models_gpu",
        wrap=_ejecting,
        needs=("free_memory", "current_loaded_models"),  # as it is before the patch below: a donor's guests stay
        params=("models",),
        why="A placed model may be asked to have the device for itself.",
        until=_UNTIL,
        feature=FEATURE,
    ),
    Patch(
        target="comfy.model_management:get_free_memory",
        wrap=_counting,
        needs=("get_torch_device",),
        params=("dev", "torch_free_too"),
        why="Memory that is promised to another slot's model is not free.",
        until=_UNTIL,
        feature=FEATURE,
    ),
    Patch(
        target="comfy.model_management:free_memory",
        wrap=_yielding,
        needs=("get_free_memory",),
        params=("memory_required", "device"),
        why="What a device lends to another slot's model goes before a model of its own slot does.",
        until=_UNTIL,
        feature=FEATURE,
    ),
)
