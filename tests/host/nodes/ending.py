"""Nodes that note each of their runs in a file, which outlives the server, and end the server."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import comfy.model_management

if os.environ.get("CPT_EXITS_ON_USR1"):  # as one ends of which the OOM killer has taken a part: with status 137
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(128 + signal.SIGKILL))


class CPTNote:
    """Appends a line to a file, then takes a while; with `ends_server` the process ends in place of that."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "note"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        texts = {"path": ("STRING", {}), "text": ("STRING", {})}
        numbers = {"seconds": ("FLOAT", {"default": 0.0, "max": 600.0}), "ends_server": ("BOOLEAN", {"default": False})}
        return {"required": texts | numbers}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    def note(self, path: str, text: str, seconds: float, ends_server: bool) -> tuple[str]:
        with Path(path).open("a") as notes:
            notes.write(f"{text}\n")
        if ends_server:
            os._exit(99)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(min(left, 0.01))
        return (text,)


class CPTNeedsKey:
    """Shows whether it was given the key that the host keeps out of its history."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "look"
    RETURN_TYPES = ("BOOLEAN",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"default": 0})}, "hidden": {"key": "API_KEY_COMFY_ORG"}}

    def look(self, seed: int, key: str | None = None) -> tuple[bool]:
        return (key is not None,)


NODES = {node.__name__: node for node in (CPTNote, CPTNeedsKey)}
