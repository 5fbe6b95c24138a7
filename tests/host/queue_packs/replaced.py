"""Methods that do all the work themselves, on the queue's own list, condition, counter and running jobs.

The items get an owner as one part more.
"""

import copy
import heapq

from .seen import NODE_CLASS_MAPPINGS, QUEUE, SERVER, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


class Owned:
    def __init__(self, queue):
        self.queue = queue
        self.plain_put = queue.put
        for name in ("put", "get", "task_done", "wipe_queue", "delete_queue_item", "get_current_queue"):
            setattr(queue, name, getattr(self, name))

    def put(self, item):
        saw("put", item[1])
        self.plain_put((*item, {"owner": "somebody"}))

    def get(self, timeout=None):
        jobs = self.queue.queue
        with self.queue.not_empty:
            while len(jobs) == 0:
                self.queue.not_empty.wait(timeout=timeout)
                if timeout is not None and len(jobs) == 0:
                    return None
            entry = heapq.heappop(jobs)
            number = self.queue.task_counter
            self.queue.currently_running[number] = copy.deepcopy(entry)
            self.queue.task_counter += 1
            SERVER.queue_updated()
            saw("get", entry[1])
            return tuple(entry)[:-1], number

    def task_done(self, item_id, history_result, status, process_item=None):
        with self.queue.mutex:
            entry = self.queue.currently_running.pop(item_id)
            saw("task_done", entry[1])
            told = None if status is None else copy.deepcopy(status._asdict())
            made = {"prompt": tuple(entry)[:5], "outputs": {}, "status": told, "owner": entry[-1]["owner"]}
            self.queue.history[entry[1]] = {**made, **history_result}
            SERVER.queue_updated()

    def get_current_queue(self):
        with self.queue.mutex:
            return list(self.queue.currently_running.values()), copy.deepcopy(self.queue.queue)

    def wipe_queue(self):
        with self.queue.mutex:
            self.queue.queue = [entry for entry in self.queue.queue if entry[-1]["owner"] != "somebody"]
            SERVER.queue_updated()

    def delete_queue_item(self, function):
        with self.queue.mutex:
            for place in range(len(self.queue.queue)):
                if function(self.queue.queue[place]):
                    self.queue.queue.pop(place)
                    heapq.heapify(self.queue.queue)
                    SERVER.queue_updated()
                    return True
        return False


Owned(QUEUE)
