"""Puts something in the place of the host's and Python's own by what Python has for that, and takes it away again."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import sys
from unittest import mock

import comfy.utils
import nodes


def meet(key, stage, parties):
    nodes.NODE_CLASS_MAPPINGS["CPTOverlap"].meet(key, stage, parties)


def own(text):
    return lambda *args, **kwargs: text


class Stream(io.StringIO):
    def __init__(self, text):
        super().__init__()
        self.text = text


@contextlib.contextmanager
def by_partial(text):
    original = comfy.utils.bislerp
    put = functools.partial(setattr, comfy.utils, "bislerp")
    put(own(text))
    yield
    put(original)


@contextlib.contextmanager
def of_python(text):
    original, random.random = random.random, own(text)
    yield
    random.random = original


@contextlib.contextmanager
def by_assignment(text):
    original, sys.stdout = sys.stdout, Stream(text)
    yield
    sys.stdout = original


WAYS = {
    "mock": lambda text: mock.patch("comfy.utils.bislerp", own(text)),
    "mock of an object": lambda text: mock.patch.object(comfy.utils, "bislerp", own(text)),
    "partial": by_partial,
    "of Python": of_python,
    "redirect": lambda text: contextlib.redirect_stdout(Stream(text)),
    "stream": by_assignment,
}


def seen(way):
    if way in ("redirect", "stream"):
        return getattr(sys.stdout, "text", "the host's")
    found = random.random if way == "of Python" else comfy.utils.bislerp
    return found() if found.__name__ == "<lambda>" else "the host's"


class PackPatchesByTools:
    """The second puts its own there when the first has, and takes it away when the first has."""

    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "work"

    @classmethod
    def INPUT_TYPES(cls):
        keys = {"key": ("STRING", {"default": ""}), "parties": ("INT", {"default": 1})}
        return {"required": {"way": (list(WAYS), {}), "text": ("STRING", {}), **keys}}

    def work(self, way, text, key, parties):
        patch = WAYS[way](text)
        if text == "second":
            meet(key, "first has", parties)
        patch.__enter__()
        if text == "first":
            meet(key, "first has", parties)
        meet(key, "both have", parties)
        during = seen(way)
        meet(key, "both saw", parties)
        if text == "second":
            meet(key, "first took away", parties)
        patch.__exit__(None, None, None)
        if text == "first":
            meet(key, "first took away", parties)
        return (f"{during}, then {seen(way)}",)


class PackSees:
    CATEGORY = "comfy_parallel/test packs"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "look"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"way": (list(WAYS), {})}}

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return float("nan")

    def look(self, way):
        return (seen(way),)


NODE_CLASS_MAPPINGS = {"PackPatchesByTools": PackPatchesByTools, "PackSees": PackSees}
