"""Flips settings of the host and of torch while its job runs."""

from __future__ import annotations

import comfy.cli_args
import nodes
import torch


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


def settings():
    return [
        bool(comfy.cli_args.args.force_channels_last),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.allow_tf32 if hasattr(torch.backends.mkldnn, "allow_tf32") else None,
        torch.backends.cuda.matmul.allow_fp16_accumulation,
    ]


class PackFlips:
    """`on` flips the settings until all are done; everybody says what it saw meanwhile."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        kinds = ["args", "precision", "accumulation"]
        return {"required": {"kind": (kinds, {}), "on": ("BOOLEAN", {"default": False}), **keys}}

    def work(self, kind, on, key, parties):
        before = settings()
        meet(key, "before", parties)
        if on and kind == "args":
            comfy.cli_args.args.force_channels_last = True
        if on and kind == "precision":
            torch.set_float32_matmul_precision("medium")
        if on and kind == "accumulation":
            torch.backends.cuda.matmul.allow_fp16_accumulation = True
        meet(key, "flipped", parties)
        during = settings()
        meet(key, "seen", parties)
        if on:
            comfy.cli_args.args.force_channels_last = before[0]
            torch.set_float32_matmul_precision(before[1])
            torch.backends.cuda.matmul.allow_fp16_accumulation = before[3]
        return (str([before, during, settings()]),)


NODE_CLASS_MAPPINGS = {"PackFlips": PackFlips}
