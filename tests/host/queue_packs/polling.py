"""A `get` on the class that looks at the first job, and returns none while the queue is paused."""

import heapq
import threading
import time

import execution
from aiohttp import web

from .seen import NODE_CLASS_MAPPINGS, SERVER, id_of, saw

__all__ = ["NODE_CLASS_MAPPINGS"]

paused = threading.Event()
plain_get = execution.PromptQueue.get


def polling_get(self, timeout=None):
    if paused.is_set():
        saw("first", self.queue[0][1] if self.queue else None)
        time.sleep(0.05)
        return None
    result = plain_get(self, timeout=timeout)
    if result is not None and paused.is_set():
        self.queue.append(result[0])
        heapq.heapify(self.queue)
        time.sleep(0.05)
        return None
    saw("get", id_of(result))
    return result


execution.PromptQueue.get = polling_get


@SERVER.routes.post("/pack/pause")
async def pause(request: web.Request) -> web.Response:
    paused.set()
    return web.json_response({})


@SERVER.routes.post("/pack/resume")
async def resume(request: web.Request) -> web.Response:
    paused.clear()
    return web.json_response({})
