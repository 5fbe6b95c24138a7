"""Takes the queue's lock, as node packs do that look at the queue, and does not give it back in time."""

# ruff: noqa: N802 - the host looks for INPUT_TYPES and IS_CHANGED

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from server import PromptServer

from .caching import never_cached

KINDS = ("holds", "leaves", "thread", "loop", "dies")


def wait_until_interrupted() -> None:
    import comfy.model_management

    while True:
        comfy.model_management.throw_exception_if_processing_interrupted()
        time.sleep(0.05)


async def look_at_queue() -> int:
    return int(PromptServer.instance.prompt_queue.get_tasks_remaining())


class CPTLock:
    """Takes `prompt_queue.mutex`, then: `holds` it until interrupted, `leaves` it taken at its end, `thread` and `loop`
    wait for another thread or the server, which wait for the lock; `dies`: a thread of its own ends with it."""

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
        if kind == "dies":
            thread = threading.Thread(target=queue.mutex.acquire)
            thread.start()
            thread.join()
            return (1,)
        with queue.mutex:
            if kind == "holds":
                wait_until_interrupted()
            if kind == "thread":
                thread = threading.Thread(target=queue.get_tasks_remaining)
                thread.start()
                thread.join()
            else:
                asyncio.run_coroutine_threadsafe(look_at_queue(), PromptServer.instance.loop).result()
        return (1,)


NODES = {CPTLock.__name__: CPTLock}
