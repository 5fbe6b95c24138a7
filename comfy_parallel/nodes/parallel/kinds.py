"""What the nodes for several participants have in common: their types, hidden inputs, and whose share they run for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_parallel.core.fan_out import COLLECTOR, MOST_PARTICIPANTS, PARTICIPANT, PARTICIPANTS

CATEGORY = "parallel"

_HIDDEN_NUMBER = ("INT", {"default": 0})
HIDDEN = {PARTICIPANT: _HIDDEN_NUMBER, PARTICIPANTS: _HIDDEN_NUMBER}
HIDDEN_COLLECTOR = {COLLECTOR: ("STRING", {"default": ""})}
# What clients of the original write into its nodes. Accepted, and of no effect unless it is said elsewhere.
PEERS_HIDDEN = {
    "multi_job_id": ("STRING", {"default": ""}),
    "is_worker": ("BOOLEAN", {"default": False}),
    "master_url": ("STRING", {"default": ""}),
    "enabled_worker_ids": ("STRING", {"default": "[]"}),
    "worker_batch_size": ("INT", {"default": 1}),
    "worker_id": ("STRING", {"default": ""}),
    "pass_through": ("BOOLEAN", {"default": False}),
    "delegate_only": ("BOOLEAN", {"default": False}),
}
COUNT = (
    "INT",
    {
        "default": 0,
        "min": 0,
        "max": MOST_PARTICIPANTS,
        "tooltip": "How many shares the work is made of, each with its own seed; 0: one for each slot.",
    },
)


class AnyType(str):
    """A type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = AnyType("*")


def first(given: Mapping[str, Any], name: str, default: Any) -> Any:
    """An input of a node that takes lists; those that were not sent are not there."""
    values = given.get(name)
    return default if not values else values[0]


def never_cached() -> float:
    """What makes the host run a node again. Each is another one: in a tuple, one that is the same object is equal."""
    return float("nan")
