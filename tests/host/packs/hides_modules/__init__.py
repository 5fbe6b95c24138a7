"""Imports a file of its own from where the pack really lies, keeps the running job's image there, and takes the module out
of `sys.modules`, so that other packs may have one of that name, as packs with foreign scripts in them do."""

from __future__ import annotations

import os
import sys

import nodes

PARTS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "parts")
sys.path.insert(0, PARTS)
import shared_parts  # noqa: E402 - found there

sys.path.remove(PARTS)
del sys.modules["shared_parts"]


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


class PackHidesModules:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"image": ("IMAGE",), **keys}}

    def work(self, image, key, parties):
        meet(key, "before", parties)
        shared_parts.batch = image
        meet(key, "stored", parties)
        found = shared_parts.process()
        meet(key, "found", parties)
        return (found,)


NODE_CLASS_MAPPINGS = {"PackHidesModules": PackHidesModules}
