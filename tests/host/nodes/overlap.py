"""Brings jobs to the same place at the same time where they can be there together; jobs that run alone go on."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES

from __future__ import annotations

import hashlib
import threading
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths

PATIENCE_S = 15.0
ANY = type("AnyType", (str,), {"__ne__": lambda self, other: False})("*")


class CPTOverlap:
    """Passes a value on when `parties` jobs with the same key have come to each of the stages, in their order.

    Who waits in vain for longer than PATIENCE_S goes on, and so do all with this key from then on.
    """

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "wait"
    RETURN_TYPES = (ANY,)
    changed = threading.Condition()
    present: dict[tuple[str, str], int] = {}
    missed: set[str] = set()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = {"key": ("STRING", {}), "stages": ("STRING", {})}
        return {"required": {"value": (ANY, {}), **texts, "parties": ("INT", {"default": 1})}}

    def wait(self, value: Any, key: str, stages: str, parties: int) -> tuple[Any]:
        for stage in stages.split(","):
            self.meet(key, stage, parties)
        return (value,)

    @classmethod
    def meet(cls, key: str, stage: str, parties: int) -> None:
        if parties == 1:
            return
        with cls.changed:
            cls.present[key, stage] = cls.present.get((key, stage), 0) + 1
            cls.changed.notify_all()

            def all_came() -> bool:
                return cls.present[key, stage] >= parties or key in cls.missed

            if not cls.changed.wait_for(all_came, PATIENCE_S):
                cls.missed.add(key)
                cls.changed.notify_all()


class CPTDigest:
    """A hash of an image or of a latent image."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "hash"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (ANY, {})}}

    def hash(self, value: Any) -> tuple[str]:
        tensor = value["samples"] if isinstance(value, dict) else value
        return (hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest(),)


class CPTHandsOut:
    """Loads a checkpoint once for the whole process, and hands that to every job, with a LoRA of a strength."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    changed = threading.Lock()
    loaded: dict[str, Any] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = {"ckpt_name": ("STRING", {}), "lora_name": ("STRING", {}), "key": ("STRING", {})}
        return {"required": {**texts, "strength": ("FLOAT", {}), "parties": ("INT", {"default": 1})}}

    def load(self, ckpt_name: str, lora_name: str, key: str, strength: float, parties: int) -> tuple[Any, ...]:
        with self.changed:
            if ckpt_name not in self.loaded:
                path = folder_paths.get_full_path("checkpoints", ckpt_name)
                self.loaded[ckpt_name] = comfy.sd.load_checkpoint_guess_config(path)[:3]
        model, clip, vae = self.loaded[ckpt_name]
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", lora_name))
        CPTOverlap.meet(key, "loaded", parties)
        return (*comfy.sd.load_lora_for_models(model, clip, lora, strength, strength), vae)


class CPTMet:
    """Whether all jobs with this key met at every stage."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "look"
    RETURN_TYPES = ("BOOLEAN",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"key": ("STRING", {})}}

    def look(self, key: str) -> tuple[bool]:
        came = [stage for known, stage in CPTOverlap.present if known == key]
        return (bool(came) and key not in CPTOverlap.missed,)


NODES = {node.__name__: node for node in (CPTDigest, CPTHandsOut, CPTMet, CPTOverlap)}
