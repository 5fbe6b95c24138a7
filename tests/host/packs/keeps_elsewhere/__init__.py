"""Keeps what belongs to a job where no global name of the pack's is written to."""

from __future__ import annotations

import functools

import nodes
import torch


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


def in_default(value=None, kept={}):
    if value is not None:
        kept["value"] = value
    return kept["value"]


def in_closure():
    last = None

    def put(value):
        nonlocal last
        last = value

    return put, lambda: last


def memo(function):
    kept = {}

    def remembering(name, value):
        if name not in kept:
            kept[name] = function(name, value)
        return kept[name]

    remembering.forget = kept.clear
    return remembering


@memo
def remembered(name, value):
    return f"{name} {value}"


class Settings:
    def __init__(self):
        self.value = None


class Writer:
    def fill(self, target, value):
        target.value = value


def write(where, value):
    where["value"] = value


put_in_closure, get_from_closure = in_closure()
given_out = Settings()
passed_on = Settings()
in_partial = {"value": None}
put_in_partial = functools.partial(write, in_partial)
buffer = torch.zeros(2)
first, second = {"value": 0}, {"value": 0}
source = None
loaded = functools.lru_cache(maxsize=2)(lambda name: f"{name} {source}")


def settings():
    return given_out


def put(value):
    global source
    in_default(value)
    put_in_closure(value)
    remembered.forget()
    remembered("value", value)
    settings().value = value
    Writer().fill(passed_on, value)
    put_in_partial(value)
    buffer.fill_(value)
    for store in (first, second):
        store["value"] = value
    loaded.cache_clear()
    source = value
    loaded("value")


def get():
    return {
        "default": in_default(),
        "closure": get_from_closure(),
        "memo": remembered("value", None),
        "returned": settings().value,
        "passed on": passed_on.value,
        "partial": in_partial["value"],
        "tensor": buffer.sum().item(),
        "loop": first["value"] + second["value"],
        "wrapped": loaded("value"),
    }


class PackKeepsElsewhere:
    """What each of these places holds when another job has put its value there as well."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"value": ("INT", {}), **keys}}

    def work(self, value, key, parties):
        meet(key, "before", parties)
        put(value)
        meet(key, "put", parties)
        found = get()
        meet(key, "found", parties)
        return (str(found),)


NODE_CLASS_MAPPINGS = {"PackKeepsElsewhere": PackKeepsElsewhere}
