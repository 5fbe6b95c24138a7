"""Registers the running job under one key, as batch managers do; the job's next node looks there."""

from __future__ import annotations

import nodes

running = {}
frames = iter(())
count = 0


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


class State:
    pass


state = State()


class PackBegins:
    """Starts a batch: an entry in the registry, a generator, a counter and the attributes of an object."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("BATCH",)
    FUNCTION = "begin"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"start": ("INT", {"max": 1 << 40}), **keys}}

    def begin(self, start, key, parties):
        global frames, count
        meet(key, "before", parties)
        running["batch"] = {"start": start, "taken": []}
        frames = (start + number for number in range(100))
        count = start
        state.start = start
        state.taken = []
        meet(key, "begun", parties)
        return ("batch",)


class PackTakes:
    """Takes the next of each."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "take"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        kinds = ["registry", "generator", "counter", "object"]
        return {"required": {"batch": ("BATCH",), "times": ("INT", {"default": 3}), "kind": (kinds, {}), **keys}}

    def take(self, batch, times, kind, key, parties):
        global count
        for number in range(times):
            running[batch]["taken"].append(next(frames))
            state.taken.append(state.start + number)
            count += 1
            meet(key, f"taken {number}", parties)
        entry = running[batch]
        kinds = {"registry": entry, "generator": entry["taken"], "counter": count, "object": vars(state)}
        found = str(kinds[kind])
        meet(key, "read", parties)
        running.pop(batch, None)
        return (found,)


NODE_CLASS_MAPPINGS = {"PackBegins": PackBegins, "PackTakes": PackTakes}
