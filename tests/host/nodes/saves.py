"""Nodes that save files in the ways that node packs do: between asking for a number and writing, others ask."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import folder_paths
import numpy as np

from . import CATEGORY, CPTRendezvous
from .caching import never_cached

Numbers = Callable[[Any, int], Iterable[Any]]

# How a node makes the texts of a batch's numbers of the one that it was given.
WAYS: dict[str, Numbers] = {
    "add one": lambda first, count: (f"{number:05}" for number in counted(first, count)),
    "add index": lambda first, count: [f"{first + index:05}" for index in range(count)],
    "percent": lambda first, count: ["%05d" % (first + index) for index in range(count)],  # noqa: UP031
    "percent of one": lambda first, count: ["%05d" % first, *(f"{first + i:05}" for i in range(1, count))],  # noqa: UP031
    "format": lambda first, count: ["{:05d}".format(first + index) for index in range(count)],  # noqa: UP032
    "str": lambda first, count: [str(first + index).zfill(5) for index in range(count)],
    "str of int": lambda first, count: [str(int(first) + index).zfill(5) for index in range(count)],
    "f-string of int": lambda first, count: [f"{int(first) + index:05}" for index in range(count)],
    "index": lambda first, count: [f"{first.__index__() + index:05}" for index in range(count)],
    "range": lambda first, count: [f"{number:05}" for number in range(first, first + count)],
    "numpy": lambda first, count: [f"{number:05}" for number in np.int64(first) + np.arange(count)],
    "copy": lambda first, count: [f"{copy.copy(first) + index:05}" for index in range(count)],
    "pickle": lambda first, count: [f"{pickle.loads(pickle.dumps(first)) + index:05}" for index in range(count)],
    "thread": lambda first, count: in_thread(lambda: [f"{first + index:05}" for index in range(count)]),
    "int in thread": lambda first, count: in_thread(lambda: [f"{int(first) + index:05}" for index in range(count)]),
}


def counted(first: Any, count: int) -> Iterable[Any]:
    number = first
    for _ in range(count):
        yield number
        number += 1


def in_thread(work: Callable[[], list[str]]) -> list[str]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


class CPTNames:
    """Paths for a batch of files; keeps no number. All parties have theirs before any of them goes on."""

    CATEGORY = CATEGORY
    FUNCTION = "make"
    RETURN_TYPES = ("CPT_PATHS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = ("INT", {"default": 1, "min": 1})
        texts = {"prefix": ("STRING", {}), "key": ("STRING", {})}
        return {"required": {"way": (list(WAYS),), "count": count, "parties": count, **texts}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def make(self, way: str, count: int, parties: int, prefix: str, key: str) -> tuple[list[str]]:
        if parties > 1:
            CPTRendezvous().meet(f"{key} before", parties, 60.0)
        folder, name, number, _subfolder, _ = folder_paths.get_save_image_path(prefix, self.directory())
        paths = [os.path.join(folder, f"{name}_{text}_.txt") for text in WAYS[way](number, count)]
        del number
        if parties > 1:
            CPTRendezvous().meet(f"{key} after", parties, 60.0)
        return (paths,)

    def directory(self) -> str:
        path: str = folder_paths.get_output_directory()
        return path


class CPTWrite:
    """Writes a text to each path, and to as many files beside it as are named; never where a file is.

    `how`: at once, or in a thread, which the node waits for.
    """

    CATEGORY = CATEGORY
    FUNCTION = "write"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = {"text": ("STRING", {}), "beside": ("STRING", {"default": ""})}
        return {"required": {"paths": ("CPT_PATHS", {}), "how": (["at once", "in a thread"],), **texts}}

    def write(self, paths: list[str], how: str, text: str, beside: str) -> dict[str, Any]:
        work = [path.replace(".txt", ending) for path in paths for ending in (".txt", *beside.split())]
        errors: list[Exception] = []

        def run() -> None:
            for path in work:
                try:
                    with open(path, "x", encoding="utf-8") as file:
                        file.write(text)
                except OSError as error:
                    errors.append(error)

        if how == "at once":
            run()
        else:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        if errors:
            raise errors[0]
        return {"ui": {"files": [os.path.basename(path) for path in paths]}}


NODES = {node.__name__: node for node in (CPTNames, CPTWrite)}
