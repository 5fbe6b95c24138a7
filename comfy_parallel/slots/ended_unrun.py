"""Jobs that end as an error without having run: they come into the history with the reason, and out of the file."""

from __future__ import annotations

import logging
from typing import Any

from comfy_parallel.slots.items import client_of, error_event

logger = logging.getLogger(__name__)


class NotRun(RuntimeError):
    """A job that is not run; the text says why."""


def end_as_error(front: Any, item: Any, reason: str, kind: type[BaseException] = NotRun) -> None:
    """End a job that neither waits nor runs any more. The caller holds the queue's lock."""
    logger.error("comfy_parallel: job %s ended as an error: %s", item[1], reason)
    event = {**error_event(item, kind(reason), None), "exception_message": reason}
    status = {"status_str": "error", "completed": False, "messages": [["execution_error", event]]}
    gpu_id = getattr(item, "target", None)
    entry = {"prompt": tuple(item[:5]), "outputs": {}, "status": status, "meta": {}, "gpu_id": gpu_id}
    front.history[item[1]] = entry
    front.ledger.settle(item, entry)
    if (client_id := client_of(item)) is not None:
        front.server.send_sync("execution_error", {**event, "gpu_id": gpu_id}, client_id)
        front.server.send_sync("executing", {"node": None, "prompt_id": item[1], "gpu_id": gpu_id}, client_id)
