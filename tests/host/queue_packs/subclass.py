"""A subclass of the host's queue in the place of the server's."""

import execution

from .seen import NODE_CLASS_MAPPINGS, SERVER, id_of, saw

__all__ = ["NODE_CLASS_MAPPINGS"]


class OwnQueue(execution.PromptQueue):
    def __init__(self, server):
        super().__init__(server)
        self.handlers = []

    def put(self, item):
        saw("put", item[1])
        super().put(item)

    def get(self, timeout=None):
        result = super().get(timeout=timeout)
        saw("get", id_of(result))
        return result

    def task_done(self, item_id, history_result, *args, **kwargs):
        saw("task_done", self.currently_running[item_id][1])
        return super().task_done(item_id, history_result, *args, **kwargs)


SERVER.prompt_queue = OwnQueue(SERVER)
