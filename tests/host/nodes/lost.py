"""Loses a slot's device: what is asked of it fails from then on, as of a GPU that is gone."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

from typing import Any

import torch
from aiohttp import web
from server import PromptServer

from .caching import never_cached

TEXT = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"


@PromptServer.instance.routes.post("/test/lose/{slot}")
async def lose(request: web.Request) -> web.Response:
    """Rename the slot's device to one that this machine has not, so that torch's own calls fail."""
    from comfy_parallel.slots.slot import slots

    slots()[int(request.match_info["slot"])].device = "cuda:99"
    return web.Response()


def asserts() -> None:
    raise RuntimeError(TEXT)


def asserts_as_torch_does() -> None:
    raise torch.AcceleratorError(TEXT)


def hides_it() -> None:
    try:
        asserts()
    except RuntimeError as error:
        raise ValueError("sampling failed") from error


def kills_its_thread() -> None:
    try:
        asserts()
    except RuntimeError as error:
        raise SystemExit(3) from error


def one_call_only() -> None:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def runs_out() -> None:
    raise RuntimeError("CUDA error: out of memory")


def speaks_of_it() -> None:
    raise ValueError("no file 'device-side assert triggered.png'")


WAYS = {
    way.__name__: way
    for way in (asserts, asserts_as_torch_does, hides_it, kills_its_thread, one_call_only, runs_out, speaks_of_it)
}


class CPTLosesDevice:
    """Raises what torch raises when a GPU is lost, or what looks like it."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "lose"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"way": (list(WAYS),)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def lose(self, way: str) -> tuple[int]:
        WAYS[way]()
        return (0,)


class CPTAsserts:
    """Fails an assert on the slot's own GPU, as an index beyond the end does."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "lose"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def lose(self) -> tuple[int]:
        import comfy.model_management

        device = comfy.model_management.get_torch_device()
        values = torch.zeros(4, device=device)
        return (int(values[torch.tensor([1 << 20], device=device)].sum().item()),)


NODES = {node.__name__: node for node in (CPTLosesDevice, CPTAsserts)}
