"""Nodes that observe, from inside a job, what a slot does to the GPUs. Sizes are bytes."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import gc
import hashlib
import json
import time
from typing import Any

import torch

from .caching import never_cached

CATEGORY = "comfy_parallel/test"


def held_per_device() -> list[int]:
    return [torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count())]


class CPTCudaRandom:
    """Seeds once, draws on the slot's own GPU in turns with others, returns a hash of the draws."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"max": 2**62}), "rounds": ("INT", {"default": 200})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def draw(self, seed: int, rounds: int) -> tuple[str]:
        torch.manual_seed(seed)
        digest = hashlib.sha256()
        for _ in range(rounds):
            x = torch.randn(4, device="cuda")
            draws = (x, torch.rand(4, device="cuda"), torch.randn_like(x), torch.empty(4, device="cuda").normal_())
            digest.update(torch.cat(draws).cpu().numpy().tobytes())
            time.sleep(0)
        return (digest.hexdigest(),)


class CPTCudaCache:
    """Fills torch's cache of the own GPU with `mib` MiB, so that memory is held but free."""

    CATEGORY = CATEGORY
    FUNCTION = "fill"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"mib": ("INT", {"default": 512, "max": 100000})}, "optional": {"after": ("*",)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def fill(self, mib: int, after: Any = None) -> tuple[int]:
        block = torch.zeros(mib << 20, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        del block
        gc.collect()
        return (torch.cuda.memory_reserved(),)


class CPTEmptyCache:
    """Empties torch's cache as nodes do; shows what every GPU held before and after."""

    CATEGORY = CATEGORY
    FUNCTION = "empty"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"after": ("INT", {"forceInput": True})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def empty(self, after: int) -> tuple[str]:
        before = held_per_device()
        torch.cuda.empty_cache()
        seen = {"own": torch.cuda.current_device(), "before": before, "after": held_per_device()}
        return (json.dumps(seen),)


class CPTCudaOutOfMemory:
    """Asks for more memory than any GPU has."""

    CATEGORY = CATEGORY
    FUNCTION = "ask"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return never_cached()

    def ask(self) -> tuple[int]:
        return (int(torch.empty(1 << 50, dtype=torch.uint8, device="cuda").numel()),)


NODES = {node.__name__: node for node in (CPTCudaRandom, CPTCudaCache, CPTEmptyCache, CPTCudaOutOfMemory)}
