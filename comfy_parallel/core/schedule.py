"""Which slot takes which waiting job: the one place where that is decided. Pure: no lock, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from comfy_parallel.core.states import CLOSED, SlotState


class JobView(Protocol):
    """What is looked at of a job. `target`: the slot it is bound to; None for any. `is_alone`: no other runs then.

    `turns`: what no other job that runs may need as well. `most_at_once`: how many jobs of its client may run together;
    None for any number. `models`: the names of the weight files that it reads. `barred`: the slots that cannot run it.
    `standing`: jobs of another one are not overtaken. `passed`: how often it was. `kind`: of the slots that suit it;
    None when all do. `is_bound_to_kind`: it runs on no others.
    """

    @property
    def prompt_id(self) -> Any: ...
    @property
    def client_id(self) -> Any: ...
    @property
    def target(self) -> int | None: ...
    @property
    def is_alone(self) -> bool: ...
    @property
    def turns(self) -> frozenset[str]: ...
    @property
    def most_at_once(self) -> int | None: ...
    @property
    def models(self) -> frozenset[str]: ...
    @property
    def barred(self) -> Container[int]: ...
    @property
    def standing(self) -> Any: ...
    @property
    def passed(self) -> int: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def is_bound_to_kind(self) -> bool: ...
    @property
    def not_on(self) -> frozenset[int]: ...  # the slots that are not to take it although they could


class SlotView(Protocol):
    """What is looked at of a slot."""

    @property
    def index(self) -> int: ...
    @property
    def state(self) -> SlotState: ...
    @property
    def kind(self) -> str: ...  # how it runs: in a thread, in a process
    @property
    def last_client_id(self) -> Any: ...
    @property
    def is_alone(self) -> bool: ...  # It runs, or is about to run, a job that runs alone.
    @property
    def models(self) -> frozenset[str]: ...  # the weight files of the last job that had any


class UnderWay(NamedTuple):
    """The ids, the clients and the turns of the jobs that have been given to a slot."""

    prompt_ids: Sequence[Any] = ()
    clients: Sequence[Any] = ()
    turns: frozenset[str] = frozenset()


_BUSY = frozenset((SlotState.OFFERED, SlotState.RUNNING, SlotState.DRAINING))
_WINDOW, _WIDEST = 256, 2048  # so many of the first waiting jobs are looked at for one whose models a slot holds
_WINDOW_FOR_A_SLOT = 16  # at least, for with many slots as many models may be in use
AnySlot = TypeVar("AnySlot", bound=SlotView)
NOTHING = UnderWay()
_WORST = (False, False, False)


def slot_for(job: JobView, slots: Sequence[AnySlot], under_way: UnderWay = NOTHING) -> AnySlot | None:
    """The idle slot that is to take this job now; None when it has to wait.

    A job bound to a slot waits for that slot, one bound to a kind for a slot of that kind, any other for no slot that
    runs another job; none goes where it cannot run. It goes to a slot of the kind that suits it, among these to one
    that holds all of its models, and among equals to the one that ran its client's last job, for that one has the
    workflow's results cached; that slot is also waited for while it comes back from that very job: the client has heard
    of the end and sent this one at once. Otherwise the first slot in order takes it: an idle server keeps its caches
    warm in one place.

    Two jobs of one id run in turn, and no more jobs of one client at once than its jobs say. A job that runs alone
    waits until no other slot has a job, and while it runs no other job starts.
    """
    if not may_start(job, under_way) or not may_run_beside(job, slots):
        return None
    if job.target is not None:
        bound = slots[job.target]
        return bound if bound.state is SlotState.IDLE and bound.index not in job.barred else None
    best, best_fit, expected_fit = None, _WORST, _WORST
    for slot in slots:
        if not may_go_to(job, slot):
            continue
        if slot.state is SlotState.IDLE:
            if best is None or _fit(job, slot) > best_fit:
                best, best_fit = slot, _fit(job, slot)
        elif slot.state is SlotState.RETURNING and slot.last_client_id == job.client_id:
            expected_fit = max(expected_fit, _fit(job, slot))
    return None if expected_fit > best_fit else best


def first_start(
    waiting: Sequence[Any],
    view: Callable[[Any], JobView],
    slots: Sequence[AnySlot],
    under_way: UnderWay,
    is_given: Callable[[Any], bool],
    last: Any = None,
    affinity: int = 0,
) -> tuple[int, AnySlot] | None:
    """The position of the waiting job that is to start next, and its slot; None when none can start now.

    `waiting` is a heap; `is_given` says that a job in it has a slot already. Behind `last` none is to start.
    A job whose models the slot holds overtakes the first one, up to `affinity` times, or as often as there are slots:
    so many jobs start while each slot ends one, and among these is the slot that holds the first job's models.
    """
    free = {slot.index for slot in slots if slot.state is SlotState.IDLE}
    if not free or not waiting:
        return None
    if not is_given(waiting[0]) and (slot := slot_for(view(waiting[0]), slots, under_way)) is not None:
        if view(waiting[0]).passed < most_overtakings(affinity, len(slots)) and not holds(slot, view(waiting[0])):
            return _that_fits(waiting, view, slots, under_way, is_given, last, slot) or (0, slot)
        return 0, slot
    best: tuple[int, AnySlot] | None = None
    held_back: dict[Any, Any] | None = None
    for position, item in enumerate(waiting):
        job = view(item)
        if (job.target is not None and job.target not in free) or is_given(item) or (last is not None and last < item):
            continue
        if best is not None and not item < waiting[best[0]]:
            continue
        if job.most_at_once == 1:
            held_back = _first_of_clients(waiting, view, is_given) if held_back is None else held_back
            if held_back.get(job.client_id, item) is not item:
                continue
        if (slot := slot_for(job, slots, under_way)) is not None:
            best = position, slot
    return best


def most_overtakings(affinity: int, num_slots: int) -> int:
    """How often a job may be overtaken, where a user has set it to `affinity`."""
    return max(affinity, num_slots) if affinity else 0


def _that_fits(
    waiting: Sequence[Any],
    view: Callable[[Any], JobView],
    slots: Sequence[AnySlot],
    under_way: UnderWay,
    is_given: Callable[[Any], bool],
    last: Any,
    slot: AnySlot,
) -> tuple[int, AnySlot] | None:
    """The first of the next jobs of the same standing that would go to this slot because it holds their models.

    A heap has its first items at its beginning, though not in order.
    """
    standing = view(waiting[0]).standing
    best: int | None = None
    window = max(_WINDOW, min(_WINDOW_FOR_A_SLOT * len(slots), _WIDEST))
    for position in range(min(window, len(waiting))):
        item = waiting[position]
        job = view(item)
        if not job.models or job.most_at_once == 1 or not holds(slot, job) or job.standing != standing:
            continue
        if is_given(item) or (last is not None and last < item) or (best is not None and not item < waiting[best]):
            continue
        if slot_for(job, slots, under_way) is slot:
            best = position
    return None if best is None else (best, slot)


def _first_of_clients(
    waiting: Sequence[Any], view: Callable[[Any], JobView], is_given: Callable[[Any], bool]
) -> dict[Any, Any]:
    """The first waiting job of each client that wants its jobs one at a time."""
    first: dict[Any, Any] = {}
    for item in waiting:
        job = view(item)
        if job.most_at_once == 1 and job.client_id is not None and not is_given(item):
            known = first.get(job.client_id)
            if known is None or item < known:
                first[job.client_id] = item
    return first


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


def may_start(job: JobView, under_way: UnderWay) -> bool:
    """Whether neither its id nor its client keeps it from starting."""
    if not under_way.prompt_ids:
        return True
    most, client_id = job.most_at_once, job.client_id
    if most is not None and client_id is not None and under_way.clients.count(client_id) >= most:
        return False
    return job.prompt_id not in under_way.prompt_ids and job.turns.isdisjoint(under_way.turns)


def _fit(job: JobView, slot: SlotView) -> tuple[bool, bool, bool]:
    """How well a slot suits a job: it is of its kind, it holds its models, it ran its client's last job."""
    is_of_kind = job.kind is None or job.kind == slot.kind
    return is_of_kind, bool(job.models) and holds(slot, job), slot.last_client_id == job.client_id


def may_go_to(job: JobView, slot: SlotView) -> bool:
    """Whether a job that is bound to no slot can and may run on this one."""
    is_of_kind = not job.is_bound_to_kind or slot.kind == job.kind
    return is_of_kind and slot.index not in job.barred and slot.index not in job.not_on


def holds(slot: SlotView, job: JobView) -> bool:
    """Whether the slot used all of the job's models last."""
    return job.models <= slot.models


def may_run_beside(job: JobView, slots: Sequence[SlotView]) -> bool:
    """Whether neither this job nor one that runs must be alone."""
    is_alone = job.is_alone
    return not any(slot.state in _BUSY and (is_alone or slot.is_alone) for slot in slots)


def _is_open(target: int | None, slots: Sequence[SlotView]) -> bool:
    return any(slot.state not in CLOSED for slot in slots if target is None or slot.index == target)
