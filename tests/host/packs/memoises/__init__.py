"""Remembers what depends on more than its key: a function's results by too little, a run's on its node's class."""

from __future__ import annotations

import functools

import nodes

strengths = {}


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


@functools.lru_cache(maxsize=4)
def prepared(name):
    return f"{name} at {strengths[name]}"


class PackMemoises:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"strength": ("FLOAT", {}), **keys}}

    def work(self, strength, key, parties):
        meet(key, "before", parties)
        prepared.cache_clear()
        strengths["model"] = strength
        prepared("model")
        meet(key, "prepared", parties)
        found = prepared("model")
        meet(key, "found", parties)
        return (found,)


class PackKeepsOnClass(PackMemoises):
    last = None
    results = {}

    def work(self, strength, key, parties):
        meet(key, "before", parties)
        PackKeepsOnClass.last = strength
        self.results["strength"] = strength
        type(self).results["double"] = strength * 2
        meet(key, "kept", parties)
        found = [PackKeepsOnClass.last, self.last, self.results["strength"], self.results["double"]]
        meet(key, "found", parties)
        return (str(found),)


NODE_CLASS_MAPPINGS = {"PackMemoises": PackMemoises, "PackKeepsOnClass": PackKeepsOnClass}
