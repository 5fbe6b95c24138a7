"""Sends each job to the kind of slot that suits it, for COMFY_PARALLEL_WORKERS=auto; see `core.kinds`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from comfy_parallel.config import PROCESS
from comfy_parallel.core.kinds import Kinds, Steps
from comfy_parallel.graphs import per_slot
from comfy_parallel.slots.items import QueueItem, is_item
from comfy_parallel.slots.slot import Slot, slots

logger = logging.getLogger(__name__)


class Choosing:
    """Is asked of each job that comes, and told of each that has ended.

    `is_unsafe(workflow)`: on slots in threads it would have to run alone.
    """

    def __init__(self, is_unsafe: Callable[[Any], bool], report: Callable[[Slot], Any] = per_slot.report) -> None:
        self._kinds = Kinds()
        self._is_unsafe, self._report = is_unsafe, report
        self._steps: dict[int, tuple[int, int]] = {}

    def choose(self, queued: QueueItem) -> None:
        """Note on a job the kind that suits it; shares run in threads anyway. The caller holds the queue's mutex."""
        if queued.share is not None:
            return
        choice = self._kinds.choose(classes_of(queued), is_unsafe=self._is_unsafe(queued[2]))
        if queued.target is None or slots()[queued.target].kind == PROCESS:
            queued.kind, queued.is_bound_to_kind = choice.kind, choice.is_bound
        else:
            queued.kind, queued.is_bound_to_kind = None, False

    def job_ended(self, slot: Slot, item: Any) -> None:
        """Learn from the slot's last job, on its thread."""
        last = slot.stats.latest
        if slot.kind == PROCESS or last is None or not is_item(item):
            return
        told = self._report(slot)
        steps = sum(told["eager"].values()), told["replays"]
        before, self._steps[slot.index] = self._steps.get(slot.index, (0, 0)), steps
        if told["on"]:
            self._kinds.note(classes_of(item), Steps(steps[0] - before[0], steps[1] - before[1], last.ran_s))

    @property
    def json(self) -> dict[str, Any]:
        """What `GET /queue/all` tells: how many jobs were sent where by which rule."""
        chosen = self._kinds.chosen
        return {
            "to_processes": {"unsafe": chosen["unsafe"], "eager": chosen["eager"]},
            "to_threads": chosen["usual"],
            "eager_workflows": self._kinds.eager_workflows,
        }


def begin(front: Any, is_unsafe: Callable[[Any], bool]) -> None:
    """Choose kinds from now on; say so where there is nothing to choose between.

    `is_unsafe(workflow)`: it has nodes that are unsafe beside others in one process.
    """
    if len({slot.kind for slot in slots()}) < 2:
        logger.warning(
            "comfy_parallel: COMFY_PARALLEL_WORKERS=auto has nothing to choose between: name slots of both kinds in"
            " COMFY_PARALLEL_DEVICES, like cuda:0,cuda:0=process"
        )
        return
    choosing = Choosing(is_unsafe)
    front._dispatcher.kinds = choosing
    for queue in front.slot_queues:
        queue.when_ended = _both(queue.when_ended, choosing.job_ended)


def _both(first: Callable[[Slot, Any], None], second: Callable[[Slot, Any], None]) -> Callable[[Slot, Any], None]:
    def job_ended(slot: Slot, item: Any) -> None:
        first(slot, item)
        second(slot, item)

    return job_ended


def classes_of(item: Any) -> frozenset[str]:
    """The classes of a job's nodes."""
    workflow = item[2] if isinstance(item[2], dict) else {}
    return frozenset(str(node.get("class_type")) for node in workflow.values() if isinstance(node, dict))
