"""Nodes that keep a model partly out of the GPU as the host itself would, for comparisons with ours."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management

CATEGORY = "comfy_parallel/test"


class CPTHostOffload:
    """The model with `percent` of its weights offloaded by the host's own means: lowvram, or dynamic VRAM."""

    CATEGORY = CATEGORY
    FUNCTION = "limit"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "percent": ("FLOAT", {"min": 0.0, "max": 100.0})}}

    def limit(self, model: Any, percent: float) -> tuple[Any]:
        model = model.clone()
        stays = int(model.model_size() * (100 - percent) / 100)
        is_dynamic = getattr(model, "is_dynamic", lambda: False)()
        model.load = limited_pages(model, stays) if is_dynamic else limited_weights(model, stays)
        return (model,)


def limited_weights(model: Any, stays: int) -> Callable[..., None]:
    """As on a card with room for so many bytes of weights, and for the buffers that the host reserves."""
    load = model.load
    largest = max(map(comfy.model_management.module_size, leaves(model.model)))
    room = stays + largest * (comfy.model_management.NUM_STREAMS + 1)

    def load_limited(
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        load(device_to, room, force_patch_weights, False)

    return load_limited


def limited_pages(model: Any, stays: int) -> Callable[..., None]:
    """With pages of VRAM for so many bytes only."""
    load = model.load

    def load_limited(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        model._vbar_get().set_watermark(stays)

    return load_limited


def leaves(model: Any) -> list[Any]:
    return [module for module in model.modules() if not module._modules]


NODES = {"CPTHostOffload": CPTHostOffload}
