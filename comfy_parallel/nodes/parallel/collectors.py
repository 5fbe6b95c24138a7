"""The nodes that gather what all participants made."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from comfy_parallel.core.fan_out import COLLECTOR, END, MOST_BRANCHES, MOST_PARTICIPANTS, PARTICIPANT, PULLER, Plan
from comfy_parallel.nodes.parallel import branches, fan_out
from comfy_parallel.nodes.parallel.combine import combined
from comfy_parallel.nodes.parallel.job import Job, Values, plan_of
from comfy_parallel.nodes.parallel.kinds import (
    AGAIN,
    ANY,
    CATEGORY,
    COUNT,
    HIDDEN,
    HIDDEN_COLLECTOR,
    PEERS_HIDDEN,
    first,
    known_before,
    never_cached,
)

REST = "ParallelCollectorRest"
_BALANCE = (
    "BOOLEAN",
    {"default": False, "tooltip": "Run the whole job on one slot, whichever is free first, instead of on all."},
)


def nodes(check_interrupt: Callable[[], None]) -> dict[str, type]:
    """The classes, by the names that workflows use. `check_interrupt()` raises when the running job is to stop."""

    def node(name: str, inputs: Sequence[str], **fields: Any) -> type:
        return _collector(name, tuple(inputs), check_interrupt, **fields)

    def gather_branches(job: Job, collector: str) -> Any:
        return _gather(job, collector, MOST_BRANCHES, check_interrupt)

    images = {"images": ("IMAGE",)}
    return {
        "DistributedCollector": node(
            "DistributedCollector",
            ("images", "audio"),
            required=images,
            optional={"load_balance": _BALANCE, "audio": ("AUDIO",), "participants": COUNT},
            types=("IMAGE", "AUDIO"),
        ),
        "MultiGPUCollector": node(
            "MultiGPUCollector", ("images",), required=images, optional={"participants": COUNT}, types=("IMAGE",)
        ),
        **{
            name: node(name, ("images",), required=images, optional={"participants": COUNT}, types=("IMAGE",))
            for name in ("DistributedListCollector", "DistributedImageListEnd")
        },
        "ParallelCollector": node(
            "ParallelCollector",
            ("value",),
            required={"value": (ANY,)},
            optional={"participants": COUNT},
            types=(ANY,),
        ),
        branches.COLLECTOR_NAME: branches.collector(gather_branches),
        REST: _rest(check_interrupt),
        END: ParallelShareEnd,
    }


def _collector(
    name: str,
    inputs: tuple[str, ...],
    check_interrupt: Callable[[], None],
    *,
    required: dict[str, Any],
    optional: dict[str, Any],
    types: tuple[str, ...],
) -> type:
    def collect(self: Any, unique_id: Any, **given: Any) -> Any:
        own = [list(given.get(one, [None])) for one in inputs]
        job = fan_out.current()
        collector = first(given, COLLECTOR, unique_id[0])
        plan = None if job is None else plan_of(job, collector)
        if job is None or plan is None:  # The latter was made by a node while the job ran.
            return _together([own])
        participant = first(given, PARTICIPANT, 0)
        job.give(collector, participant, own)
        if participant:
            return _together([own])
        if plan.puller is not None and not plan.opening:
            return _opening(job, plan, collector, len(own))
        return _gather(job, collector, len(own), check_interrupt)

    def input_types(cls: type) -> dict[str, Any]:
        hidden = {**HIDDEN, **HIDDEN_COLLECTOR, **PEERS_HIDDEN, "unique_id": "UNIQUE_ID"}
        taken = {*required, *optional}
        return {
            "required": required,
            "optional": optional,
            "hidden": {key: spec for key, spec in hidden.items() if key not in taken},
        }

    def is_changed(cls: type, /, **given: Any) -> Any:
        """A share's collector always runs, to leave what it has; the job's when the number of shares has changed."""
        if first(given, PARTICIPANT, 0):
            return never_cached()
        job = fan_out.current()
        plan = None if job is None else plan_of(job, first(given, "unique_id", ""))
        return 1 if plan is None else plan.participants

    fields = {
        "COMFY_PARALLEL": True,
        "INPUT_TYPES": classmethod(input_types),
        "IS_CHANGED": classmethod(is_changed),
        "VALIDATE_INPUTS": known_before(participants=(0, MOST_PARTICIPANTS), load_balance=None),
        "INPUT_IS_LIST": True,
        "OUTPUT_IS_LIST": (True,) * len(types),
        "RETURN_TYPES": types,
        "RETURN_NAMES": inputs,
        "FUNCTION": "collect",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": "Gathers what all participants made: the first one's in order, then the next one's.",
        "collect": collect,
    }
    return type(name, (), fields)


class ParallelShareEnd:
    """Has a share's collector computed, on a host that was sent the share by another one. Only that one makes it."""

    RETURN_TYPES = ()
    FUNCTION = "end"
    OUTPUT_NODE = True
    INPUT_IS_LIST = True
    CATEGORY = CATEGORY
    DEPRECATED = True  # Front ends leave it out of their menus.

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        return {"required": {"value": (ANY,)}}

    @classmethod
    def IS_CHANGED(cls, **given: Any) -> float:  # noqa: N802 - the host's name
        return never_cached()

    def end(self, value: Any) -> dict[str, Any]:
        return {}


def _rest(check_interrupt: Callable[[], None]) -> type:
    class ParallelCollectorRest:
        """Goes on gathering after the job has computed another participant's share. Only collectors make it."""

        RETURN_TYPES = (ANY,) * MOST_BRANCHES
        FUNCTION = "collect"
        CATEGORY = CATEGORY
        DEPRECATED = True  # Front ends leave it out of their menus.

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            return {"required": {"after": (ANY,), "collector": ("STRING", {}), "outputs": ("INT", {})}}

        INPUT_IS_LIST = True

        @classmethod
        def IS_CHANGED(cls, **given: Any) -> float:  # noqa: N802 - the host's name
            return never_cached()

        def collect(self, after: Any, collector: Any, outputs: Any) -> Any:
            job = fan_out.current()
            if job is None:
                raise RuntimeError("this node is made by collectors only; take it out of the workflow")
            return _gather(job, collector[0], outputs[0], check_interrupt)

    return ParallelCollectorRest


def _gather(job: Job, collector: str, outputs: int, check_interrupt: Callable[[], None]) -> Any:
    """What all participants made; or more nodes to run first, when a share has been begun by no slot."""
    plan = plan_of(job, collector)
    if plan is None:
        raise RuntimeError(f"node {collector} gathers nothing in this job")
    participant = job.next_to_compute(collector, check_interrupt)
    if participant is None:
        given = job.collected(collector)
        if collector in plan.branches:
            return branches.side_by_side(given)
        return job.finish[collector](given) if collector in job.finish else _together(given)
    prefix = f"{collector}.{participant}:"
    graph = plan.share_graph(collector, participant, prefix)
    rest = f"{collector}.{participant}.rest"
    graph[rest] = rest_node(collector, outputs, [f"{prefix}{collector}", 0])
    return {"expand": graph, "result": tuple([rest, output] for output in range(outputs))}


def _opening(job: Job, plan: Plan, collector: str, outputs: int) -> Any:
    """Have the node that hands out items run, which was cached, before the collector goes on."""
    puller = plan.puller or ""
    told = {PULLER: puller, AGAIN: uuid.uuid4().hex}
    node = {**plan.prompt[puller], "override_display_id": puller}
    start, rest = f"{collector}.{puller}.start", f"{collector}.{puller}.rest"
    graph = {start: {**node, "inputs": {**node["inputs"], **told}}, rest: rest_node(collector, outputs, [start, 0])}
    return {"expand": graph, "result": tuple([rest, output] for output in range(outputs))}


def rest_node(collector: str, outputs: int, after: list[Any]) -> dict[str, Any]:
    """The node that goes on gathering, for a collector with so many outputs, once another has run."""
    inputs = {"after": after, "collector": collector, "outputs": outputs}
    return {"class_type": REST, "inputs": inputs, "override_display_id": collector}


def _together(participants: Sequence[Values]) -> tuple[list[Any], ...]:
    """For each output what all participants gave."""
    return tuple(combined(shares) for shares in zip(*participants, strict=True))
