"""An object in the queue's place that holds it."""

from .seen import NODE_CLASS_MAPPINGS, QUEUE, SERVER, id_of, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


class Holder:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def put(self, item):
        saw("put", item[1])
        self.inner.put(item)

    def get(self, timeout=None):
        result = self.inner.get(timeout=timeout)
        saw("get", id_of(result))
        return result

    def task_done(self, item_id, *args, **kwargs):
        saw("task_done", self.inner.currently_running[item_id][1])
        self.inner.task_done(item_id, *args, **kwargs)


SERVER.prompt_queue = Holder(QUEUE)
