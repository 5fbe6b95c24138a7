"""One front queue that the host sees and one queue per slot, all under the front's lock and history.

The classes here are mixed into the host's own `PromptQueue`, so `isinstance` holds and what the host
adds to its queue in later versions is there too.
"""

from __future__ import annotations

import copy
import heapq
import inspect
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from comfy_parallel.core import schedule, scope
from comfy_parallel.slots.host_worker import RunWorker, worker_of
from comfy_parallel.slots.items import SENSITIVE, QueueItem, client_of, error_event
from comfy_parallel.slots.slot import Run, Slot, current_slot, interrupt_job

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """All queues at one moment. Lists by slot index; `unassigned` waits for any slot."""

    running: list[list[QueueItem]]
    pending: list[list[QueueItem]]
    unassigned: list[QueueItem]


def build_queue_class(host_class: type, on_first_get: Callable[[Any, RunWorker], None]) -> type:
    """A subclass of the host's `PromptQueue` to stand in its place.

    `on_first_get(front, run_worker)` is called once, on the host's worker thread, and does not return.
    """
    slot_class = type("SlotPromptQueue", (SlotQueue, host_class), {"__module__": host_class.__module__})
    namespace = {
        "__module__": host_class.__module__,
        "__qualname__": host_class.__qualname__,
        "__doc__": host_class.__doc__,
        "_slot_class": slot_class,
        "_on_first_get": staticmethod(on_first_get),
    }
    return type(host_class.__name__, (FrontQueue, host_class), namespace)


class FrontQueue:
    """The host-facing queue: holds jobs that any slot may take and speaks for all slots."""

    _slot_class: type
    _on_first_get: Callable[[Any, RunWorker], None]

    def __init__(self, server: Any) -> None:
        self.slot_queues: list[Any] = []
        self.default_slot: int | None = None
        self.between_jobs: Callable[[bool], None] = lambda was_freed: None  # `POST /free` was carried out before
        self._arrivals = itertools.count()
        self._is_adopted = False
        super().__init__(server)
        self.not_empty = _EverySlot(self.mutex, self.slot_queues)

    def add_slot(self, slot: Slot) -> Any:
        """Make the queue of one slot."""
        queue = self._slot_class(self, slot)
        self.slot_queues.append(queue)
        return queue

    # Filling.

    def put(self, item: tuple[Any, ...]) -> None:
        self.put_on(item, self._target_of(item))

    def put_on(self, item: tuple[Any, ...], target: int | None) -> None:
        """Queue a host item for one slot, or for whichever slot is free first when `target` is None."""
        queued = QueueItem(item)
        queued.target, queued.queued_at = target, time.monotonic()
        if isinstance(item[3], dict):
            item[3]["gpu_id"] = target
        scope.note_placed(target)
        with self.mutex:
            queued.arrival = next(self._arrivals)
            queue = self if target is None else self.slot_queues[target]
            heapq.heappush(queue.queue, queued)
            self.server.queue_updated()
            if target is None:
                self.wake_chosen()
            else:
                queue.not_empty.notify()

    def wake_chosen(self) -> None:
        """Wake the idle slot that is to take the first of the jobs that any slot may take."""
        if self.queue and (chosen := schedule.chosen_slot(client_of(self.queue[0]), self.slot_queues)):
            self.slot_queues[chosen.index].not_empty.notify()

    def host_item(
        self, number: float, prompt_id: str, prompt: Any, extra_data: dict[str, Any], outputs: list[str]
    ) -> tuple[Any, ...]:
        """A queue item in the shape that this host uses."""
        has_secrets = "process_item" in inspect.signature(self.slot_queues[0].host_task_done).parameters
        return (number, prompt_id, prompt, extra_data, outputs, *([{}] if has_secrets else []))

    def _target_of(self, item: tuple[Any, ...]) -> int | None:
        target = scope.current_scope().target
        if target is None and isinstance(item[3], dict) and item[3].get(scope.BODY_FIELD) is not None:
            where = f"extra_data.{scope.BODY_FIELD}"
            target = scope.parse_target(item[3][scope.BODY_FIELD], len(self.slot_queues), where)
        if target is None:
            slot = current_slot()  # A job queued by a running job relies on what its own executor has cached.
            return self.default_slot if slot is None else slot.index
        return None if target == scope.AUTO else int(target)

    # Emptying.

    def get(self, timeout: float | None = None) -> Any:
        """Called once, by the host's own worker thread, which hereby becomes the first slot's."""
        if self._is_adopted:
            raise RuntimeError("Jobs are taken by slots: use PromptServer.instance.prompt_queues[i].get()")
        self._is_adopted = True
        self._on_first_get(self, worker_of(sys._getframe(1), self))
        raise RuntimeError("The slots have stopped; restart ComfyUI")

    def task_done(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        with self.mutex:
            owners = {running: queue for queue in self.slot_queues for running in queue._running}
            owners[item_id].record_done(item_id, history_result, *args, **kwargs)

    # Looking. Inside a slot only its own running job is shown, as on a server with one worker.

    @property
    def currently_running(self) -> dict[int, QueueItem]:
        slot = current_slot()
        shown = self.slot_queues if slot is None else [self.slot_queues[slot.index]]
        with self.mutex:
            return {item_id: item for queue in shown for item_id, item in queue._running.items()}

    @currently_running.setter
    def currently_running(self, value: dict[int, Any]) -> None:
        if value:
            raise AttributeError("currently_running is kept by the slots' queues and cannot be replaced")

    def snapshot(self) -> Snapshot:
        """What runs and waits now; waiting jobs in the order in which they will be taken."""
        with self.mutex:
            running = [list(queue._running.values()) for queue in self.slot_queues]
            pending = [list(queue.queue) for queue in self.slot_queues]
            unassigned = list(self.queue)
        for waiting in (*pending, unassigned):
            waiting.sort(key=lambda item: (item[0], getattr(item, "arrival", -1)))
        return Snapshot(running, pending, unassigned)

    def get_current_queue_volatile(self) -> tuple[list[Any], list[Any]]:
        with self.mutex:
            running = [item for queue in self._slot_queues_in_scope() for item in queue._running.values()]
            pending = [item for queue in self._queues_in_scope() for item in queue.queue]
        return running, pending

    def get_current_queue(self) -> tuple[list[Any], list[Any]]:
        running, pending = self.get_current_queue_volatile()
        return running, copy.deepcopy(pending)

    def get_tasks_remaining(self) -> int:
        with self.mutex:
            remaining = len(self.queue)
            for queue in self.slot_queues:
                remaining += len(queue.queue) + len(queue._running)
            return remaining

    def gpu_id_of(self, prompt_id: str) -> int | None:
        """The slot that runs, ran or will run a job; None while that is open or when the job is unknown."""
        with self.mutex:
            running, pending = self.get_current_queue_volatile()
            for item in (*running, *pending):
                if item[1] == prompt_id:
                    return item[3].get("gpu_id") if isinstance(item[3], dict) else None
            return self.history.get(prompt_id, {}).get("gpu_id")

    # Changing what waits.

    def wipe_queue(self) -> None:
        with self.mutex:
            for queue in self._queues_in_scope():
                queue.queue.clear()
            self.server.queue_updated()

    def delete_queue_item(self, function: Callable[[Any], bool]) -> bool:
        with self.mutex:
            for queue in self._queues_in_scope():
                for position, item in enumerate(queue.queue):
                    if function(item):
                        del queue.queue[position]
                        heapq.heapify(queue.queue)
                        self.server.queue_updated()
                        return True
        return False

    def interrupt_if_running(self, prompt_id: str) -> bool:
        with self.mutex:
            return interrupt_job(prompt_id)

    # Flags (`POST /free`): every slot gets its own copy.

    def set_flag(self, name: str, data: Any) -> None:
        with self.mutex:
            for queue in self._slot_queues_in_scope():
                queue.flags[name] = data
            self.not_empty.notify_all()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        slot = current_slot()
        owners = self.slot_queues if slot is None else [self.slot_queues[slot.index]]
        with self.mutex:
            return {name: data for queue in owners for name, data in queue.get_flags(reset).items()}

    def _slot_queues_in_scope(self) -> list[Any]:
        meant = scope.current_scope()
        return [queue for queue in self.slot_queues if meant.covers(queue.slot.index)]

    def _queues_in_scope(self) -> list[Any]:
        return ([self] if scope.current_scope().slot is None else []) + self._slot_queues_in_scope()


class _EverySlot(threading.Condition):
    """The front's condition, which nodes may notify: that wakes every slot. Each slot waits on one of its own."""

    def __init__(self, lock: Any, slot_queues: list[Any]) -> None:
        super().__init__(lock)
        self._slot_queues = slot_queues

    def notify(self, n: int = 1) -> None:
        for queue in self._slot_queues:
            queue.not_empty.notify()


class SlotQueue:
    """The jobs of one slot. Its `queue` holds only jobs bound to this slot; `get` also takes from the front."""

    def __init__(self, front: Any, slot: Slot) -> None:
        self.front = front
        self.slot = slot
        self._running: dict[int, QueueItem] = {}
        self.is_waiting = self._was_freed = False
        self.is_returning = False  # Its last job has ended, and its worker has not come back yet.
        super().__init__(front.server)
        self.mutex, self.not_empty = front.mutex, threading.Condition(front.mutex)

    @property
    def history(self) -> dict[str, Any]:
        return self.front.history

    @history.setter
    def history(self, value: dict[str, Any]) -> None:
        if value:
            self.front.history = value

    @property
    def currently_running(self) -> dict[int, QueueItem]:
        return self._running

    @currently_running.setter
    def currently_running(self, value: dict[int, QueueItem]) -> None:
        self._running = value

    def put(self, item: tuple[Any, ...]) -> None:
        self.front.put_on(item, self.slot.index)

    def get(self, timeout: float | None = None) -> tuple[QueueItem, int] | None:
        """The next job of this slot and its id; None after `timeout` seconds or when flags are to be handled."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.front.between_jobs(self._was_freed)
        self._was_freed = False
        with self.not_empty:
            while True:
                self.slot.is_ready, self.is_returning = True, False
                if (item := self._take()) is not None:
                    if (item_id := self._begin(item)) is not None:
                        return item, item_id
                    continue
                if self.flags:
                    return None
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return None
                self.is_waiting = True
                self.not_empty.wait(remaining)
                self.is_waiting = False

    def task_done(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.front.task_done(item_id, history_result, *args, **kwargs)  # Nodes wrap the front's method.

    def record_done(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Move a finished job into the shared history, with the slot that ran it."""
        with self.mutex:
            prompt_id = self._running[item_id][1]
            super().task_done(item_id, history_result, *args, **kwargs)
            entry = self.history[prompt_id]
            entry["gpu_id"] = self.slot.index
            self.slot.end_run(entry.get("status"))
            self.is_returning = True

    def set_flag(self, name: str, data: Any) -> None:
        with self.mutex:
            self.flags[name] = data
            self.not_empty.notify_all()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        flags: dict[str, Any] = super().get_flags(reset)
        self._was_freed = self._was_freed or bool(flags.get("free_memory"))
        return flags

    def wipe_history(self) -> None:
        self.front.wipe_history()

    def interrupt_if_running(self, prompt_id: str) -> bool:
        return self.front.interrupt_if_running(prompt_id)

    def fail_running(self, error: BaseException) -> list[str]:
        """End what this slot runs as an error, and tell its client; returns the ids of these jobs."""
        with self.mutex:
            items = list(self._running.items())
        for item_id, item in items:
            self._fail(item_id, item, error)
        with self.mutex:
            self.is_returning = False  # but after a pause
            self.front.wake_chosen()
        return [item[1] for _, item in items]

    def _take(self) -> QueueItem | None:
        heads = [queue for queue in (self.queue, self.front.queue) if queue]
        if heads and min(heads, key=lambda queue: queue[0]) is self.front.queue and not self._is_chosen():
            heads.remove(self.front.queue)
        if not heads:
            return None
        item = heapq.heappop(min(heads, key=lambda queue: queue[0]))
        return item if isinstance(item, QueueItem) else QueueItem(item)  # A node may have pushed a plain tuple.

    def _is_chosen(self) -> bool:
        """Whether this slot, rather than another idle one, is to take the front's first job."""
        chosen = schedule.chosen_slot(client_of(self.front.queue[0]), self.front.slot_queues, self)
        if chosen is not self.slot:
            self.front.wake_chosen()  # It may sleep: it was busy when the job came.
        return chosen is self.slot

    def _begin(self, item: QueueItem) -> int | None:
        item_id = self.front.task_counter
        self.front.task_counter += 1
        if isinstance(item[3], dict):
            item[3]["gpu_id"] = self.slot.index
        item.__dict__.pop("_json", None)
        self.slot.run = Run(item[1], client_of(item))
        self.slot.last_client_id = self.slot.run.client_id
        self.front.wake_chosen()  # It may have left the next job to this slot.
        if item.queued_at:
            self.slot.stats.wait_seconds += time.monotonic() - item.queued_at
        self._running[item_id] = item  # Whatever goes wrong from here on, the worker can end this job.
        try:
            self._running[item_id] = item.deep_copy()
        except RecursionError as error:
            self._fail(item_id, item, error)
            return None
        self.server.queue_updated()
        return item_id

    def _fail(self, item_id: int, item: QueueItem, error: BaseException) -> None:
        logger.error("%s: job %s ended as an error: %r", self.slot.name, item[1], error)
        event = error_event(item, error, self.server.last_node_id)
        self.server.last_node_id = None  # As the host does at a job's end: who reconnects must not see it run.
        status = self.ExecutionStatus(status_str="error", completed=False, messages=[("execution_error", event)])
        outcome = {"history_result": {"outputs": {}, "meta": {}}, "status": status, **self._without_secrets()}
        try:
            self._tell_client(item, "execution_error", event)
            self.task_done(item_id, **outcome)
        finally:  # What nodes have put around these calls may fail; the job ends all the same.
            if item_id in self._running:
                self.record_done(item_id, **outcome)
        self._tell_client(item, "executing", {"node": None, "prompt_id": item[1]})

    def _tell_client(self, item: QueueItem, event: str, data: dict[str, Any]) -> None:
        client_id = client_of(item)
        if client_id is not None:
            self.server.send_sync(event, {**data, "gpu_id": self.slot.index}, client_id)

    @property
    def host_task_done(self) -> Callable[..., None]:
        """The host's own `task_done`, whose parameters differ between versions."""
        return super().task_done

    def _without_secrets(self) -> dict[str, Any]:
        if "process_item" not in inspect.signature(self.host_task_done).parameters:
            return {}
        return {"process_item": lambda item: item[:SENSITIVE] + item[SENSITIVE + 1 :]}
