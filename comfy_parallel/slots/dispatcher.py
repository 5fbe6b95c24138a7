"""All jobs that wait or run, and the places where slots find theirs; under one lock.

N complete queues under a facade that sums over them deadlock: their locks and the event loop's form a cycle.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Any, Protocol

from comfy_parallel.config import Policy
from comfy_parallel.core import schedule
from comfy_parallel.core.fairness import FairShare
from comfy_parallel.core.scope import SETTLED_FIELD
from comfy_parallel.core.states import SlotEvent, SlotState
from comfy_parallel.slots.desk import NOBODY, Asker, Desk
from comfy_parallel.slots.items import QueueItem, as_queued, client_order_of, is_item, priority_of, view_of
from comfy_parallel.slots.ledger import Ledger
from comfy_parallel.slots.measuring import Measuring
from comfy_parallel.slots.queue_mutex import QueueMutex
from comfy_parallel.slots.slot import Slot


class Kinds(Protocol):
    """Chooses the kind of slot that suits a job."""

    def choose(self, queued: QueueItem) -> None:
        """Note it on the job."""

    @property
    def json(self) -> dict[str, Any]:
        """What `GET /queue/all` tells of it."""


class Dispatcher:
    """Gives waiting jobs to idle slots. Whoever changes something here holds `mutex`."""

    def __init__(self) -> None:
        self.mutex = QueueMutex()
        self.waiting: list[Any] = []  # a heap; a job stays in it until a worker takes it
        self.running: dict[int, Any] = {}
        self.desks: list[Desk] = []
        self.history: dict[str, Any] = {}
        self.shares: set[Any] = set()  # The ids of those, waiting or running, that are shares of another job.
        self.task_counter = 0
        self.ledger = Ledger()
        self.is_started = False  # The slots' workers have been started.
        self.default_slot: int | None = None
        self.between_jobs: Callable[[bool], None] = lambda was_freed: None  # `POST /free` was carried out before
        self.job_recorded: Callable[[dict[str, Any], int], None] = lambda entry, index: None  # It is in the history.
        self.refuse_waiting: Callable[[], None] = lambda: None  # A job waits for a slot that has failed.
        self.job_begins: Callable[[], None] = lambda: None  # both are called in the job's slot, on its worker's thread
        self.job_ends: Callable[[], None] = lambda: None
        self.policy = Policy()
        self.kinds: Kinds | None = None
        self._fair_share = FairShare()
        self._measuring = Measuring(self._look_again)
        self._owners: dict[int, Desk] = {}
        self._waits_alone = False  # A job that runs alone may be among those that wait.

    def add_slot(self, slot: Slot) -> Desk:
        """Make the place of one slot."""
        self.desks.append(Desk(slot, self.mutex))
        return self.desks[-1]

    # Filling.

    def put(self, item: Any, target: int | None, asker: Asker = NOBODY) -> None:
        """Let a job wait for one slot, or for whichever is to take it when `target` is None."""
        queued = QueueItem(item)
        queued.target, queued.queued_at = target, time.monotonic()
        queued.priority, queued.peer = priority_of(item), asker.peer
        queued.most_at_once = self.policy.most_at_once(client_order_of(item))
        if asker.is_in_turn and self.policy.fair_by != "off":
            queued.party = asker.party
            queued.place = self._fair_share.place(asker.party, item[0], is_idle=not self.waiting)
        self.enqueue(queued)

    def enqueue(self, queued: QueueItem) -> None:
        """Let it wait, or give it to a slot at once."""
        queued.arrival = next(self.ledger.arrivals)
        if self.kinds is not None:
            self.kinds.choose(queued)
        self.ledger.accept(queued)
        heapq.heappush(self.waiting, queued)
        self._waits_alone = self._waits_alone or queued.is_alone
        if queued.target is not None and self.desks[queued.target].slot.state is SlotState.FAILED:
            self.refuse_waiting()
        elif any(desk.has_declined for desk in self.desks):
            self.wake_all()
        elif self._waits_alone or queued.most_at_once == 1 or self._measuring.matters(self.desks):
            self.dispatch()
        elif (desk := schedule.slot_for(queued, self.desks, self._under_way())) is not None:
            self._give(desk, queued)

    def restore(self, items: list[QueueItem]) -> None:
        """Let jobs of before a restart wait again."""
        for item in items:
            item.priority, item.most_at_once = priority_of(item), self.policy.most_at_once(client_order_of(item))
            if self.kinds is not None and not item.is_alone:
                self.kinds.choose(item)
        self._fair_share.resume((item.party, item.order[1]) for item in items)
        self.waiting.extend(items)
        heapq.heapify(self.waiting)
        self._waits_alone = True  # One of them may be such a job; the next `dispatch` looks.

    def dispatch(self) -> None:
        """Give jobs to slots until no waiting job can start."""
        while start := self._next_start():
            position, desk = start
            if position:
                self._note_overtaken(desk)
            self._give(desk, self._known(position))

    def _note_overtaken(self, desk: Desk) -> None:
        """The first waiting job, if this slot could have taken it, was overtaken."""
        first = self._known(0)
        if isinstance(first, QueueItem) and first.target in (None, desk.index) and not self._is_given(first):
            first.passed += desk.index not in first.barred

    def _next_start(self) -> tuple[int, Desk] | None:
        last = None
        if self._waits_alone:
            self._waits_alone = any(view_of(item).is_alone for item in self.waiting)
            last = schedule.first_alone(self.waiting, view_of, self.desks, self._is_given)
        affinity = self.policy.affinity if len(self.desks) > 1 else 0
        under_way = self._under_way()
        if last is None and self._measuring.matters(self.desks):
            running_of = self.running_of
            return self._measuring.next_start(self.waiting, self.desks, under_way, self._is_given, running_of)
        return schedule.first_start(self.waiting, view_of, self.desks, under_way, self._is_given, last, affinity)

    def _look_again(self) -> None:
        with self.mutex:
            self.dispatch()

    def wake_all(self) -> None:
        """Have every slot's worker look again, also those that have declined a job."""
        for desk in self.desks:
            desk.has_declined = False
        self.dispatch()
        for desk in self.desks:
            desk.woken.notify()

    def _give(self, desk: Desk, item: Any) -> None:
        desk.slot.change(SlotEvent.OFFER)
        desk.given = item
        desk.inbox.append(item)
        desk.woken.notify()

    def _known(self, position: int) -> Any:
        """The waiting job there, with what we note of jobs: a node may have pushed a plain tuple."""
        item = self.waiting[position]
        if type(item) is not QueueItem and is_item(item):
            item = self.waiting[position] = as_queued(item)
        return item

    def _is_given(self, item: Any) -> bool:
        return any(item is desk.given for desk in self.desks)

    def _under_way(self) -> schedule.UnderWay:
        """The jobs that slots run or are about to."""
        jobs = [desk.slot.run or view_of(desk.given) for desk in self.desks if desk.slot.run or desk.given is not None]
        prompt_ids = [job.prompt_id for job in jobs if job.prompt_id is not None]
        clients = [job.client_id for job in jobs if job.share is None]
        turns = [job.turns for job in jobs if job.turns]
        return schedule.UnderWay(prompt_ids, clients, frozenset().union(*turns))

    # Taking.

    def ask(self, desk: Desk) -> None:
        """The slot's worker enters the queue's `get`."""
        desk.is_asked, desk.is_poked = True, False
        desk.taken.clear()
        self.arrive(desk)

    def leave_to_its_slot(self, desk: Desk) -> bool:
        """Whether the job in this inbox is bound to another slot; it then waits for that one."""
        target = view_of(desk.inbox[0]).target
        if target is None or target == desk.index:
            return False
        self.ledger.remove(desk.inbox[:1])
        self.put(desk.inbox.pop(0), target)
        return True

    def leave_known_jobs(self, desk: Desk) -> None:
        """Take out of an inbox what waits anyway, for another slot: a node pack that finds the inbox empty may put the
        first job of a queue of its own there, which it has given to us before."""
        if any(item is not desk.given for item in desk.inbox):
            known = {(item[0], item[1]) for item in self.waiting if is_item(item) and item is not desk.given}
            desk.inbox[:] = [
                item
                for item in desk.inbox
                if item is desk.given or not is_item(item) or (item[0], item[1]) not in known
            ]

    def arrive(self, desk: Desk) -> None:
        """The slot's worker can take a job."""
        desk.has_declined = False
        if desk.slot.run is None:
            desk.slot.change(SlotEvent.READY)
            self.dispatch()

    def wait(self, desk: Desk, timeout: float | None) -> bool:
        """Wait until the slot has a job or is woken; whether before `timeout` seconds."""
        if desk.inbox:  # Whoever waits although there is a job does not want it: a node pack that pauses its queue.
            self._put_back(desk)
            desk.has_declined = True
            self.dispatch()
        was_woken = desk.woken.wait(timeout)
        if desk.slot.state is not SlotState.OFFERED:
            self.arrive(desk)
        return was_woken

    def poke(self, desk: Desk) -> None:
        """Have the other slots' workers ask anew: a node pack around `get` may keep more jobs in a queue of its own."""
        for other in self.desks:
            if other is not desk and other.slot.state is SlotState.IDLE and not other.inbox:
                other.is_poked = True
                other.woken.notify()

    def take(self, desk: Desk, item_id: int, item: Any) -> None:
        """The slot's worker has taken `item` out of its inbox, and runs it under this number."""
        if desk.given is not None:
            self._remove(desk.given)
            desk.given = None
        queued_at = getattr(item, "queued_at", 0.0)
        if is_item(item) and isinstance(item[3], dict):
            item[3].pop(SETTLED_FIELD, None)
            item[3]["gpu_id"] = desk.index
        if desk.slot.run is None:
            desk.slot.change(SlotEvent.TAKE)
            desk.slot.begin_run(desk.run_of(item), time.monotonic() - queued_at if queued_at else 0.0)
            desk.runs = item
            self.ledger.start(item_id, item)
            view = view_of(item)
            desk.slot.models = view.models or desk.slot.models
            if view.place is not None:
                self._fair_share.started(view.place)
        self.running[item_id], self._owners[item_id] = item, desk
        desk.taken.append(item_id)

    def leave(self, desk: Desk, *, has_run: bool = False) -> None:
        """The slot's worker goes without a job. What it was given, or hands back, waits again."""
        for item_id in desk.taken:
            self._drop(item_id)
            self.ledger.hand_back(item_id, has_run=has_run)
            desk.slot.run = None
        self._put_back(desk)
        if desk.slot.run is None:
            desk.slot.change(SlotEvent.LEAVE)
        self.dispatch()

    def die(self, desk: Desk) -> None:
        """The slot's worker has ended, and its job with it; another will be started."""
        self._put_back(desk)
        for item_id in list(self.running_of(desk)):
            self._drop(item_id)
        if desk.slot.run is not None:  # Whatever kept it from being ended: a slot that runs nothing must go on.
            desk.slot.end_run({"status_str": "error"})
            desk.slot.change(SlotEvent.END)
        desk.slot.change(SlotEvent.DIE)
        self.dispatch()

    def _put_back(self, desk: Desk) -> None:
        given, desk.given = desk.given, None
        for item in [item for item in desk.inbox if item is not given]:
            heapq.heappush(self.waiting, item)
            self._waits_alone = self._waits_alone or bool(view_of(item).is_alone)
        desk.inbox.clear()
        if desk.slot.state is SlotState.OFFERED:
            desk.slot.change(SlotEvent.WITHDRAW)

    # Ending.

    def owner_of(self, item_id: int) -> Desk:
        """The place of the slot that runs the job with this number.

        Raises:
            KeyError: when no slot does.
        """
        return self._owners[item_id]

    def running_of(self, desk: Desk) -> dict[int, Any]:
        """What a slot runs."""
        return {n: self.running[n] for n, owner in self._owners.items() if owner is desk and n in self.running}

    def end(self, item_id: int, status: dict[str, Any] | None) -> None:
        """The job with this number has ended with this status; its slot is about to come back."""
        desk = self._owners[item_id]
        item = desk.runs
        self._drop(item_id)
        if (run := desk.slot.run) is not None:
            if (status or {}).get("status_str") == "success":
                self._measuring.note(self.desks, desk.index, item, run)
            if run.party is not None:
                self._fair_share.ended(run.party, time.monotonic() - run.started_at)
            desk.slot.end_run(status)
            desk.slot.change(SlotEvent.END)
            self.dispatch()  # Another job of the same id may have waited for this one.

    def _drop(self, item_id: int) -> None:
        self.shares.discard(getattr(self.running.pop(item_id, None), "prompt_id", None))
        if (desk := self._owners.pop(item_id, None)) is not None:
            desk.runs = None

    # Closing and opening.

    def close(self, desk: Desk, event: SlotEvent) -> None:
        """The slot ends its job and takes no other; what lies ready for it waits again. Then `dispatch`."""
        if any(item is desk.given for item in desk.inbox):  # Else its worker has taken it out already, and runs it.
            self._put_back(desk)
        desk.slot.change(event)

    def resume(self, desk: Desk) -> None:
        """The slot, which was closed, takes jobs again."""
        desk.slot.change(SlotEvent.RESUME)
        if desk.slot.state is SlotState.STARTING and desk.slot.run is not None:
            desk.slot.change(SlotEvent.TAKE)
        elif desk.given is not None:  # Its worker has it, and has not noted yet that it runs.
            desk.slot.change(SlotEvent.READY)
            desk.slot.change(SlotEvent.OFFER)
        elif desk.is_asked:
            self.arrive(desk)

    # Changing what waits.

    def replace_waiting(self, items: list[Any]) -> None:
        """Let these jobs wait instead of those that did."""
        self.ledger.replace(self.waiting, items)
        self.waiting[:] = items
        heapq.heapify(self.waiting)
        kept = {id(item) for item in items}
        for desk in self.desks:
            if desk.given is not None and id(desk.given) not in kept:
                self._withdraw(desk)
        self.dispatch()

    def change_waiting(self, prompt_id: str, change: Callable[[QueueItem], None]) -> list[QueueItem]:
        """Have `change` done to the waiting jobs of this id; returns these."""
        items = [self._known(place) for place, item in enumerate(self.waiting) if view_of(item).prompt_id == prompt_id]
        taken = [desk.given for desk in self.desks if not desk.inbox]  # Their workers are about to run them.
        items = [item for item in items if not any(item is one for one in taken)]
        for item in items:
            for desk in self.desks:
                if desk.given is item:
                    self._withdraw(desk)
            change(item)
            if self.kinds is not None:
                self.kinds.choose(item)
            self.ledger.change(item)
        heapq.heapify(self.waiting)
        self.dispatch()
        return items

    def discard(self, position: int) -> None:
        """Take the job at this position out of those that wait."""
        item = self.waiting[position]
        self._remove_at(position)
        self.ledger.remove([item])
        for desk in self.desks:
            if desk.given is item:
                self._withdraw(desk)
                self.dispatch()

    def drop_waiting(self, item: Any) -> None:
        """Take a job out of those that wait, which ends in another way. Then `dispatch`."""
        self._remove(item)
        for desk in self.desks:
            if desk.given is item:
                self._withdraw(desk)

    def _withdraw(self, desk: Desk) -> None:
        desk.inbox[:] = [item for item in desk.inbox if item is not desk.given]
        desk.given = None
        desk.slot.change(SlotEvent.WITHDRAW)

    def _remove(self, item: Any) -> None:
        position = next((place for place, other in enumerate(self.waiting) if other is item), None)
        if position is not None:
            self._remove_at(position)

    def _remove_at(self, position: int) -> None:
        """Without looking at all of them, as `heapify` would."""
        last = self.waiting.pop()
        if position < len(self.waiting):
            self.waiting[position] = last
            heapq._siftup(self.waiting, position)  # type: ignore[attr-defined]
            heapq._siftdown(self.waiting, 0, position)  # type: ignore[attr-defined]
