"""Runs out of memory as often as it is told to, fails on some slots, and counts how often nodes ran."""

from __future__ import annotations

from collections import Counter
from typing import Any

import comfy.model_management
import nodes
import torch

KINDS = {
    "torch": lambda: torch.OutOfMemoryError("out of memory, by test"),
    "host": lambda: comfy.model_management.OOM_EXCEPTION("out of memory, by test"),
    "python": lambda: MemoryError("out of memory, by test"),
}
ANY = type("AnyType", (str,), {"__ne__": lambda self, other: False})("*")
runs: Counter[str] = Counter()


class CPTRunsOut:
    """The first `times` calls with this key run out of memory; shows how often it was called."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "work"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {"key": ("STRING", {}), "times": ("INT", {}), "kind": (list(KINDS),), "interrupts": ("BOOLEAN", {})}
        return {"required": required, "optional": {"after": (ANY, {})}}

    def work(self, key: str, times: int, kind: str, interrupts: bool, after: Any = None) -> tuple[int]:
        runs[key] += 1
        if interrupts:
            nodes.interrupt_processing()
        if runs[key] <= times:
            raise KINDS[kind]()
        return (runs[key],)


class CPTCounts:
    """Shows how often it ran with this key."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "count"
    RETURN_TYPES = ("INT",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"key": ("STRING", {})}}

    def count(self, key: str) -> dict[str, Any]:
        runs[f"{key} counted"] += 1
        return {"ui": {"count": [runs[f"{key} counted"]]}, "result": (runs[f"{key} counted"],)}


class CPTBreaks:
    """Fails at once on these slots, as one whose device is broken does."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "work"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"slots": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    def work(self, slots: str) -> tuple[int]:
        from comfy_parallel.slots.slot import current_slot

        slot = current_slot()
        if slot is not None and str(slot.index) in slots:
            raise RuntimeError("the device is broken, by test")
        return (1,)


NODES = {node.__name__: node for node in (CPTBreaks, CPTCounts, CPTRunsOut)}
