"""A worker process's side of its link: jobs come from the front instead of over HTTP, and all they tell goes there.

The process is a whole ComfyUI with one slot. Jobs take the usual way through its queue and the host's own worker.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from comfy_parallel.fleet import lifeline, numbers
from comfy_parallel.fleet.link import Link, pack_what_can_be, unpack
from comfy_parallel.isolation import kept_outputs, save_numbers
from comfy_parallel.isolation.shared_numbers import SharedNumbers

logger = logging.getLogger(__name__)

# With colons between: the file descriptor of this end of the link, how many slots the server has, its temp folder.
WORKER = "COMFY_PARALLEL_WORKER"
# The folder in which several complete ComfyUIs tell each other what file numbers their jobs hold.
NUMBERS = "COMFY_PARALLEL_NUMBERS"

# What whoever asks this ComfyUI for something has to know.
SECRET = "COMFY_PARALLEL_SECRET"

BEAT_S = 1.0
LEAVES = 75  # the status of a process whose device is lost to it
_LOST = {"status_str": "error", "completed": False, "messages": []}

Report = Callable[[], dict[str, Any]]


def take(env: MutableMapping[str, str]) -> WorkerSide | None:
    """This process's end of the link to the front; None when it is no slot's process. Afterwards `env` does not tell of
    it, nor of what else a supervising process has given to this one."""
    global _side, _secret
    lifeline.hold(env)
    _secret = env.pop(SECRET, None) or _secret
    shared = env.pop(NUMBERS, None)
    if shared is not None:
        _share_numbers(Path(shared))
    given = env.pop(WORKER, None)
    if given is None:
        return None
    fd, num_slots, temp = given.split(":", 2)
    os.set_inheritable(int(fd), False)
    _side = WorkerSide(Link(int(fd)), int(num_slots), temp)
    return _side


def _share_numbers(folder: Path) -> None:
    try:
        save_numbers.share(SharedNumbers(folder))
    except OSError as error:
        logger.error("comfy_parallel: %s cannot be used (%s): ComfyUIs may overwrite each other's files", folder, error)


def is_worker() -> bool:
    """Whether this process is that of a single slot."""
    return _side is not None


def secret() -> str | None:
    """What a request must bring along; None where anybody may ask."""
    return _secret


_side: WorkerSide | None = None
_secret: str | None = None


class WorkerSide:
    """Runs the front's jobs one after the other, and tells the front of them.

    `num_slots`: of the whole server. `temp`: the front's temp folder.
    """

    def __init__(self, link: Link, num_slots: int, temp: str) -> None:
        self._link, self.num_slots, self.temp = link, num_slots, temp
        self._lock = threading.Lock()
        self._received: int | None = None  # the job that the front waits for
        self._running: int | None = None  # the same, once the host's worker has it
        self._retries_told = 0  # of jobs that ran out of memory
        self._is_interrupted = False  # before the host's worker had it
        self._leaves = False
        self._worker_thread: int | None = None  # the host's worker's
        self._questions = itertools.count()
        self._answers: dict[int, SimpleQueue[tuple[bool, Any]]] = {}

    def serve(self, server: Any, front: Any, report: Report) -> None:
        """Take jobs from now on. `report()` says what the front shows of this slot's device."""
        self._server, self._front, self._queue = server, front, front.slot_queues[0]
        self._get, self._task_done = self._queue.get, self._queue.task_done
        self._queue.get, self._queue.task_done = self._take_job, self._end_job
        self._queue.tally.is_told = False
        front.put = self._put
        save_numbers.keep_by(numbers.keeper(self._ask))
        for target, args in ((self._listen, ()), (self._beat, (report,))):
            threading.Thread(target=target, args=args, daemon=True, name=f"comfy_parallel{target.__name__}").start()
        self._link.send("ready")

    def tell(self, event: Any, data: Any, sid: Any) -> None:
        """Have the front send an event. What the queue here has to say concerns nobody, and what the host's worker says
        between jobs is said by the front's own."""
        is_between_jobs = self._running is None and threading.get_ident() == self._worker_thread
        if event != "status" and not is_between_jobs:
            self._link.send("event", self._running, pack_what_can_be((event, data, sid)))

    def leave(self, reason: str) -> None:
        """This slot's device is lost: the front is to send no more jobs, and the process ends after this one."""
        self._leaves = True
        self._link.send("leaves", reason)

    # What the front says.

    def _listen(self) -> None:
        kinds: dict[str, Callable[..., None]] = {
            "job": self._receive_job,
            "interrupt": self._interrupt,
            "flags": self._set_flags,
            "answer": self._receive_answer,
        }
        try:
            while (message := self._link.receive()) is not None:
                kinds[message[0]](*message[1:])
        except (EOFError, OSError):
            logger.error("comfy_parallel: the front is gone")
        os._exit(1)

    def _receive_job(self, number: int, packed: bytes) -> None:
        with self._lock:
            self._received, self._running, self._is_interrupted = number, None, False
        try:
            job = unpack(packed)
            self._know_client(job)
            if job["keeps_outputs"]:
                kept_outputs.keep_during(job["prompt_id"])
            parts = (job[part] for part in ("number", "prompt_id", "prompt", "extra_data", "outputs"))
            self._queue.put(self._front.host_item(*parts))
        except Exception as error:  # The job ends, and the worker goes on.
            logger.exception("comfy_parallel: a job could not be queued")
            self._answer_job(error=f"{type(error).__name__}: {error}")

    def _know_client(self, job: dict[str, Any]) -> None:
        """What a client can take decides which previews it is sent."""
        known = getattr(self._server, "sockets_metadata", None)
        if known is not None:
            known.clear()
            if job["features"] is not None:
                known[job["extra_data"].get("client_id")] = job["features"]

    def _interrupt(self, number: int) -> None:
        with self._lock:
            run = self._queue.slot.run
            if number == self._running and run is not None:
                run.interrupted = True
            elif number == self._received:
                self._is_interrupted = True

    def _set_flags(self, flags: dict[str, Any]) -> None:
        for name, data in flags.items():
            self._queue.set_flag(name, data)

    def _receive_answer(self, question: int, is_answered: bool, answer: Any) -> None:
        self._answers.pop(question).put((is_answered, answer))

    # What is said to the front.

    def _take_job(self, timeout: float | None = None) -> Any:
        """In the place of the queue's `get`, on the thread of the host's worker."""
        self._worker_thread = threading.get_ident()
        if self._running is not None:
            self._answer_job()  # Whatever kept it from being ended.
        if self._leaves:
            logging.shutdown()
            os._exit(LEAVES)
        taken = self._get(timeout)
        if taken is not None:
            with self._lock:
                self._running = self._received
                if self._is_interrupted and (run := self._queue.slot.run) is not None:
                    run.interrupted = True
        return taken

    def _end_job(self, item_id: int, history_result: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """In the place of the queue's `task_done`."""
        status = kwargs.get("status", args[0] if args else None)
        try:
            self._task_done(item_id, history_result, *args, **kwargs)
        finally:
            self._front.wipe_history()
            self._answer_job(history_result, _LOST if status is None else status._asdict())

    def _answer_job(
        self, history_result: dict[str, Any] | None = None, status: dict[str, Any] = _LOST, error: str | None = None
    ) -> None:
        with self._lock:
            number, self._received, self._running = self._received, None, None
        if number is not None:
            history_result = {"outputs": {}, "meta": {}} if history_result is None else history_result
            retries = self._queue.slot.stats.memory_retries
            outcome = {
                "history_result": history_result,
                "status": status,
                "error": error,
                "memory_retries": retries - self._retries_told,
            }
            self._retries_told = retries
            self._link.send("done", number, pack_what_can_be(outcome))

    def _put(self, item: tuple[Any, ...]) -> None:
        """In the place of the front queue's `put`: a job that a running one queues waits in the front's queue."""
        self._link.send("put", pack_what_can_be(tuple(item)))

    def _ask(self, question: str, *args: Any) -> Any:
        """The front's answer to a question about file numbers, or to one of `fleet.questions`."""
        number, answers = next(self._questions), SimpleQueue[tuple[bool, Any]]()
        self._answers[number] = answers
        self._link.send("ask", number, question, args)
        is_answered, answer = answers.get()
        if not is_answered:
            raise RuntimeError(f"the front could not answer {question!r}: {answer}")
        return answer

    def _beat(self, report: Report) -> None:
        try:
            while True:
                self._link.send("beat", pack_what_can_be(report()))
                time.sleep(BEAT_S)
        except OSError:
            return  # The front is gone, which the listening thread says.


def has_front() -> bool:
    """Whether this process runs the jobs of one slot for a front, which can be asked."""
    return _side is not None


def ask(question: str, *args: Any) -> Any:
    """The front's answer to a question of `fleet.questions`.

    Raises:
        RuntimeError: with the front's reason when it has none.
    """
    if _side is None:
        raise RuntimeError("only the process of a slot has a front to ask")
    return _side._ask(question, *args)


# Patches of a worker's host.


def telling_front(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the host's `PromptServer.send_sync`."""

    @functools.wraps(original)
    def send_sync(self: Any, event: Any, data: Any, sid: Any = None, *args: Any, **kwargs: Any) -> None:
        if _side is not None:
            _side.tell(event, data, sid)

    return send_sync


def telling_front_later(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptServer.send`."""

    @functools.wraps(original)
    async def send(self: Any, event: Any, data: Any, sid: Any = None, *args: Any, **kwargs: Any) -> None:
        if _side is not None:
            _side.tell(event, data, sid)

    return send


def not_listening(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptServer.start_multi_address`: what a node asks of the server goes to the front's port."""

    @functools.wraps(original)
    async def start_multi_address(self: Any, addresses: Any, *args: Any, **kwargs: Any) -> None:
        self.address, self.port = addresses[0]

    return start_multi_address
