"""Lists whose items are handed out one at a time: each slot that is free takes the next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_parallel.core.fan_out import OPENING, PARTICIPANT, PULLER
from comfy_parallel.nodes.parallel import fan_out
from comfy_parallel.nodes.parallel.job import puller_plan
from comfy_parallel.nodes.parallel.kinds import ANY, CATEGORY, HIDDEN, HIDDEN_PULLER, PEERS_HIDDEN, first

GIVEN = {
    "DistributedListSplitter": ("images",),
    "DistributedImageListStart": ("images",),
    "ParallelListStart": ("value",),
}


def is_pulled(given: Mapping[str, Any]) -> str:
    """What tells a node that hands out items from one that gives all of them; empty for the latter."""
    job = fan_out.current()
    node_id = first(given, PULLER, "") or first(given, "unique_id", "")
    return "pulled" if job is not None and puller_plan(job, node_id) is not None else ""


def item(unique_id: Any, values: Sequence[Any], given: Mapping[str, Any]) -> list[Any]:
    """The participant's own item, as a list; the job's own node opens all of them first."""
    job, node_id = fan_out.current(), first(given, PULLER, "") or unique_id[0]
    if job is None:
        raise RuntimeError("items are handed out within a job that is shared out only")
    if not first(given, OPENING, ""):
        things = _things(values)
        job.open(node_id, things or [[]])
    own: list[Any] = job.item(node_id, first(given, PARTICIPANT, 0))
    return own


def _things(values: Sequence[Any]) -> list[list[Any]]:
    """Each thing of a list, or of the one batch that it holds."""
    if len(values) == 1 and hasattr(values[0], "shape") and len(values[0].shape) > 2:
        return [[values[0][one : one + 1]] for one in range(values[0].shape[0])]
    return [[value] for value in values]


def _start(name: str, given: str, kind: Any) -> type:
    def input_types(cls: type) -> dict[str, Any]:
        hidden = {**HIDDEN, **HIDDEN_PULLER, **PEERS_HIDDEN, "unique_id": "UNIQUE_ID"}
        return {"required": {given: (kind,)}, "hidden": hidden}

    def is_changed(cls: type, /, **inputs: Any) -> str:
        return is_pulled(inputs)

    def hand_out(self: Any, unique_id: Any, **inputs: Any) -> tuple[list[Any]]:
        values = inputs.get(given, ())
        if not is_pulled({**inputs, "unique_id": unique_id}):
            return ([value for thing in _things(values) for value in thing],)
        return (item(unique_id, values, inputs),)

    fields = {
        "COMFY_PARALLEL": True,
        "INPUT_TYPES": classmethod(input_types),
        "IS_CHANGED": classmethod(is_changed),
        "INPUT_IS_LIST": True,
        "OUTPUT_IS_LIST": (True,),
        "RETURN_TYPES": (kind,),
        "RETURN_NAMES": ("item",),
        "FUNCTION": "hand_out",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": "Where a list begins whose items are handed out one at a time, up to the collector behind it.",
        "hand_out": hand_out,
    }
    return type(name, (), fields)


def nodes() -> dict[str, type]:
    """The classes that always hand out items, by the names that workflows use."""
    kinds = {"DistributedImageListStart": ("images", "IMAGE"), "ParallelListStart": ("value", ANY)}
    return {name: _start(name, *given) for name, given in kinds.items()}
