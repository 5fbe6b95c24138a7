"""Branches: parts of a workflow, each computed by another participant, and the node that puts them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comfy_parallel.core.fan_out import COLLECTOR, MOST_BRANCHES, PARTICIPANT, branch
from comfy_parallel.nodes.parallel import fan_out
from comfy_parallel.nodes.parallel.combine import combined
from comfy_parallel.nodes.parallel.job import Job, plan_of
from comfy_parallel.nodes.parallel.kinds import (
    ANY,
    CATEGORY,
    HIDDEN,
    HIDDEN_COLLECTOR,
    PEERS_HIDDEN,
    first,
    known_before,
    never_cached,
)

COLLECTOR_NAME = "DistributedBranchCollector"
_COUNT = ("INT", {"default": 2, "min": 2, "max": MOST_BRANCHES})
_NAMES = tuple(branch(index) for index in range(MOST_BRANCHES))
Gather = Callable[[Job, str], Any]


class DistributedBranch:
    """Gives its input to each branch."""

    COMFY_PARALLEL = True
    RETURN_TYPES = (ANY,) * MOST_BRANCHES
    RETURN_NAMES = _NAMES
    FUNCTION = "branch"
    CATEGORY = CATEGORY
    DESCRIPTION = "Where branches begin; each is computed by another participant, up to the branch collector."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
        hidden = {**PEERS_HIDDEN, "assigned_branch": ("INT", {"default": -1})}
        return {"required": {"input": (ANY,), "num_branches": _COUNT}, "hidden": hidden}

    def branch(self, input: Any, **others: Any) -> tuple[Any, ...]:
        return (input,) * MOST_BRANCHES


def collector(gather: Gather) -> type:
    """The node that collects branches. `gather(job, node id)` gives what all participants made."""

    class DistributedBranchCollector:
        COMFY_PARALLEL = True
        INPUT_IS_LIST = True
        OUTPUT_IS_LIST = (True,) * MOST_BRANCHES
        RETURN_TYPES = (ANY,) * MOST_BRANCHES
        RETURN_NAMES = _NAMES
        FUNCTION = "collect"
        CATEGORY = CATEGORY
        VALIDATE_INPUTS = known_before(num_branches=(2, MOST_BRANCHES))
        DESCRIPTION = "Has each branch computed by another participant, and gives each at an output of its own."

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the host's name
            hidden = {**HIDDEN, **HIDDEN_COLLECTOR, **PEERS_HIDDEN, "assigned_branch": ("INT", {"default": -1})}
            return {
                "required": {"num_branches": _COUNT},
                "optional": {name: (ANY, {"lazy": True}) for name in _NAMES},
                "hidden": {**hidden, "unique_id": "UNIQUE_ID"},
            }

        @classmethod
        def IS_CHANGED(cls, /, **given: Any) -> float:  # noqa: N802 - the host's name
            """A share's collector always runs, to leave what it has."""
            return never_cached() if first(given, PARTICIPANT, 0) else 0.0

        def check_lazy_status(self, unique_id: Any, **given: Any) -> list[str]:
            """The branches that are computed here: the participant's own; all in a job that is not shared."""
            job = _job(given, unique_id)
            own = _NAMES if job is None else (branch(first(given, PARTICIPANT, 0)),)
            return [name for name in own if name in given and given[name] in ((None,), [None])]

        def collect(self, unique_id: Any, **given: Any) -> Any:
            job, key = _job(given, unique_id), first(given, COLLECTOR, unique_id[0])
            if job is None:
                return tuple(combined([list(given.get(name, [None]))]) for name in _NAMES)
            participant = first(given, PARTICIPANT, 0)
            job.give(key, participant, list(given.get(branch(participant), [None])))
            return gather(job, key) if participant == 0 else ([None],) * MOST_BRANCHES

    return DistributedBranchCollector


def _job(given: Any, unique_id: Any) -> Job | None:
    """The shared job that this collector is part of."""
    job = fan_out.current()
    plan = None if job is None else plan_of(job, first(given, COLLECTOR, unique_id[0]))
    return job if plan is not None and plan.branches else None


def side_by_side(given: Sequence[list[Any]]) -> tuple[list[Any], ...]:
    """Each participant's branch at its own output; nothing at the outputs behind."""
    return (*(combined([values]) for values in given), *[[None]] * (MOST_BRANCHES - len(given)))
