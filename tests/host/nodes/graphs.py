"""Nodes for the tests of graph stepping, and stand-ins for graphs on CPU slots."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

CATEGORY = "comfy_parallel/test"
WAYS = ["setting", "forward", "nothing", "sampling", "evict", "evict all", "fail"]
PAGE = 32 << 20
FAKE_GRAPHS = "CPT_FAKE_GRAPHS"


class CPTConditioning:
    """What a text encoder would give, as random numbers."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = ("INT", {"default": 64, "max": 10000})
        return {"required": {"seed": ("INT", {"max": 2**62}), "tokens": size, "width": size, "pooled": size}}

    def make(self, seed: int, tokens: int, width: int, pooled: int) -> tuple[list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        encoded = torch.randn(1, tokens, width, generator=generator)
        return ([[encoded, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


class CPTMeddle:
    """Changes a setting of the model in the middle of sampling, behind the back of ComfyUI, as some packs do.

    `way`: `setting` changes a layer's attribute in every second step, `forward` replaces a layer's forward in the same
    steps, `nothing` only wraps the step, `sampling` lets code of this pack run in each step. On hosts with dynamic VRAM
    `evict` takes the memory of a page of the model away before every third step, `evict all` that of all pages, and
    `fail` lets the third step have too little memory.
    """

    CATEGORY = CATEGORY
    FUNCTION = "meddle"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "way": (WAYS,)}}

    def meddle(self, model: Any, way: str) -> tuple[Any]:
        if way == "sampling":
            return (with_own_sampling(model),)
        calls = [0]
        norm = model.model.diffusion_model.out[0]

        def wrapper(apply_model: Callable[..., Any], call: dict[str, Any]) -> Any:
            calls[0] += 1
            if way.startswith(("evict", "fail")):
                if calls[0] % 3 == 0:
                    press(model, way)
                return apply_model(call["input"], call["timestep"], **call["c"])
            if way == "nothing" or calls[0] % 2:
                return apply_model(call["input"], call["timestep"], **call["c"])
            return meddled(norm, way, lambda: apply_model(call["input"], call["timestep"], **call["c"]))

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


def press(model: Any, way: str) -> None:
    """As if memory was short."""
    if way == "fail":
        raise torch.OutOfMemoryError
    for pages in model.model.dynamic_vbars.values():
        pages.free_memory(PAGE if way == "evict" else 1e12)
        pages.prioritize()


class CPTPages:
    """Passes a latent on if no page of a loaded model is pinned, and fails otherwise."""

    CATEGORY = CATEGORY
    FUNCTION = "check"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def check(self, samples: Any) -> tuple[Any]:
        import comfy.model_management

        for loaded in list(comfy.model_management.current_loaded_models):
            for pages in getattr(loaded.model.model, "dynamic_vbars", {}).values():
                pinned = sum(1 for state in pages.get_residency() if state & 2)
                if pinned:
                    raise RuntimeError(f"{pinned} pages of {type(loaded.model.model).__name__} are pinned")
        return (samples,)


def with_own_sampling(model: Any) -> Any:
    """The same model, whose sampling is computed by a class of this pack, to the same numbers."""
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    base: Any = type(sampling)

    class OwnSampling(base):  # type: ignore[misc]
        def timestep(self, sigma: Any) -> Any:
            return super().timestep(sigma)

    sampling.__class__ = OwnSampling
    model = model.clone()
    model.add_object_patch("model_sampling", sampling)
    return model


def meddled(norm: Any, way: str, step: Callable[[], Any]) -> Any:
    eps, forward = norm.eps, norm.forward
    if way == "setting":
        norm.eps = 0.5
    else:
        norm.forward = lambda x: forward(x) * 0.5
    try:
        return step()
    finally:
        norm.eps = eps
        vars(norm).pop("forward", None)


class FakeRecording:
    """Calls the recorded forward again, on buffers of its own as a graph's are."""

    def __init__(self, forward: Callable[[list[Any]], Any], buffers: list[Any]) -> None:
        self.forward = forward
        self.buffers = buffers

    def replay(self, inputs: list[Any]) -> Any:
        for buffer, tensor in zip(self.buffers, inputs, strict=True):
            buffer.copy_(tensor)
        return self.forward(self.buffers)


class FakeRecorder:
    def __init__(self) -> None:
        self.recordings: WeakSet[FakeRecording] = WeakSet()

    @property
    def size_bytes(self) -> int:
        return len(self.recordings)

    def record(self, forward: Callable[[list[Any]], Any], buffers: list[Any]) -> FakeRecording:
        forward(buffers)
        recording = FakeRecording(forward, buffers)
        self.recordings.add(recording)
        return recording

    def wait(self) -> None:
        pass


def give_cpu_slots_fake_graphs() -> None:
    """So that tests see, without a GPU, which steps of real jobs are replayed, and on what."""
    from comfy_parallel.graphs import per_slot
    from comfy_parallel.graphs.stepper import Stepper

    per_slot._make = lambda slot: None if slot is None else Stepper(torch.device(slot.device), FakeRecorder())
    per_slot.why_off = lambda slot: None


if os.environ.get(FAKE_GRAPHS):
    give_cpu_slots_fake_graphs()

NODES = {node.__name__: node for node in (CPTConditioning, CPTMeddle, CPTPages)}
