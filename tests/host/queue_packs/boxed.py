"""Methods that do all the work themselves and keep each job in an object of the pack's own."""

import heapq

from .seen import NODE_CLASS_MAPPINGS, QUEUE, SERVER, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


class Box:
    def __init__(self, item):
        self.item = item

    def __lt__(self, other):
        return self.item[0] < other.item[0]


class Boxed:
    def __init__(self, queue):
        self.queue = queue
        for name in ("put", "get", "task_done", "get_current_queue", "get_current_queue_volatile"):
            if hasattr(queue, name):
                setattr(queue, name, getattr(self, name))

    def put(self, item):
        saw("put", item[1])
        with self.queue.mutex:
            heapq.heappush(self.queue.queue, Box(item))
            SERVER.queue_updated()
            self.queue.not_empty.notify()

    def get(self, timeout=None):
        with self.queue.not_empty:
            while not self.queue.queue:
                self.queue.not_empty.wait(timeout=timeout)
                if timeout and not self.queue.queue:
                    return None
            box = heapq.heappop(self.queue.queue)
            number = self.queue.task_counter
            self.queue.currently_running[number] = box
            self.queue.task_counter += 1
            saw("get", box.item[1])
            return box.item, number

    def task_done(self, item_id, history_result, status, process_item=None):
        with self.queue.mutex:
            box = self.queue.currently_running.pop(item_id)
            saw("task_done", box.item[1])
            made = {"prompt": box.item[:5], "outputs": {}, "status": status._asdict()}
            self.queue.history[box.item[1]] = {**made, **history_result}
            SERVER.queue_updated()

    def get_current_queue(self):
        with self.queue.mutex:
            running = [box.item for box in self.queue.currently_running.values()]
            return running, [box.item for box in self.queue.queue]

    get_current_queue_volatile = get_current_queue


Boxed(QUEUE)
