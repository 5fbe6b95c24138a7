"""The queue as one slot's worker sees it: the way from the host's worker to the queue and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from comfy_parallel.core.scope import Scope, scoped
from comfy_parallel.core.states import SlotState
from comfy_parallel.errors import JobLost, StalledAndWaitsAgain
from comfy_parallel.slots import garbage, own_names, switches
from comfy_parallel.slots.desk import Desk
from comfy_parallel.slots.dispatcher import Dispatcher
from comfy_parallel.slots.items import SENSITIVE, QueueItem, client_of, error_event, error_text, is_item, view_of
from comfy_parallel.slots.older_packs import not_taken_by
from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.slots.tally import Tally

logger = logging.getLogger(__name__)


def through(name: str) -> Callable[..., Any]:
    """A method of a slot's queue: the front's, about that slot only."""

    def method(self: SlotQueue, *args: Any, **kwargs: Any) -> Any:
        with entered(self.slot), scoped(Scope(slot=self.slot.index)):
            return getattr(self.hosts_queue, name)(*args, **kwargs)

    method.__name__ = name
    return method


class SlotQueue:
    """The queue as one slot's worker sees it.

    `hosts_queue` is what the host gave its worker: the front, or what a node pack has put in its place.
    """

    def __init__(self, front: Any, dispatcher: Dispatcher, desk: Desk) -> None:
        self.front = self.hosts_queue = front
        self.slot = desk.slot
        self._dispatcher, self._desk = dispatcher, desk
        self.server, self.mutex, self.not_empty = front.server, dispatcher.mutex.public, desk.woken
        self.tally = Tally(desk.slot)
        self.when_ended: Callable[[Slot, Any], None] = lambda slot, item: None  # after it has come into the history
        self._was_freed = False
        self._taken: Any = None  # the item that `get` gave last, and its number
        self._taken_id = -1

    history = property(lambda self: self._dispatcher.history)
    currently_running = property(lambda self: self._dispatcher.running_of(self._desk))
    flags = property(lambda self: self._desk.flags)
    is_asked = property(lambda self: self._desk.is_asked)

    def running_items(self) -> list[Any]:
        """What this slot runs, in the host's shape: a node pack may note it in one of its own."""
        return [item if is_item(item) else self._taken for item in self.currently_running.values()]

    def put(self, item: tuple[Any, ...]) -> None:
        self.front.put_on(item, self.slot.index)

    def get(self, timeout: float | None = None) -> Any:
        """The next job of this slot and its number; None after `timeout` seconds or when flags are to be handled."""
        if self._was_freed:
            garbage.collect()
        if self.slot.state is not SlotState.FAILED:  # Its device answers no call any more.
            self.front.between_jobs(self._was_freed)
        self._was_freed = False
        if self.slot.process is not None:
            self.slot.process.await_ready()
        with self._dispatcher.mutex:
            self._dispatcher.ask(self._desk)
        try:
            with entered(self.slot):
                taken = self.hosts_queue.get(timeout=timeout)
        finally:
            self._desk.is_asked = False
        with self._dispatcher.mutex:
            self._note(taken)
        if taken is not None:
            self._dispatcher.ledger.flush()  # A job that ends the server must be known to have begun.
            with entered(self.slot):
                own_names.begin_job(taken[0][2] if is_item(taken[0]) else None)
                self.front.job_begins()
        return taken

    def _note(self, taken: Any) -> None:
        """What `get` gave, which may be a node pack's, is what this slot runs."""
        if taken is None:
            self._dispatcher.leave(self._desk)
            return
        item, item_id = taken
        self._taken, self._taken_id = item, item_id
        if self.slot.run is None:
            self._dispatcher.take(self._desk, item_id, item)
        if self.slot.run is not None:  # for the types; and a pack's own item does not tell whose job it is
            self.slot.run.prompt_id, self.slot.run.client_id = item[1], client_of(item)
            self.slot.last_client_id = self.slot.run.client_id
        if not self.front.has_own_get(self.hosts_queue):
            self._dispatcher.poke(self._desk)

    def task_done(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._take_lock_back()
        prompt_id = None if self.slot.run is None else self.slot.run.prompt_id
        with entered(self.slot):
            switches.end_job()
            self.front.job_ends()
            self._tell_queue(item_id, history_result, *args, **kwargs)
        if self.slot.run is not None:  # A node pack has ended the job without the front's method.
            self.front.finish(self._desk, item_id, prompt_id)
        self._dispatcher.ledger.flush()
        self.when_ended(self.slot, self._taken)
        self.tally.job_ended(self._count_waiting)

    def _tell_queue(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """That a job has ended. What a node pack's function does not take, our own adds where that one calls it."""
        tell = self.hosts_queue.task_done
        left_out = not_taken_by(tell, kwargs)
        if left_out:
            kwargs = {name: value for name, value in kwargs.items() if name not in left_out}
        self._desk.left_out = left_out
        try:
            tell(item_id, history_result, *args, **kwargs)
        finally:
            self._desk.left_out = {}

    def _take_lock_back(self) -> None:
        """A job that has ended, on this thread, and has kept the queue's lock would stop everybody."""
        if self._dispatcher.mutex.drop_left():
            logger.warning("%s: its job has ended and left the queue's lock taken; it was given back", self.slot.name)

    def _count_waiting(self) -> int:
        with self._dispatcher.mutex:
            waiting = [view_of(item) for item in self._dispatcher.waiting]
        return sum(view.share is None and view.target in (None, self.slot.index) for view in waiting)

    def set_flag(self, name: str, data: Any) -> None:
        with scoped(Scope(slot=self.slot.index)):
            self.front.set_flag(name, data)

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        with entered(self.slot):
            flags: dict[str, Any] = self.hosts_queue.get_flags(reset)
        self._was_freed = self._was_freed or bool(flags.get("free_memory"))
        if flags:
            self.slot.models = frozenset()
        if flags and reset and self.slot.process is not None:
            self.slot.process.set_flags(flags)
        return flags

    def interrupt_if_running(self, prompt_id: str) -> bool:
        return bool(self.front.interrupt_if_running(prompt_id))

    # A worker that died.

    def fail_running(self, error: BaseException) -> list[str]:
        """End what this slot runs as an error, and tell its client; returns the ids of these jobs."""
        self._take_lock_back()
        with self._dispatcher.mutex:
            if self.slot.run is not None and not self.currently_running:  # A node pack took it out, and failed then.
                self._dispatcher.take(self._desk, self._taken_id, self._taken)
            items = list(zip(self.currently_running, self.running_items(), strict=True))
        if items:
            with entered(self.slot):
                self.front.job_ends()  # first of all: it may have left what the following needs, as logging
        try:
            for item_id, item in items:
                if not self._hand_back(error):
                    self.fail(item_id, item, error)
        finally:
            with self._dispatcher.mutex:
                self._dispatcher.die(self._desk)
        return [item[1] for _, item in items]

    def _hand_back(self, error: BaseException) -> bool:
        """Let a job wait again that stalled or whose process ended, unless it may not begin again; whether it does."""
        item = self._taken
        if not isinstance(error, JobLost | StalledAndWaitsAgain) or type(item) is not QueueItem:
            return False
        if error.has_begun and (item.losses + 1 >= self.front.ledger.most_attempts or not error.may_run_again):
            return False
        item.losses += error.has_begun
        logger.warning("%s: job %s waits again: %s", self.slot.name, item[1], error_text(error))
        self.server.last_node_id, self.slot.models = None, frozenset()
        with entered(self.slot):
            switches.end_job()
            self.front.job_ends()
        if isinstance(item[3], dict):
            item[3]["gpu_id"] = item.target
        with self._dispatcher.mutex:
            self._desk.inbox.append(item)
            self._dispatcher.leave(self._desk, has_run=error.has_begun)
            self.server.queue_updated()
        return True

    def fail(self, item_id: int, item: Any, error: BaseException) -> None:
        """End a job as an error. Nothing here may depend on what the job or its nodes have made."""
        logger.error("%s: job %s ended as an error: %s", self.slot.name, item[1], error_text(error))
        event = error_event(item, error, self.server.last_node_id)
        if self.slot.state is SlotState.FAILED:
            event["exception_message"] += f"\n\n{self.slot.name} has failed: {self.slot.why_suspended}"
        self.server.last_node_id = None  # As the host does at a job's end: who reconnects must not see it run.
        status = self.front.ExecutionStatus(status_str="error", completed=False, messages=[("execution_error", event)])
        outcome = {"history_result": {"outputs": {}, "meta": {}}, "status": status, **self._without_secrets()}
        try:
            self._tell_client(item, "execution_error", event)
            self.task_done(item_id, **outcome)
        finally:  # What nodes have put around these calls may fail; the job ends all the same.
            if self.slot.run is not None or item_id in self.currently_running:
                self._dispatcher.running[item_id] = item
                self.front.record_done(item_id, **outcome)
        self._tell_client(item, "executing", {"node": None, "prompt_id": item[1]})

    def _tell_client(self, item: Any, event: str, data: dict[str, Any]) -> None:
        client_id = client_of(item)
        if client_id is not None and getattr(item, "share", None) is None:
            self.server.send_sync(event, {**data, "gpu_id": self.slot.index}, client_id)

    def _without_secrets(self) -> dict[str, Any]:
        if not self.front.has_secrets:
            return {}
        return {"process_item": lambda item: item[:SENSITIVE] + item[SENSITIVE + 1 :]}
