"""A `get` on the class that does all the work itself and takes nothing while the queue is paused."""

import copy
import heapq
import time

import execution
from aiohttp import web

from .seen import NODE_CLASS_MAPPINGS, QUEUE, SERVER, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


def pausing_get(self, timeout=None):
    until = None if timeout is None else time.monotonic() + timeout
    with self.not_empty:
        while len(self.queue) == 0 or getattr(self, "pack_is_paused", False):
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return None
            self.not_empty.wait(timeout=left)
        item = heapq.heappop(self.queue)
        number = self.task_counter
        self.currently_running[number] = copy.deepcopy(item)
        self.task_counter += 1
        self.server.queue_updated()
        saw("get", item[1])
        return item, number


execution.PromptQueue.get = pausing_get


def set_paused(value):
    with QUEUE.not_empty:
        QUEUE.pack_is_paused = value
        QUEUE.not_empty.notify_all()


@SERVER.routes.post("/pack/pause")
async def pause(request: web.Request) -> web.Response:
    set_paused(True)
    return web.json_response({})


@SERVER.routes.post("/pack/resume")
async def resume(request: web.Request) -> web.Response:
    set_paused(False)
    return web.json_response({})
