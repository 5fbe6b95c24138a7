"""Has a "current context" for the job that runs, as packs that cache a model's blocks do."""

from __future__ import annotations

import contextlib
import dataclasses

import nodes


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


@dataclasses.dataclass
class Context:
    buffers: dict = dataclasses.field(default_factory=dict)


current_context = None


def get_current():
    return current_context


def set_current(context):
    global current_context
    current_context = context


@contextlib.contextmanager
def cached(context):
    global current_context
    before = current_context
    current_context = context
    try:
        yield
    finally:
        assert current_context is context
        current_context = before


class PackContext:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"text": ("STRING", {}), **keys}}

    def work(self, text, key, parties):
        assert get_current() is None
        with cached(Context()):
            get_current().buffers["text"] = text
            meet(key, "inside", parties)
            found = get_current().buffers["text"]
            meet(key, "read", parties)
        return (found,)


NODE_CLASS_MAPPINGS = {"PackContext": PackContext}
