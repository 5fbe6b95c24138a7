"""Which slot takes which job where slots are of different speed: the one where it is expected to end first. Pure.

That may be a slot which still runs another job: a fast one that is free in a moment ends a long job sooner than a slow
one that is idle now. A job is then promised to it, and the next jobs count with that.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comfy_parallel.core.schedule import (
    AnySlot,
    JobView,
    UnderWay,
    holds,
    may_go_to,
    may_run_beside,
    may_start,
    slot_for,
)
from comfy_parallel.core.states import CLOSED, SlotState

LOAD_S = 4.0  # What it takes to have other models on a slot, about.
_WINDOW = 64  # so many of the first waiting jobs are looked at


def first_expected(
    waiting: Sequence[Any],
    view: Callable[[Any], JobView],
    slots: Sequence[AnySlot],
    under_way: UnderWay,
    is_given: Callable[[Any], bool],
    seconds_of: Callable[[Any], float | None],
    factors: Sequence[float],
    free_in: Sequence[float | None],
) -> tuple[int, AnySlot] | None:
    """The position of the waiting job that is to start next, and its slot; None when none is to start now.

    `seconds_of(item)`: what it takes on a slot of factor 1, None when that is not known: it then waits for nobody.
    `free_in`: for each slot, in how many seconds its job is expected to have ended, 0 when it has none; None when that
    is not known: nobody waits for it.
    """
    idle = {slot.index for slot in slots if slot.state is SlotState.IDLE}
    until = list(free_in)
    held_back: set[Any] = set()  # clients of which an earlier job waits, and that want their jobs in order
    for position in _in_order(waiting, _WINDOW) if idle else ():
        item = waiting[position]
        job = view(item)
        if is_given(item):
            continue
        if job.most_at_once == 1 and job.client_id is not None:
            if job.client_id in held_back:
                continue
            held_back.add(job.client_id)
        if job.target is not None:
            if (bound := slot_for(job, slots, under_way)) is not None:
                return position, bound
            continue
        if not may_start(job, under_way) or not may_run_beside(job, slots):
            continue
        best = _best(job, slots, idle, until, factors, seconds_of(item))
        if best is None:
            return None
        slot, end = best
        if slot.index in idle:
            return position, slot
        until[slot.index] = end
    return _first_bound(waiting, view, slots, under_way, is_given) if idle else None


def _in_order(heap: Sequence[Any], count: int) -> Iterator[int]:
    """The positions of the first items of a heap, without looking at all of them."""
    nearest = [(heap[0], 0)] if heap else []
    while nearest and count:
        _, position = heapq.heappop(nearest)
        yield position
        count -= 1
        for child in (2 * position + 1, 2 * position + 2):
            if child < len(heap):
                heapq.heappush(nearest, (heap[child], child))


def _best(
    job: JobView,
    slots: Sequence[AnySlot],
    idle: set[int],
    until: Sequence[float | None],
    factors: Sequence[float],
    seconds: float | None,
) -> tuple[AnySlot, float] | None:
    """The slot where the job ends first, and when."""
    best: tuple[AnySlot, float] | None = None
    for slot in slots:
        is_idle, begins = slot.index in idle, until[slot.index]
        if slot.state in CLOSED or not may_go_to(job, slot) or (not is_idle and (begins is None or seconds is None)):
            continue
        load = 0.0 if not job.models or holds(slot, job) else LOAD_S
        end = (0.0 if is_idle else begins or 0.0) + load + factors[slot.index] * (1.0 if seconds is None else seconds)
        if best is None or end < best[1]:
            best = slot, end
    return best


def _first_bound(
    waiting: Sequence[Any],
    view: Callable[[Any], JobView],
    slots: Sequence[AnySlot],
    under_way: UnderWay,
    is_given: Callable[[Any], bool],
) -> tuple[int, AnySlot] | None:
    """The first job beyond those that were looked at which is bound to an idle slot."""
    best: tuple[int, AnySlot] | None = None
    for position, item in enumerate(waiting):
        job = view(item)
        if job.target is None or job.most_at_once == 1 or is_given(item):
            continue
        if best is not None and not item < waiting[best[0]]:
            continue
        if (slot := slot_for(job, slots, under_way)) is not None:
            best = position, slot
    return best
