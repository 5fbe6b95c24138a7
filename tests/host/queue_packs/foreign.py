"""A queue of the pack's own that has nothing of the host's."""

import heapq
import threading

from .seen import NODE_CLASS_MAPPINGS, SERVER, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


class ForeignQueue:
    def __init__(self, server):
        self.server, self.mutex = server, threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.jobs, self.currently_running, self.history, self.counter = [], {}, {}, 0

    def put(self, item):
        with self.not_empty:
            saw("put", item[1])
            heapq.heappush(self.jobs, item)
            self.server.queue_updated()
            self.not_empty.notify()

    def get(self, timeout=None):
        with self.not_empty:
            if not self.jobs:
                self.not_empty.wait(timeout)
            if not self.jobs:
                return None
            item, self.counter = heapq.heappop(self.jobs), self.counter + 1
            self.currently_running[self.counter] = item
            saw("get", item[1])
            return item, self.counter

    def task_done(self, item_id, history_result, status, process_item=None):
        with self.mutex:
            item = self.currently_running.pop(item_id)
            saw("task_done", item[1])
            told = {"prompt": item[:5], "outputs": {}, "status": status._asdict()}
            self.history[item[1]] = {**told, **history_result}
            self.server.queue_updated()

    def get_current_queue(self):
        return list(self.currently_running.values()), list(self.jobs)

    get_current_queue_volatile = get_current_queue

    def get_tasks_remaining(self):
        return len(self.jobs) + len(self.currently_running)

    def get_history(self, prompt_id=None, **_more):
        return dict(self.history) if prompt_id is None else {k: v for k, v in self.history.items() if k == prompt_id}

    def get_flags(self, reset=True):
        return {}


SERVER.prompt_queue = ForeignQueue(SERVER)
