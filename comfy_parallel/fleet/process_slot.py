"""A slot whose jobs run in a process of its own, as the front sees it.

The slot's thread runs the host's own worker as any other slot's does. Only what the host's executor does happens
elsewhere: the job is sent to the process, which tells its events, and the thread waits for the outcome.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from comfy_parallel.errors import JobLost
from comfy_parallel.fleet import questions
from comfy_parallel.fleet.link import Link, pack, pair, unpack
from comfy_parallel.fleet.numbers import Clerk
from comfy_parallel.fleet.supervisor import Command, Supervisor, Timing
from comfy_parallel.isolation import kept_outputs
from comfy_parallel.slots.slot import Slot, current_slot, entered

logger = logging.getLogger(__name__)

_LOOK_S = 0.02  # how often a waiting thread looks whether its job is to be interrupted
_READER_ENDS_S = 10.0


class _Job:
    """The job that the process runs."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.has_ended = threading.Event()
        self.outcome: bytes | None = None  # None when the process ended before it
        self.lost: str = ""


class ProcessSlot:
    """Keeps a slot's process running and gives it the slot's jobs.

    Args:
        server: the host's, whose clients are told.
        command: makes the process's command, from the file descriptor of its end of the link.
        silent_s: a process that has said nothing for so long is ended.
        requeues: whether a job whose process ended waits again, once.
    """

    kind = "process"
    address: str | None = None

    def __init__(
        self,
        slot: Slot,
        server: Any,
        command: Callable[[int], Command],
        *,
        silent_s: float,
        requeues: bool,
        timing: Timing | None = None,
    ) -> None:
        self.slot = slot
        self._report: dict[str, Any] = {}
        self._server, self._command = server, command
        self._silent_s, self._requeues = silent_s, requeues
        self._supervisor = Supervisor(slot.name, self._prepare, lambda: self._is_ready, ended=self._end, timing=timing)
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._reader: threading.Thread | None = None
        self._job: _Job | None = None
        self._is_ready = False
        self._numbers = itertools.count(1)
        self._clerk = Clerk()
        self._heard: dict[str, Callable[..., None]] = {
            "ready": self._note_ready,
            "event": self._send_event,
            "done": self._note_outcome,
            "ask": self._answer,
            "put": self._put,
            "beat": self._note_report,
            "leaves": self._expect_end,
        }

    takes_shares = True  # It hands over what it makes, in answer to questions.

    @property
    def pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def state(self) -> str:
        return self._supervisor.state

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    @property
    def last_end(self) -> str | None:
        return self._supervisor.last_end

    @property
    def report(self) -> dict[str, Any]:
        """What the process has said last of its device; empty while it starts."""
        return self._report

    def start(self) -> None:
        """Start the process; returns at once."""
        self._supervisor.start()

    def stop(self) -> None:
        """End the process for good."""
        self._supervisor.stop()

    def kill(self, reason: str) -> None:
        """End the process; what it runs is lost."""
        self._supervisor.kill(reason)

    def await_ready(self) -> None:
        self._supervisor.wait_ready()

    def set_flags(self, flags: dict[str, Any]) -> None:
        link = self._link
        try:
            if link is not None:
                link.send("flags", flags)
        except OSError:
            logger.info("%s: its process has just ended, and its memory with it", self.slot.name)

    # A job, on the slot's thread.

    def execute(self, executor: Any, prompt: Any, prompt_id: Any, extra_data: Any, outputs: Any) -> None:
        """Run a job in the process; afterwards `executor` has what the host's worker reads of it.

        Raises:
            JobLost: when the process ended before the job did.
        """
        server = executor.server
        server.client_id = extra_data.get("client_id")
        metadata = getattr(server, "sockets_metadata", {}).get(server.client_id)
        packed = pack(
            {
                "number": 0,
                "prompt_id": prompt_id,
                "prompt": prompt,
                "extra_data": extra_data,
                "outputs": outputs,
                "features": metadata,
                "keeps_outputs": kept_outputs.is_kept(prompt_id),
            }
        )
        outcome = self._run(packed)
        server.last_node_id = None
        if outcome is None:
            executor.success, executor.history_result, executor.status_messages = False, {"outputs": {}, "meta": {}}, []
            told = {"prompt_id": prompt_id, "node_id": "", "node_type": "", "executed": []}
            executor.add_message("execution_interrupted", told, broadcast=True)
            return
        self.slot.stats.memory_retries += outcome["memory_retries"]
        if outcome["error"] is not None:
            raise RuntimeError(f"the process of {self.slot.name} could not take it: {outcome['error']}")
        executor.success = outcome["status"]["completed"]
        executor.status_messages = outcome["status"]["messages"]
        executor.history_result = outcome["history_result"]

    def _run(self, packed: bytes) -> dict[str, Any] | None:
        """A job's outcome; None when it was to be interrupted and its process has ended."""
        job = _Job(next(self._numbers))
        try:
            with self._lock:
                if self._link is None or not self._is_ready:
                    raise JobLost("its process is not there", has_begun=False, may_run_again=True)
                self._job, link = job, self._link
            was_interrupted = self._wait(job, link, packed)
        finally:
            self._job = None
            self._clerk.forget()
        if job.outcome is not None:
            self._supervisor.note_work()
            outcome: dict[str, Any] = unpack(job.outcome)
            return outcome
        if was_interrupted:
            return None
        raise JobLost(f"its process {job.lost}", has_begun=True, may_run_again=self._requeues)

    def _wait(self, job: _Job, link: Link, packed: bytes) -> bool:
        """Wait until the job has ended, or its process; whether it was to be interrupted."""
        run = self.slot.run
        was_interrupted = False
        _send(link, "job", job.number, packed)
        while not job.has_ended.wait(_LOOK_S):
            if run is not None and run.interrupted:
                run.interrupted, was_interrupted = False, True
                _send(link, "interrupt", job.number)
        return was_interrupted or (run is not None and run.interrupted)

    # The process.

    def _prepare(self) -> Command:
        link, fd = pair()
        command = self._command(fd)
        with self._lock:
            self._link = link
        self._reader = threading.Thread(target=self._read, args=(link,), daemon=True, name=f"link-{self.slot.index}")
        self._reader.start()
        return command

    def _end(self, reason: str) -> None:
        """The process has ended; called when all that it has said before can be read."""
        if self._reader is not None:
            self._reader.join(_READER_ENDS_S)
        with self._lock:
            job, link = self._job, self._link
            self._link, self._reader, self._is_ready, self._report = None, None, False, {}
        if link is not None:
            link.close()
        if job is None:
            self._clerk.forget()
        elif not job.has_ended.is_set():
            job.lost = reason
            job.has_ended.set()

    def _read(self, link: Link) -> None:
        with entered(self.slot), suppress(EOFError, OSError):  # Then it has ended, or is about to.
            while (message := link.receive(self._silent_s if self._is_ready else None)) is not None:
                self._hear(message)
            self._supervisor.kill(f"it said nothing for {self._silent_s:g} s")

    def _hear(self, message: tuple[Any, ...]) -> None:
        try:
            self._heard[message[0]](*message[1:])
        except Exception:
            logger.exception("%s: what its process says (%s) cannot be carried out", self.slot.name, message[0])

    def _note_ready(self) -> None:
        self._is_ready = True

    def _expect_end(self, reason: str) -> None:
        logger.error("%s: its process is started again: %s", self.slot.name, reason)
        self._is_ready = False
        self._supervisor.expect_end()

    def _note_report(self, packed: bytes) -> None:
        self._report = unpack(packed)

    def _send_event(self, number: int | None, packed: bytes) -> None:
        """Tell it to the clients; not what comes after its job has ended, which the host's worker here tells itself."""
        job = self._job
        if number is not None and (job is None or job.number != number):
            return
        event, data, sid = unpack(packed)
        if event == "executing" and isinstance(data, dict) and sid is not None:
            self._server.last_node_id = data.get("display_node", data.get("node"))
        self._server.send_sync(event, data, sid)

    def _note_outcome(self, number: int, packed: bytes) -> None:
        with self._lock:
            job = self._job
            if job is None or job.number != number:
                return
            self._job = None  # What is told from now on is not the job's.
        job.outcome = packed
        job.has_ended.set()

    def _answer(self, number: int, question: str, args: tuple[Any, ...]) -> None:
        link = self._link
        if link is None:
            return  # It has ended.
        try:
            answer = (questions if questions.is_known(question) else self._clerk).answer(question, *args)
        except Exception as error:
            logger.exception("%s: its process's question %r could not be answered", self.slot.name, question)
            _send(link, "answer", number, False, f"{type(error).__name__}: {error}")
        else:
            _send(link, "answer", number, True, answer)

    def _put(self, packed: bytes) -> None:
        self._server.prompt_queue.put(unpack(packed))


def _send(link: Link, *message: Any) -> None:
    """Send it; a process that has ended is heard of by its end."""
    try:
        link.send(*message)
    except OSError as error:
        logger.debug("comfy_parallel: not sent: %s", error)


def where_its_slot_runs(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptExecutor.execute`."""

    @functools.wraps(execute)
    def execute_there(
        self: Any, prompt: Any, prompt_id: Any, extra_data: Any = None, execute_outputs: Any = (), **more: Any
    ) -> Any:
        slot = current_slot()
        extra_data = {} if extra_data is None else extra_data
        if slot is None or slot.process is None:
            return execute(self, prompt, prompt_id, extra_data, execute_outputs, **more)
        return slot.process.execute(self, prompt, prompt_id, extra_data, list(execute_outputs))

    return execute_there
