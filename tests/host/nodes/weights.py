"""What tests ask about shared weights, by HTTP, and how long a model takes to and from a GPU."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
from aiohttp import web
from server import PromptServer

from .caching import never_cached

GIB = 1 << 30


class CPTLoadTimes:
    """Loads a model onto the slot's GPU and unloads it, as ComfyUI does, and leaves it loaded. Times are seconds."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "measure"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "rounds": ("INT", {"default": 4})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def measure(self, model: Any, rounds: int) -> dict[str, Any]:
        manager = comfy.model_management
        manager.unload_all_models()
        loads, unloads = [seconds(lambda: manager.load_models_gpu([model]))], []
        for _ in range(rounds):
            unloads.append(seconds(manager.unload_all_models))
            loads.append(seconds(lambda: manager.load_models_gpu([model])))
        found = {"bytes": model.model_size(), "load_s": loads, "unload_s": unloads, **plain_copies()}
        return {"ui": {"value": [found]}}


def plain_copies() -> dict[str, float | None]:
    """Seconds for a plain copy of 1 GiB from pinned memory and from another GPU."""
    import torch

    device = comfy.model_management.get_torch_device()
    target = torch.empty(GIB, dtype=torch.uint8, device=device)

    def copy_from(source: Any) -> float:
        return min(seconds(lambda: target.copy_(source, non_blocking=True)) for _ in range(4))

    times = {"pinned_s_per_gib": copy_from(torch.empty(GIB, dtype=torch.uint8, pin_memory=True))}
    num_gpus = torch.cuda.device_count()
    if num_gpus == 1:
        return {**times, "peer_s_per_gib": None}
    other = torch.empty(GIB, dtype=torch.uint8, device=f"cuda:{(device.index + 1) % num_gpus}")
    return {**times, "peer_s_per_gib": copy_from(other)}


def seconds(work: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def digests() -> dict[str, list[str]]:
    """Of each weight file, hashes of the memory that the slots' models share: its content, and its conversions."""
    import torch
    from comfy_parallel.weights import loading
    from comfy_parallel.weights.memory import Region
    from comfy_parallel.weights.spans import Span

    def digest(region: Region) -> str:
        size = getattr(region, "used", region.size)
        data: Any = region.tensor(Span.contiguous(0, torch.uint8, (size,))).numpy()
        return hashlib.sha256(data).hexdigest()

    store = loading.store()
    assert store is not None
    return {file.path: [digest(region) for region in file.regions()] for file in store.files()}


@PromptServer.instance.routes.get("/test/weights")
async def weights(request: web.Request) -> web.Response:
    return web.json_response(digests() if "comfy_parallel.weights.store" in sys.modules else {})


NODES = {node.__name__: node for node in (CPTLoadTimes,)}
