"""Jobs that turn out to need the process for themselves while they run: a node of theirs made such a node.

From then on the job is one that runs alone: no other starts. It rests, between two of its nodes, until every other job
has ended or rests as well, and goes on. Of several that rest one goes on to its end at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from comfy_parallel.core.states import SlotState
from comfy_parallel.errors import MustRunAlone
from comfy_parallel.slots import items
from comfy_parallel.slots.slot import Run, Slot, current_slot, slots

_LOOK_AGAIN_S = 0.05
_mutex: list[Any] = [threading.RLock()]


def use(mutex: Any) -> None:
    """Have jobs become alone under the lock under which jobs are given to slots."""
    _mutex[:] = [mutex]


def node_added(node: Any, while_waiting: Callable[[], None]) -> None:
    """The calling slot's job has made a node: return once that may run. Does nothing outside of slots.

    `while_waiting` is called now and then, and may raise.

    Raises:
        MustRunAlone: when the job is a share of one that runs, which then computes it itself.
    """
    slot = current_slot()
    run = None if slot is None else slot.run
    if slot is None or run is None or run.is_alone:
        return
    if not items.runs_alone({"": node}) and items.turns_of({"": node}) <= run.turns:
        return
    if run.share is not None:
        raise MustRunAlone(f"its workflow made a node {node['class_type']}, whose job must be the only one that runs")
    _become_alone(slot, run, while_waiting)


def _become_alone(slot: Slot, run: Run, while_waiting: Callable[[], None]) -> None:
    with _mutex[0]:
        run.is_alone = run.is_resting = True
    try:
        while not _goes_on(slot, run):
            time.sleep(_LOOK_AGAIN_S)
            while_waiting()
    finally:
        run.is_resting = False


def _goes_on(slot: Slot, run: Run) -> bool:
    """Whether this job is the one to go on now; it then no longer rests."""
    with _mutex[0]:
        run.is_resting = any(_is_at_work(other) for other in slots() if other is not slot)
        return not run.is_resting


def _is_at_work(slot: Slot) -> bool:
    run = slot.run
    return slot.state is SlotState.OFFERED if run is None else not run.is_resting
