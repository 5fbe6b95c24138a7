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
    steps, `nothing` only wraps the step, `sampling` lets code of this pack run in each step.
    """

    CATEGORY = CATEGORY
    FUNCTION = "meddle"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "way": (["setting", "forward", "nothing", "sampling"],)}}

    def meddle(self, model: Any, way: str) -> tuple[Any]:
        if way == "sampling":
            return (with_own_sampling(model),)
        calls = [0]
        norm = model.model.diffusion_model.out[0]

        def wrapper(apply_model: Callable[..., Any], call: dict[str, Any]) -> Any:
            calls[0] += 1
            if way == "nothing" or calls[0] % 2:
                return apply_model(call["input"], call["timestep"], **call["c"])
            return meddled(norm, way, lambda: apply_model(call["input"], call["timestep"], **call["c"]))

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


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

NODES = {node.__name__: node for node in (CPTConditioning, CPTMeddle)}
