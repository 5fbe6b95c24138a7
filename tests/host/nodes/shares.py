"""A node that a participant of a shared job runs: it tells its seed and slot, and can fail, end its worker or wait."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES

from __future__ import annotations

import os
import threading
import time
from typing import Any

import comfy.model_management
import comfy.utils

PATIENCE_S = 60.0
HOWS = ("plain", "fail once", "fail twice", "kill once", "fail", "hold")


class CPTShare:
    """Tells "seed@slot" when `parties` shares with the same key run at once. The one with the seed `bad` acts as
    `how` says."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)
    changed = threading.Condition()
    present: dict[str, set[int]] = {}
    done: dict[str, int] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        numbers = {name: ("INT", {"default": default, "min": -1, "max": 2**40}) for name, default in DEFAULTS.items()}
        return {"required": {"key": ("STRING", {}), "how": (list(HOWS),), **numbers}}

    def tell(self, key: str, how: str, seed: int, bad: int, parties: int) -> tuple[str]:
        from comfy_parallel.slots.slot import current_index

        self.meet(key, seed, parties)
        comfy.utils.ProgressBar(1).update(1)
        if seed == bad:
            self.misbehave(key, how)
        return (f"{seed}@{current_index()}",)

    def meet(self, key: str, seed: int, parties: int) -> None:
        with self.changed:
            self.present.setdefault(key, set()).add(seed)
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: len(self.present[key]) >= parties, PATIENCE_S):
                raise RuntimeError(f"only {sorted(self.present[key])} came")

    def misbehave(self, key: str, how: str) -> None:
        self.done[key] = self.done.get(key, 0) + 1
        is_first = self.done[key] == 1
        if how == "fail" or (how == "fail once" and is_first) or (how == "fail twice" and self.done[key] < 3):
            raise RuntimeError("failed by test")
        if how == "kill once" and is_first:
            raise SystemExit("killed by test")
        end = time.monotonic() + PATIENCE_S
        while how == "hold" and time.monotonic() < end:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)


class CPTSlow:
    """Tells "value@process" after a while, and its progress before."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "work"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seconds = ("FLOAT", {"default": 1.0, "max": 600.0})
        return {"required": {"value": ("INT", {"max": 2**40}), "seconds": seconds, "salt": ("STRING", {})}}

    def work(self, value: int, seconds: float, salt: str) -> tuple[str]:
        comfy.utils.ProgressBar(1).update(1)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(min(left, 0.01))
        return (f"{value}@{os.getpid()}",)


class CPTList:
    """Two values in turn, `count` in all, as a list."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "make"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"first": ("IMAGE",), "second": ("IMAGE",), "count": ("INT", {"default": 2})}}

    def make(self, first: Any, second: Any, count: int) -> tuple[list[Any]]:
        return ([(first, second)[index % 2] for index in range(count)],)


class CPTMet:
    """Passes an image on once `parties` slots work on images with the same key."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "work"
    RETURN_TYPES = ("IMAGE",)
    slots: dict[str, set[Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "key": ("STRING", {}), "parties": ("INT", {"default": 1})}}

    def work(self, images: Any, key: str, parties: int) -> tuple[Any]:
        from comfy_parallel.slots.slot import current_index

        with CPTShare.changed:
            self.slots.setdefault(key, set()).add(current_index())
            CPTShare.changed.notify_all()
            if not CPTShare.changed.wait_for(lambda: len(self.slots[key]) >= parties, PATIENCE_S):
                raise RuntimeError(f"only slots {sorted(self.slots[key])} came")
        return (images,)


class CPTSome:
    """Passes images on, and cannot do without one, as most nodes."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "work"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",), "salt": ("STRING", {})}}

    def work(self, images: Any, salt: str) -> tuple[Any]:
        if not images.shape[0]:
            raise ValueError("no images")
        return (images,)


DEFAULTS = {"seed": 0, "bad": -1, "parties": 1}
NODES = {node.__name__: node for node in (CPTShare, CPTSlow, CPTList, CPTMet, CPTSome)}
