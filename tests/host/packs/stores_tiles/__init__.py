"""Keeps an image of the running job in a module's global, in another module and on a class, as tiled upscalers do."""

from __future__ import annotations

import nodes
import torch

from . import shared

batch = None


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


class Script:
    tiles = []
    size = None


def put(images):
    global batch
    batch = images
    shared.batch = images
    shared.upscalers[0] = images
    shared.options.images = images
    Script.tiles = [images]
    Script.size = images.shape


class PackStoresTiles:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"

    @classmethod
    def INPUT_TYPES(cls):
        stores = ["global", "module", "list", "object", "class"]
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"image": ("IMAGE",), "store": (stores, {}), **keys}}

    def upscale(self, image, store, key, parties):
        meet(key, "before", parties)
        put(image)
        meet(key, "stored", parties)
        found = {
            "global": lambda: batch,
            "module": lambda: shared.batch,
            "list": lambda: shared.upscalers[0],
            "object": lambda: shared.options.images,
            "class": lambda: Script.tiles[0].reshape(Script.size),
        }[store]()
        return (torch.nn.functional.interpolate(found.movedim(-1, 1), scale_factor=2.0).movedim(1, -1),)


NODE_CLASS_MAPPINGS = {"PackStoresTiles": PackStoresTiles}
