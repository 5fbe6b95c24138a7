"""The host's queue items: what they hold, their order, and how a failed one is told."""

from __future__ import annotations

import copy
import json
import time
import traceback
from typing import Any

_encode = json.JSONEncoder(check_circular=False).encode  # Items come from JSON; the check takes a quarter of the time.
SENSITIVE = 5  # index, in a host item, of the keys that must not reach the history


class QueueItem(tuple[Any, ...]):
    """A host queue item that knows when it came and where it may run. Order: the host's number, then arrival."""

    arrival: int = -1
    target: int | None = None
    queued_at: float = 0.0

    @property
    def json(self) -> str:
        """The item as `GET /queue` shows it, encoded once: an item does not change while it waits."""
        text: str | None = self.__dict__.get("_json")
        if text is None:
            text = self.__dict__["_json"] = _encode(self[:SENSITIVE])
        return text

    def deep_copy(self) -> QueueItem:
        """As `copy.deepcopy`, which is slow for what is no plain tuple."""
        copied = QueueItem(copy.deepcopy(tuple(self)))
        copied.__dict__.update(self.__dict__)
        return copied

    def __lt__(self, other: Any) -> bool:
        if self[0] != other[0]:
            return bool(self[0] < other[0])
        return self.arrival < getattr(other, "arrival", -1)

    def __gt__(self, other: Any) -> bool:
        if self[0] != other[0]:
            return bool(self[0] > other[0])
        return self.arrival > getattr(other, "arrival", -1)


def client_of(item: Any) -> Any:
    return item[3].get("client_id") if isinstance(item[3], dict) else None


def _node_of(item: Any, node_id: str | None) -> dict[str, Any]:
    node = item[2].get(node_id) if isinstance(item[2], dict) else None
    return node if isinstance(node, dict) else {}


def error_event(item: Any, error: BaseException, node_id: str | None) -> dict[str, Any]:
    """How a job's failure is told. The host's clients expect strings: no known node is an empty one."""
    reason = str(error) or type(error).__name__
    node = _node_of(item, node_id)
    return {
        "prompt_id": item[1],
        "node_id": node_id if node else "",
        "node_type": node.get("class_type", ""),
        "executed": [],
        "exception_message": f"The slot's worker ended while it ran this job: {reason}",
        "exception_type": type(error).__name__,
        "traceback": traceback.format_tb(error.__traceback__),
        "current_inputs": {},
        "current_outputs": [],
        "timestamp": int(time.time() * 1000),
    }
