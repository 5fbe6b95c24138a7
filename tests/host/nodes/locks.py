"""Takes the queue's lock, as node packs do that look at the queue, and does not give it back in time."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import asyncio
import time
from typing import Any

from server import PromptServer

from .caching import never_cached

KINDS = ("holds", "leaves", "loop")


def wait_until_interrupted() -> None:
    import comfy.model_management

    while True:
        comfy.model_management.throw_exception_if_processing_interrupted()
        time.sleep(0.05)


async def look_at_queue() -> int:
    return int(PromptServer.instance.prompt_queue.get_tasks_remaining())


class CPTLock:
    """Takes `prompt_queue.mutex`, then: `holds` it until interrupted, `leaves` it taken at its end, `loop` waits for the
    server, which waits for the lock."""

    CATEGORY = "comfy_parallel/test"
    FUNCTION = "lock"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(KINDS),)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return never_cached()

    def lock(self, kind: str) -> tuple[int]:
        queue = PromptServer.instance.prompt_queue
        if kind == "leaves":
            queue.mutex.acquire()
            return (1,)
        with queue.mutex:
            if kind == "holds":
                wait_until_interrupted()
            asyncio.run_coroutine_threadsafe(look_at_queue(), PromptServer.instance.loop).result()
        return (1,)


NODES = {CPTLock.__name__: CPTLock}
