"""Small stand-ins for the host: its queue, its server, its items."""

from __future__ import annotations

import copy
import heapq
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from comfy_parallel.slots.queues import build_queue_class
from comfy_parallel.slots.slot import Slot, set_slots

MAX_HISTORY = 10000


class FakeServer:
    """Like the host's PromptServer, it asks the queue for its length whenever the queue changes."""

    def __init__(self) -> None:
        self.prompt_queue: Any = None
        self.last_node_id: str | None = None
        self.remaining: list[int] = []
        self.sent: list[tuple[str, dict[str, Any], Any]] = []

    def queue_updated(self) -> None:
        self.remaining.append(self.prompt_queue.get_tasks_remaining())

    def send_sync(self, event: str, data: dict[str, Any], sid: Any = None) -> None:
        self.sent.append((event, data, sid))


class PromptQueue:
    """What the slots' queues rely on of the host's class of this name."""

    class ExecutionStatus(NamedTuple):
        status_str: str
        completed: bool
        messages: list[Any]

    def __init__(self, server: Any) -> None:
        self.server = server
        self.mutex = threading.RLock()
        self.not_empty = threading.Condition(self.mutex)
        self.task_counter = 0
        self.queue: list[Any] = []
        self.currently_running: dict[int, Any] = {}
        self.history: dict[str, Any] = {}
        self.flags: dict[str, Any] = {}

    def put(self, item: Any) -> None:
        with self.mutex:
            heapq.heappush(self.queue, item)
            self.server.queue_updated()
            self.not_empty.notify()

    def task_done(self, item_id: int, history_result: Any, status: Any, process_item: Any = None) -> None:
        with self.mutex:
            prompt = self.currently_running.pop(item_id)
            if len(self.history) > MAX_HISTORY:
                self.history.pop(next(iter(self.history)))
            if process_item is not None:
                prompt = process_item(prompt)
            done = None if status is None else copy.deepcopy(status._asdict())
            self.history[prompt[1]] = {"prompt": prompt, "outputs": {}, "status": done}
            self.history[prompt[1]].update(history_result)
            self.server.queue_updated()

    def get_current_queue(self) -> tuple[list[Any], list[Any]]:
        with self.mutex:
            return list(self.currently_running.values()), copy.deepcopy(self.queue)

    def get_tasks_remaining(self) -> int:
        with self.mutex:
            return len(self.queue) + len(self.currently_running)

    def wipe_queue(self) -> None:
        with self.mutex:
            self.queue = []
            self.server.queue_updated()

    def delete_queue_item(self, function: Callable[[Any], bool]) -> bool:
        with self.mutex:
            for position, item in enumerate(self.queue):
                if function(item):
                    self.queue.pop(position)
                    heapq.heapify(self.queue)
                    self.server.queue_updated()
                    return True
        return False

    def get_history(self, prompt_id: str | None = None) -> dict[str, Any]:
        with self.mutex:
            if prompt_id is None:
                return dict(self.history)
            return {prompt_id: self.history[prompt_id]} if prompt_id in self.history else {}

    def wipe_history(self) -> None:
        with self.mutex:
            self.history = {}

    def delete_history_item(self, id_to_delete: str) -> None:
        with self.mutex:
            self.history.pop(id_to_delete, None)

    def set_flag(self, name: str, data: Any) -> None:
        with self.mutex:
            self.flags[name] = data
            self.not_empty.notify()

    def get_flags(self, reset: bool = True) -> dict[str, Any]:
        with self.mutex:
            flags = self.flags
            if reset:
                self.flags = {}
            return dict(flags)


class OlderPromptQueue(PromptQueue):
    """As in hosts whose items have no sensitive part."""

    def task_done(self, item_id: int, history_result: Any, status: Any) -> None:  # type: ignore[override]
        super().task_done(item_id, history_result, status)


def make_slots(*devices: str) -> tuple[Slot, ...]:
    """Make the process's slots, one per device."""
    made = tuple(Slot(index, device) for index, device in enumerate(devices))
    set_slots(made)
    return made


def make_front(
    *devices: str,
    host_class: type = PromptQueue,
    on_first_get: Callable[[Any], None] = lambda front: None,
) -> Any:
    """A front queue with a slot for each device, all idle."""
    server = FakeServer()
    front = build_queue_class(host_class, on_first_get)(server)
    server.prompt_queue = front
    for slot in make_slots(*devices):
        front.add_slot(slot)
    return front


def host_item(prompt_id: str, number: float = 0, **extra_data: Any) -> tuple[Any, ...]:
    """A job as the host's `POST /prompt` queues it; the last part must not reach the history."""
    prompt = {"1": {"class_type": "Node", "inputs": {"text": prompt_id}}}
    return (number, prompt_id, prompt, extra_data, ["1"], {"api_key_comfy_org": "secret"})


def succeeded(*messages: Any) -> Any:
    return PromptQueue.ExecutionStatus("success", True, list(messages))


def failed(*messages: Any) -> Any:
    return PromptQueue.ExecutionStatus("error", False, list(messages))


def take(queue: Any) -> str | None:
    """The id of the next job, which then runs; None when there is none for this slot."""
    taken = queue.get(timeout=0)
    return None if taken is None else taken[0][1]


def run_next(queue: Any, status: Any = None) -> str | None:
    """Take the next job and end it; its id."""
    taken = queue.get(timeout=0)
    if taken is None:
        return None
    item, item_id = taken
    queue.task_done(item_id, {"outputs": {}}, status=status or succeeded())
    prompt_id: str = item[1]
    return prompt_id


def run_all(queue: Any) -> list[str]:
    """Run what waits for this slot; the ids in the order in which they ran."""
    return list(iter(lambda: run_next(queue), None))


def in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run on a daemon thread, so that a deadlock fails the test and does not hang the run."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
