"""What tests ask about shared weights, by HTTP, and how long a model takes to and from a GPU."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.patcher_extension
from aiohttp import web
from server import PromptServer

from .caching import never_cached

GIB = 1 << 30
MEETING_S = 120


class Observing:
    """A node that runs in every job and has no outputs but what it tells."""

    CATEGORY = "comfy_parallel/test"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()


class CPTLoadTimes(Observing):
    """Loads a model onto the slot's GPU and unloads it, as ComfyUI does, and leaves it loaded. Times are seconds.

    So many jobs of different slots begin each load at the same time.
    """

    FUNCTION = "measure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        rounds, jobs = ("INT", {"default": 4}), ("INT", {"default": 1})
        return {"required": {"model": ("MODEL",), "rounds": rounds, "jobs_at_once": jobs}}

    def measure(self, model: Any, rounds: int, jobs_at_once: int) -> dict[str, Any]:
        manager = comfy.model_management
        loads, unloads = [], []
        for _ in range(1 + rounds):
            unloads.append(seconds(manager.unload_all_models))
            meeting(jobs_at_once).wait(MEETING_S)
            loads.append(seconds(lambda: manager.load_models_gpu([model])))
            meeting(jobs_at_once).wait(MEETING_S)
        found = {"bytes": model.model_size(), "load_s": loads, "unload_s": unloads[1:], **plain_copies()}
        return {"ui": {"value": [found]}}


class CPTUnloadPart(Observing):
    """Unloads half of a model from the slot's GPU, as ComfyUI does where memory is short, and hands it on."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "unload"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def unload(self, model: Any) -> dict[str, Any]:
        import torch

        manager, device = comfy.model_management, model.load_device
        manager.load_models_gpu([model])
        before, allocated, whole = content(model.model), torch.cuda.memory_allocated(device), model.loaded_size()
        others = [loaded for loaded in manager.current_loaded_models if loaded.model is not model]
        manager.free_memory(manager.get_free_memory(device) + whole // 2, device, keep_loaded=others)
        told = {
            "size": whole,
            "loaded": model.loaded_size(),
            "given_back": allocated - torch.cuda.memory_allocated(device),
            "is_unchanged": content(model.model) == before,
        }
        return {"ui": {"value": [told]}, "result": (model,)}


def content(model: Any) -> list[str]:
    """A hash of each parameter."""
    import torch

    weights = (parameter.detach().cpu().contiguous().view(-1).view(torch.uint8) for parameter in model.parameters())
    return [hashlib.sha256(weight.numpy()).hexdigest() for weight in weights]


class CPTLoadedModules(Observing):
    """What ComfyUI has set on a model's modules after each of some loads: of the model, with a LoRA, with a callback."""

    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "with_lora": ("MODEL",)}}

    def load(self, model: Any, with_lora: Any) -> dict[str, Any]:
        manager = comfy.model_management
        found, listed = [], []
        told = model.clone()
        told.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, set_an_attribute)
        for loaded in (model, model, model, with_lora, with_lora, model, model, told, told):
            manager.unload_all_models()
            with counted_lists(type(loaded), listed):
                manager.load_models_gpu([loaded])
            found.append([loaded.loaded_size(), *map(plain_attributes, loaded.model.modules())])
        return {"ui": {"modules": [found], "listed": listed}}


def set_an_attribute(patcher: Any, *_args: Any) -> None:
    for module in patcher.model.modules():
        module.loads = getattr(module, "loads", 0) + 1


@contextmanager
def counted_lists(patcher: Any, lengths: list[int]) -> Iterator[None]:
    """Note how many modules ComfyUI lists."""
    load_list = patcher._load_list

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        listed = load_list(self, *args, **kwargs)
        lengths.append(len(listed))
        return listed

    patcher._load_list = counted
    try:
        yield
    finally:
        patcher._load_list = load_list


def plain_attributes(module: Any) -> dict[str, Any]:
    """And how long its lists are."""
    values = {name: len(value) if type(value) is list else value for name, value in vars(module).items()}
    return {name: value for name, value in sorted(values.items()) if type(value) in (bool, int, float, str)}


@functools.cache
def meeting(jobs: int) -> threading.Barrier:
    return threading.Barrier(jobs)


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

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def digests() -> dict[str, list[str]]:
    """Of each weight file, hashes of the memory that the slots' models share: its content, and its conversions."""
    import torch
    from comfy_parallel.weights import loading
    from comfy_parallel.weights.files.regions import Region
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
    return web.json_response(digests() if "comfy_parallel.weights.files.store" in sys.modules else {})


class CPTOverwrite(Observing):
    """Saves over a file, as a node that saves a model does, and tells how long it was kept waiting."""

    FUNCTION = "overwrite"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"path": ("STRING",), "how": ("STRING",)}}

    def overwrite(self, path: str, how: str) -> dict[str, Any]:
        import torch
        from safetensors.torch import save_file

        writers: dict[str, Callable[[], Any]] = {
            "torch.save": lambda: torch.save({"x": torch.ones(3)}, path),
            "safetensors": lambda: save_file({"x": torch.ones(3)}, path),
            # As safetensors before 0.8 does: it keeps the interpreter while it waits.
            "native": lambda: ctypes.PyDLL(None).open(path.encode(), os.O_WRONLY | os.O_TRUNC),
        }
        return {"ui": {"value": [seconds(writers[how])]}}


@PromptServer.instance.routes.post("/test/no_memory")
async def no_memory(request: web.Request) -> web.Response:
    """From now on there is none for copies of mapped files that are overwritten."""
    from comfy_parallel.weights.files import mapping

    def fail(*_arguments: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    mapping._copy_in_place = fail
    return web.json_response({})


NODES = {node.__name__: node for node in (CPTLoadTimes, CPTLoadedModules, CPTUnloadPart, CPTOverwrite)}
