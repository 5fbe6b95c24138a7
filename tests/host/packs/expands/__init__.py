"""Nodes that are unsafe beside others, and one that makes such nodes while it runs."""

from __future__ import annotations

import threading
import time

import torch
from comfy_execution.graph_utils import GraphBuilder

inside = threading.Semaphore(1)


class PackSwitches:
    """Flips a switch of torch for a while; says whether no other one was doing so."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("BOOLEAN",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0})}}

    def work(self, number):
        was_alone = inside.acquire(blocking=False)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        time.sleep(0.3)
        torch.set_float32_matmul_precision(before)
        if was_alone:
            inside.release()
        return (was_alone,)


class PackExpands:
    """Does nothing unsafe itself, but makes nodes that do: `deep` makes another one of its kind first."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("BOOLEAN",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"default": 0}), "deep": ("BOOLEAN", {"default": False})}}

    def work(self, number, deep):
        graph = GraphBuilder()
        made = graph.node("PackExpands", number=number, deep=False) if deep else graph.node("PackSwitches", number=number)
        return {"result": (made.out(0),), "expand": graph.finalize()}


NODE_CLASS_MAPPINGS = {"PackSwitches": PackSwitches, "PackExpands": PackExpands}
