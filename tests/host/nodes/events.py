"""Sends many events, or such as nobody can send, and shows what is no JSON."""

from __future__ import annotations

import time
from typing import Any

import torch
from comfy.utils import ProgressBar
from PIL import Image
from server import PromptServer

from .caching import never_cached


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


NO_JSON = {
    "bytes": lambda: b"bytes",
    "tensor": lambda: torch.zeros(2),
    "set": lambda: {1, 2},
    "class": lambda: ProgressBar,
    "endless": endless,
    "deep": deep,
    "key": lambda: {(1, 2): 3},
}
HOW = ("ui", "event", "own_executed", "progress", "binary", "preview", "route")


class CPTNoJson:
    """Shows, or sends, what is no JSON, or no event at all."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "show"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(NO_JSON),), "how": (HOW,)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def show(self, kind: str, how: str) -> dict[str, Any]:
        server, value = PromptServer.instance, NO_JSON[kind]()
        if how == "ui":
            return {"ui": {"value": [value]}}
        if how == "event":
            server.send_sync("cpt.event", {"value": value})
        elif how == "own_executed":
            server.send_sync("executed", {"node": "n", "output": {"value": value}}, server.client_id)
        elif how == "progress":
            ProgressBar(2).update_absolute(torch.tensor(1), 2)
        elif how == "binary":
            server.send_sync("cpt.binary", b"events with bytes have numbers", server.client_id)
        elif how == "preview":
            ProgressBar(2).update_absolute(1, 2, ("JPEG", Image.new("RGBA", (8, 8)), 8))
        else:
            server.loop.call_soon_threadsafe(server.send_sync, "cpt.event", {"value": value})
        return {"ui": {"value": ["shown"]}}


class CPTEvents:
    """Sends `count` events of about `size` bytes to its client, as previews or as JSON."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "send"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        number = ("INT", {"default": 1, "max": 100_000_000})
        return {"required": {"count": number, "size": number, "kind": (["json", "preview"],)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def send(self, count: int, size: int, kind: str) -> tuple[int]:
        server = PromptServer.instance
        for number in range(count):
            if kind == "json":
                server.send_sync("cpt.event", {"number": number, "value": "x" * size}, server.client_id)
            else:
                server.send_sync(1, b"x" * size, server.client_id)
            if number % 100 == 99:
                time.sleep(0.001)
        return (count,)


class CPTTellTimes:
    """Tells its client the time, again and again."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "tell"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"times": ("INT", {"max": 100000})}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def tell(self, times: int) -> tuple[int]:
        server = PromptServer.instance
        for _ in range(times):
            time.sleep(0.005)
            server.send_sync("time", {"at": time.time()}, server.client_id)
        return (times,)


NODES = {node.__name__: node for node in (CPTEvents, CPTNoJson, CPTTellTimes)}
