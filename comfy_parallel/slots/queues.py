"""The host's queue, as the host and its nodes see it, in front of the dispatcher; and what each slot's worker sees.

The classes here are mixed into the host's own `PromptQueue`, so `isinstance` holds and what the host adds to its
queue in later versions is there too. Node packs wrap or replace the queue's methods, on the object or on its class:
each slot's worker calls what is there then, in its slot.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any

from comfy_parallel.core import scope
from comfy_parallel.slots.askers import asker_of
from comfy_parallel.slots.closing import Closing
from comfy_parallel.slots.desk import Desk
from comfy_parallel.slots.dispatcher import Dispatcher
from comfy_parallel.slots.items import QueueItem, QuickStatus, is_item, named_target, order_of, view_of
from comfy_parallel.slots.room import check_may_wait
from comfy_parallel.slots.running_jobs import RunningJobs
from comfy_parallel.slots.shares import Shares, is_share, jobs
from comfy_parallel.slots.slot import Slot, current_runs, current_slot, interrupt_job
from comfy_parallel.slots.slot_queue import SlotQueue, through
from comfy_parallel.slots.snapshot import Snapshot


def build_queue_class(host_class: type, on_first_get: Callable[[Any], None]) -> type:
    """A subclass of the host's `PromptQueue` to stand in its place. All its objects are faces of one dispatcher.

    `on_first_get(front)` is called when a thread outside of all slots asks for a job, and does not return.
    """
    methods = [name for name, value in vars(host_class).items() if inspect.isfunction(value) and name[0] != "_"]
    inherited = {name: through(name) for name in methods if name not in vars(SlotQueue)}
    slot_class = type("SlotPromptQueue", (SlotQueue, host_class), {"__module__": host_class.__module__, **inherited})
    dispatcher = Dispatcher()
    namespace: dict[str, Any] = {
        "__module__": host_class.__module__,
        "__qualname__": host_class.__qualname__,
        "__doc__": host_class.__doc__,
        "_slot_class": slot_class,
        "_on_first_get": staticmethod(on_first_get),
        "_dispatcher": dispatcher,
        "closing": Closing(dispatcher),
        "shares": Shares(dispatcher),
        "slot_queues": [],
    }
    return type(host_class.__name__, (FrontQueue, host_class), namespace)


class _Shared:
    """An attribute that all faces have in common. What the host's `__init__` sets it to is left out."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, face: Any, owner: type | None = None) -> Any:
        return self if face is None else getattr(face._dispatcher, self._name)

    def __set__(self, face: Any, value: Any) -> None:
        if face._is_made:
            setattr(face._dispatcher, self._name, value)


class FrontQueue:
    """The host-facing queue: it takes jobs in, tells what waits and runs, and speaks for all slots."""

    _slot_class: type
    _on_first_get: Callable[[Any], None]
    _dispatcher: Dispatcher
    closing: Closing
    shares: Shares
    slot_queues: list[Any]
    _is_made = False
    history = _Shared()
    task_counter = _Shared()
    default_slot = _Shared()
    between_jobs = _Shared()
    job_begins = _Shared()
    job_ends = _Shared()
    is_started = _Shared()
    policy = _Shared()
    ledger = _Shared()
    job_recorded = _Shared()

    def __init__(self, server: Any) -> None:
        super().__init__(server)
        self._is_made = True
        self.mutex = self._dispatcher.mutex.public
        self.not_empty = _EverySlot(self._dispatcher)
        self._running = RunningJobs(self._dispatcher)

    def add_slot(self, slot: Slot) -> Any:
        """Make the queue of one slot."""
        self.slot_queues.append(self._slot_class(self, self._dispatcher, self._dispatcher.add_slot(slot)))
        return self.slot_queues[-1]

    def is_behind(self, queue: Any) -> bool:
        """Whether `queue` is a face of the same jobs, or a node pack's own object that holds one."""
        held = [queue, *(vars(queue).values() if hasattr(queue, "__dict__") else ())]
        return any(isinstance(one, FrontQueue) and one._dispatcher is self._dispatcher for one in held)

    def start(self, hosts_queue: Any) -> None:
        """The workers start; the host gave its own worker this queue."""
        self.is_started = True
        for queue in self.slot_queues:
            queue.hosts_queue = hosts_queue

    # Filling.

    def put(self, item: tuple[Any, ...]) -> None:
        self.put_on(item, self._target_of(item))

    def put_on(self, item: tuple[Any, ...], target: int | None) -> None:
        """Queue a host item for one slot, or for whichever slot is free first when `target` is None.

        Raises:
            Draining: when a client's request brought it, and no slot that it may go to takes new jobs.
            QueueFull: when a client's request brought it, and as many wait as may.
        """
        if is_item(item) and isinstance(item[3], dict):
            item[3].pop(scope.SETTLED_FIELD, None)
            item[3]["gpu_id"] = target
        scope.note_placed(target)
        with self._dispatcher.mutex:
            if scope.is_of_request():
                self.closing.check(target)
                if (known := self.ledger.repeated(item, self.history)) is not None:
                    scope.current_scope().repeated = known
                    return
                check_may_wait(self._dispatcher.waiting, self._dispatcher.policy, item, target)
            self._dispatcher.put(item, target, asker_of(scope.current_scope(), item))
            self.server.queue_updated()

    def host_item(
        self, number: float, prompt_id: str, prompt: Any, extra_data: dict[str, Any], outputs: list[str]
    ) -> tuple[Any, ...]:
        """A queue item in the shape that this host uses."""
        return (number, prompt_id, prompt, extra_data, outputs, *([{}] if self.has_secrets else []))

    @property
    def has_secrets(self) -> bool:
        """Whether this host's items end with keys that must not reach the history."""
        return "process_item" in inspect.signature(super().task_done).parameters

    def _target_of(self, item: Any) -> int | None:
        """The slot that a job is bound to. A request names it in its scope, by header or body; else the item may."""
        target = scope.current_scope().target
        if target is None:
            target = named_target(item)
        if target is None:
            slot = current_slot()  # A job queued by a running job relies on what its own executor has cached.
            return self.closing.unless_failed(self.default_slot) if slot is None else slot.index
        return None if target == scope.AUTO else int(target)

    # Emptying.

    @property
    def queue(self) -> list[Any]:
        """The jobs that wait. To a slot's worker that asks for a job, the one that it is to take."""
        desk = self._asking()
        return self._dispatcher.waiting if desk is None else desk.inbox

    @queue.setter
    def queue(self, items: list[Any]) -> None:
        if not self._is_made:
            return
        with self._dispatcher.mutex:
            if (desk := self._asking()) is not None:
                desk.inbox[:] = items
            elif items is not self._dispatcher.waiting:
                self._dispatcher.replace_waiting(list(items))

    def _asking(self) -> Desk | None:
        slot = current_slot()
        desk = None if slot is None else self._dispatcher.desks[slot.index]
        return desk if desk is not None and desk.is_asked else None

    def get(self, timeout: float | None = None) -> Any:
        """The calling slot's next job and its number; None after `timeout` seconds or when flags are to be handled."""
        slot = current_slot()
        if slot is None:
            self._on_first_get(self)
            raise RuntimeError("The slots have stopped; restart ComfyUI")
        desk = self._dispatcher.desks[slot.index]
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._dispatcher.mutex:
            while True:
                self._dispatcher.leave_known_jobs(desk)
                if desk.inbox:
                    if not self._dispatcher.leave_to_its_slot(desk) and (taken := self._take(desk)) is not None:
                        return taken
                    continue
                remaining = None if deadline is None else deadline - time.monotonic()
                if desk.flags or desk.is_poked or (remaining is not None and remaining <= 0):
                    return None
                self._dispatcher.wait(desk, remaining)

    def _take(self, desk: Desk) -> tuple[Any, int] | None:
        """The job that the slot was given; None when it had to end at once."""
        item = desk.inbox.pop(0)
        item_id = self.task_counter
        self.task_counter += 1
        self._dispatcher.take(desk, item_id, item)  # Whatever goes wrong from here on, the worker can end this job.
        try:
            self._dispatcher.running[item_id] = item.deep_copy() if type(item) is QueueItem else copy.deepcopy(item)
        except RecursionError as error:
            self.slot_queues[desk.index].fail(item_id, item, error)
            self._dispatcher.arrive(desk)
            return None
        self.server.queue_updated()
        return item, item_id

    @staticmethod
    def has_own_get(queue: Any) -> bool:
        """Whether nobody has put anything around the `get` of this queue."""
        return getattr(queue.get, "__func__", None) is FrontQueue.get

    def task_done(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.record_done(item_id, history_result, *args, **kwargs)

    def record_done(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Move a job that has ended into the history. Node packs wrap `task_done`, not this."""
        if kwargs.get("status") is not None:
            kwargs["status"] = QuickStatus(kwargs["status"])
        with self._dispatcher.mutex:
            desk, item = self._dispatcher.owner_of(item_id), self._dispatcher.running[item_id]
            if is_share(item):
                self._dispatcher.end(item_id, kwargs["status"]._asdict())
                return
            super().task_done(item_id, history_result, *args, **{**desk.left_out, **kwargs})
            self.finish(desk, item_id, item[1])

    def finish(self, desk: Desk, item_id: int, prompt_id: Any) -> None:
        """Note in the history where a job ran, which has just come there, and let its slot come back."""
        with self._dispatcher.mutex:
            entry = self.history.get(prompt_id, {})
            if entry:
                entry["gpu_id"] = desk.index
            self.ledger.end(item_id, prompt_id, entry, self.history)
            self._dispatcher.end(item_id, entry.get("status"))
            if entry:
                self.job_recorded(entry, desk.index)

    def wipe_history(self) -> None:
        with self._dispatcher.mutex:
            super().wipe_history()
            self.ledger.match(self.history)

    def delete_history_item(self, id_to_delete: str) -> None:
        with self._dispatcher.mutex:
            super().delete_history_item(id_to_delete)
            self.ledger.match(self.history)

    # Looking.

    @property
    def currently_running(self) -> RunningJobs:
        return self._running

    @currently_running.setter
    def currently_running(self, value: dict[int, Any]) -> None:
        if value:
            raise AttributeError("currently_running is kept by the slots and cannot be replaced")

    def snapshot(self) -> Snapshot:
        """What runs and waits now; waiting jobs in the order in which they will be taken."""
        with self._dispatcher.mutex:
            running = [queue.running_items() for queue in self.slot_queues]
            waiting = [item for item in self._dispatcher.waiting if is_item(item) and not is_share(item)]
        waiting.sort(key=order_of)
        pending: list[list[Any]] = [[] for _ in running]
        unassigned: list[Any] = []
        for item in waiting:
            target = view_of(item).target
            (unassigned if target is None else pending[target]).append(item)
        return Snapshot(running, pending, unassigned, [run.prompt_id for run in current_runs() if run.is_resting])

    def get_current_queue_volatile(self) -> tuple[list[Any], list[Any]]:
        slot = scope.current_scope().slot
        with self._dispatcher.mutex:
            waiting = jobs(self._dispatcher.waiting)
            if slot is None:
                return jobs(self._running.values()), waiting
            running = self._dispatcher.running_of(self._dispatcher.desks[slot]).values()
            return jobs(running), [item for item in waiting if view_of(item).target == slot]

    def get_current_queue(self) -> tuple[list[Any], list[Any]]:
        running, pending = self.get_current_queue_volatile()
        return running, [item.deep_copy() if type(item) is QueueItem else copy.deepcopy(item) for item in pending]

    def get_tasks_remaining(self) -> int:
        with self._dispatcher.mutex:
            return len(self._dispatcher.waiting) + len(self._dispatcher.running) - len(self._dispatcher.shares)

    def gpu_ids(self, prompt_ids: list[Any]) -> dict[Any, int | None]:
        """The slot that runs, ran or will run each job; None while that is open or when the job is unknown."""
        found: dict[Any, int | None] = dict.fromkeys(prompt_ids)
        with self._dispatcher.mutex:
            for prompt_id in found:
                found[prompt_id] = self.history.get(prompt_id, {}).get("gpu_id")
            for item in (*self._dispatcher.waiting, *self._dispatcher.running.values()):
                if is_item(item) and item[1] in found:
                    found[item[1]] = item[3].get("gpu_id") if isinstance(item[3], dict) else None
        return found

    def gpu_id_of(self, prompt_id: str) -> int | None:
        """As `gpu_ids`, of one job."""
        return self.gpu_ids([prompt_id])[prompt_id]

    # Changing what waits.

    def change_waiting(
        self, prompt_id: str, target: int | str | None = None, priority: int | None = None
    ) -> list[QueueItem]:
        """Have the waiting jobs of this id wait for another slot (any with `scope.AUTO`), or with another priority.

        Returns these jobs; none when none waits. What is None stays.

        Raises:
            Draining: when that slot takes no new jobs.
        """

        def change(item: QueueItem) -> None:
            if target is not None:
                item.target = target if isinstance(target, int) else None
                item[3]["gpu_id"], item[3][scope.SETTLED_FIELD] = item.target, target
            if priority is not None:
                item.priority = item[3]["priority"] = priority
            item.forget_json()

        with self._dispatcher.mutex:
            if target is not None:
                self.closing.check(target)
            changed = self._dispatcher.change_waiting(prompt_id, change)
        if changed:
            self.server.queue_updated()
        return changed

    def wipe_queue(self) -> None:
        slot = scope.current_scope().slot
        with self._dispatcher.mutex:
            waiting = self._dispatcher.waiting
            kept = [item for item in waiting if is_share(item) or slot not in (None, view_of(item).target)]
            self._dispatcher.replace_waiting(kept)
            self.server.queue_updated()

    def delete_queue_item(self, function: Callable[[Any], bool]) -> bool:
        slot = scope.current_scope().slot
        with self._dispatcher.mutex:
            for position, item in enumerate(self._dispatcher.waiting):
                if not is_share(item) and (slot is None or view_of(item).target == slot) and function(item):
                    self._dispatcher.discard(position)
                    self.server.queue_updated()
                    return True
        return False

    def interrupt_if_running(self, prompt_id: str) -> bool:
        with self._dispatcher.mutex:
            return interrupt_job(prompt_id)

    # Flags (`POST /free`): every slot gets its own copy.

    def set_flag(self, name: str, data: Any) -> None:
        with self._dispatcher.mutex:
            for desk in self._dispatcher.desks:
                if scope.current_scope().covers(desk.index):
                    desk.flags[name] = data
                    desk.woken.notify()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        slot = current_slot()
        with self._dispatcher.mutex:
            desks = self._dispatcher.desks if slot is None else [self._dispatcher.desks[slot.index]]
            flags = {name: data for desk in desks for name, data in desk.flags.items()}
            for desk in desks if reset else ():
                desk.flags = {}
        return flags


class _EverySlot(threading.Condition):
    """The front's condition, which nodes may notify: that wakes every slot. A slot's worker waits on one of its own."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher.mutex.public)  # type: ignore[arg-type]  # It has all that is asked of an RLock.
        self._dispatcher = dispatcher

    def wait(self, timeout: float | None = None) -> bool:
        slot = current_slot()
        desk = None if slot is None else self._dispatcher.desks[slot.index]
        if desk is None or not desk.is_asked:
            return super().wait(timeout)
        return self._dispatcher.wait(desk, timeout)

    def notify(self, n: int = 1) -> None:
        super().notify(n)
        self._dispatcher.wake_all()
