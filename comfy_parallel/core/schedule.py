"""Which slot takes which waiting job: the one place where that is decided. Pure: no lock, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from comfy_parallel.core.states import CLOSED, SlotState


class JobView(Protocol):
    """What is looked at of a job. `target`: the slot it is bound to; None for any. `is_alone`: no other runs then."""

    @property
    def prompt_id(self) -> Any: ...
    @property
    def client_id(self) -> Any: ...
    @property
    def target(self) -> int | None: ...
    @property
    def is_alone(self) -> bool: ...


class SlotView(Protocol):
    """What is looked at of a slot."""

    @property
    def index(self) -> int: ...
    @property
    def state(self) -> SlotState: ...
    @property
    def last_client_id(self) -> Any: ...
    @property
    def is_alone(self) -> bool: ...  # It runs, or is about to run, a job that runs alone.


_BUSY = frozenset((SlotState.OFFERED, SlotState.RUNNING, SlotState.DRAINING))
AnySlot = TypeVar("AnySlot", bound=SlotView)


def slot_for(job: JobView, slots: Sequence[AnySlot], under_way: Collection[Any] = ()) -> AnySlot | None:
    """The idle slot that is to take this job now; None when it has to wait.

    A job bound to a slot waits for that slot, any other for no slot that runs another job. It goes to the slot that
    ran its client's last job, for that one has the workflow's results cached; that slot is also waited for while it
    comes back from that very job: the client has heard of the end and sent this one at once. Otherwise the first slot
    in order takes it: an idle server keeps its caches warm in one place.

    `under_way`: the ids of the jobs that have been given to a slot. Two jobs of one id run in turn. A job that runs
    alone waits until no other slot has a job, and while it runs no other job starts.
    """
    if (under_way and job.prompt_id in under_way) or not _may_run_beside(job, slots):
        return None
    if job.target is not None:
        bound = slots[job.target]
        return bound if bound.state is SlotState.IDLE else None
    client_id = job.client_id
    first: AnySlot | None = None
    is_expected = False
    for slot in slots:
        if slot.state is SlotState.IDLE:
            if slot.last_client_id == client_id:
                return slot
            first = first or slot
        elif slot.state is SlotState.RETURNING and slot.last_client_id == client_id:
            is_expected = True
    return None if is_expected else first


def first_start(
    waiting: Sequence[Any],
    view: Callable[[Any], JobView],
    slots: Sequence[AnySlot],
    under_way: Collection[Any],
    is_given: Callable[[Any], bool],
    last: Any = None,
) -> tuple[int, AnySlot] | None:
    """The position of the waiting job that is to start next, and its slot; None when none can start now.

    `waiting` is a heap; `is_given` says that a job in it has a slot already. Behind `last` none is to start.
    """
    free = {slot.index for slot in slots if slot.state is SlotState.IDLE}
    if not free or not waiting:
        return None
    if not is_given(waiting[0]) and (slot := slot_for(view(waiting[0]), slots, under_way)) is not None:
        return 0, slot
    best: tuple[int, AnySlot] | None = None
    for position, item in enumerate(waiting):
        job = view(item)
        if (job.target is not None and job.target not in free) or is_given(item) or (last is not None and last < item):
            continue
        if (best is None or item < waiting[best[0]]) and (slot := slot_for(job, slots, under_way)) is not None:
            best = position, slot
    return best


def first_alone(
    waiting: Sequence[Any],
    view: Callable[[Any], JobView],
    slots: Sequence[SlotView],
    is_given: Callable[[Any], bool],
) -> Any:
    """The first waiting job that runs alone, and that jobs behind it let go first, so that it does not starve.

    Nobody waits for one that is bound to a slot which takes no jobs.
    """
    alone = [item for item in waiting if view(item).is_alone and not is_given(item)]
    return min((item for item in alone if _is_open(view(item).target, slots)), default=None)


def _may_run_beside(job: JobView, slots: Sequence[SlotView]) -> bool:
    is_alone = job.is_alone
    return not any(slot.state in _BUSY and (is_alone or slot.is_alone) for slot in slots)


def _is_open(target: int | None, slots: Sequence[SlotView]) -> bool:
    return any(slot.state not in CLOSED for slot in slots if target is None or slot.index == target)
