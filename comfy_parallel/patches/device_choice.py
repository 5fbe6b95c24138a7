"""Patches that let a node choose the device of the models that it loads."""

from __future__ import annotations

from comfy_parallel.patching.engine import Patch
from comfy_parallel.slots import choice

FEATURE = "device nodes"

PATCHES: tuple[Patch, ...] = tuple(
    Patch(
        target=f"comfy.model_management:{name}",
        wrap=wrap,
        why="A loader node may choose a device; the choice must not reach other slots.",
        until="the host's loaders take a device",
        feature=FEATURE,
    )
    for name, wrap in (
        ("get_torch_device", choice.instead_of),
        ("text_encoder_device", choice.instead_of),
        ("vae_device", choice.instead_of),
        ("unet_offload_device", choice.instead_of_offload),
    )
)
