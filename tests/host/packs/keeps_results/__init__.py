"""Registers a cache provider that notes which job runs; nothing where the host has no such thing."""

from __future__ import annotations

import nodes

try:
    from comfy_execution.cache_provider import register_cache_provider
    from comfy_execution.utils import get_executing_context
    from comfy_api.latest._caching import CacheProvider
except ImportError:
    CacheProvider = object


class Notes(CacheProvider):
    def __init__(self):
        self.running = None
        self.stored = {}

    def on_prompt_start(self, prompt_id):
        self.running = prompt_id

    async def on_lookup(self, context):
        return None

    async def on_store(self, context, value):
        self.stored[context.cache_key_hash] = self.running


notes = Notes()


class PackTellsJob:
    """Whether the provider knows, while another job runs, that this one does."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("BOOLEAN",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"number": ("INT", {"default": 0}), **keys}}

    def work(self, number, key, parties):
        nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, "running", parties)
        return (notes.running == get_executing_context().prompt_id,)


NODE_CLASS_MAPPINGS = {}
if CacheProvider is not object:
    register_cache_provider(notes)
    NODE_CLASS_MAPPINGS["PackTellsJob"] = PackTellsJob
