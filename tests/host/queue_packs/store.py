"""Jobs are kept in a store of the pack's own; the host's queue never holds more than one that waits."""

import heapq
import threading

from aiohttp import web

from .seen import NODE_CLASS_MAPPINGS, QUEUE, SERVER, id_of, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


class Store:
    def __init__(self, queue):
        self.queue, self.jobs, self.states, self.is_paused = queue, {}, {}, False
        self.resumed = threading.Condition(queue.mutex)
        self.plain_get, self.plain_put, self.plain_done = queue.get, queue.put, queue.task_done
        queue.get, queue.put, queue.task_done = self.get, self.put, self.task_done

    def first(self):
        waiting = [item for prompt_id, item in self.jobs.items() if self.states[prompt_id] == "waiting"]
        return min(waiting, key=lambda item: item[0], default=None)

    def put(self, item):
        with self.queue.mutex:
            saw("put", item[1])
            self.jobs[item[1]], self.states[item[1]] = item, "waiting"
            if len(self.queue.queue) == 0 and not self.is_paused:
                self.plain_put(self.first())
            else:
                SERVER.queue_updated()

    def get(self, timeout=None):
        with self.resumed:
            while self.is_paused:
                self.resumed.wait(timeout=timeout)
                if timeout is not None and self.is_paused:
                    return None
            if len(self.queue.queue) == 0 and (item := self.first()) is not None:
                heapq.heappush(self.queue.queue, tuple(item))
            result = self.plain_get(timeout)
            if result is not None:
                assert self.states[result[0][1]] == "waiting", "a job is given out once"
                self.states[result[0][1]] = "running"
            saw("get", id_of(result))
            return result

    def task_done(self, item_id, history_result, *args, **kwargs):
        with self.queue.mutex:
            running = self.queue.currently_running.get(item_id, None)
            if running is not None:
                self.states[running[1]] = "done"
                saw("task_done", running[1])
                self.plain_done(item_id, history_result, *args, **kwargs)


STORE = Store(QUEUE)


@SERVER.routes.post("/pack/pause")
async def pause(request: web.Request) -> web.Response:
    with STORE.resumed:
        STORE.is_paused = True
        QUEUE.queue = []
        return web.json_response({})


@SERVER.routes.post("/pack/resume")
async def resume(request: web.Request) -> web.Response:
    with STORE.resumed:
        STORE.is_paused = False
        STORE.resumed.notify_all()
        return web.json_response({})
