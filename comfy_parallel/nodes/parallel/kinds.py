"""What the nodes for several participants have in common: their types, hidden inputs, and whose share they run for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from comfy_parallel.core.fan_out import COLLECTOR, MOST_PARTICIPANTS, OPENING, PARTICIPANT, PARTICIPANTS, PULLER

CATEGORY = "parallel"

_HIDDEN_NUMBER = ("INT", {"default": 0})
HIDDEN = {PARTICIPANT: _HIDDEN_NUMBER, PARTICIPANTS: _HIDDEN_NUMBER}
AGAIN = "again"  # The hidden input that tells a second run of a node in one job from the first.
HIDDEN_PULLER = {name: ("STRING", {"default": ""}) for name in (PULLER, OPENING, AGAIN)}
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


def known_before(**bounds: tuple[int, int] | None) -> classmethod[Any, Any, Any]:
    """A `VALIDATE_INPUTS` for inputs that say how a job is shared out, which is settled before any node runs.

    `bounds`: of each input, None for one that is no number. A link to another node is refused, and so is
    what an older client's list of workers may not be.
    """

    def validate(cls: type, /, **given: Any) -> bool | str:
        if given.get(PARTICIPANT, 0) not in (0, [0]):
            return True  # It is a share, of a job that was checked.
        for name, value in given.items():
            if name == PARTICIPANT:
                continue
            value = value[0] if isinstance(value, list | tuple) else value
            if value is None:
                return f"{name} is connected, but must be known before the job runs; write the value into the node"
            within = bounds.get(name)
            if within is not None and not within[0] <= value <= within[1]:
                return f"{name} is {value}; write a number from {within[0]} to {within[1]}"
            if name == "enabled_worker_ids" and not _is_list(value):
                return f"{name} is {value!r}; write a JSON list of the ids of workers"
        return True

    names = ("cls", *bounds, "enabled_worker_ids")
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    parameters.append(inspect.Parameter(PARTICIPANT, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=0))
    # The host reads the names off the signature: it no longer checks the bounds of those that stand there.
    validate.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return classmethod(validate)


def _is_list(text: Any) -> bool:
    try:
        return isinstance(json.loads(text) if isinstance(text, str) else text, list)
    except ValueError:
        return False


def never_cached() -> float:
    """What makes the host run a node again. Each is another one: in a tuple, one that is the same object is equal."""
    return float("nan")
