"""Functions in the place of the class's methods."""

import execution

from .seen import NODE_CLASS_MAPPINGS, id_of, saw

__all__ = ["NODE_CLASS_MAPPINGS"]

plain_get, plain_put, plain_done = (getattr(execution.PromptQueue, name) for name in ("get", "put", "task_done"))


def class_get(self, timeout=None):
    result = plain_get(self, timeout=timeout)
    saw("get", id_of(result))
    return result


def class_put(self, item):
    saw("put", item[1])
    plain_put(self, item)


def class_done(self, item_id, history_result, *args, **kwargs):
    running = self.currently_running.get(item_id)
    plain_done(self, item_id, history_result, *args, **kwargs)
    saw("task_done", running[1])


execution.PromptQueue.get, execution.PromptQueue.put, execution.PromptQueue.task_done = class_get, class_put, class_done
