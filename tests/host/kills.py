"""Ends the processes of slots at random moments while jobs run, and tells which jobs were lost or ran twice."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.host.jobs import message, outcome, queue_ids
from tests.host.server import JSON, POLL_S, HostServer
from tests.host.workflows import Workflow, node

WAITING = 12  # jobs that are in the queue at any time
READY_S = 180.0
SETTLES_S = 600.0
JOB_S = 0.2
EXITS = "CPT_EXITS_ON_USR1"  # With it set, a process of the test nodes (`nodes/ending.py`) takes the last of `WAYS`.

# A hang is a process that says nothing any more. The OOM killer's end is SIGKILL for the kernel, and status 137 for all
# who hear of it from a shell or a container; the first is -9, so here it is the second.
WAYS = {"-9": signal.SIGKILL, "-11": signal.SIGSEGV, "hang": signal.SIGSTOP, "exit 137": signal.SIGUSR1}


class Kills:
    """Jobs under load, each of which notes its runs in a file, and what became of them. Use it as a context."""

    def __init__(self, server: HostServer, seed: int) -> None:
        self.server, self._dice = server, random.Random(seed)
        self._client = server.websocket()
        self._notes = server.base_dir / f"notes-{seed}"
        self._log_began = len(server.log())
        self.jobs: list[str] = []
        self.entries: dict[str, JSON] = {}
        self.ways: Counter[str] = Counter()
        self._killed: set[int] = set()
        self._waits: list[str] = []
        self._told: Counter[str] = Counter()

    def __enter__(self) -> Kills:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.settle(SETTLES_S)
        self._client.close()

    @property
    def kills(self) -> int:
        return self.ways.total()

    def kill_one(self, way: str, within_s: float = READY_S, after_s: float = 0.3) -> None:
        """End the process of a slot that runs jobs in one of `WAYS`, at a random moment in the next `after_s`.

        Raises:
            TimeoutError: when no process runs a job within `within_s`.
        """
        deadline = time.monotonic() + within_s
        while True:
            pids = self._busy()
            if pids:
                time.sleep(self._dice.random() * after_s)
                self._killed.add(pid := self._dice.choice(pids))
                with suppress(ProcessLookupError):  # It has ended meanwhile, and another one is to.
                    os.kill(pid, WAYS[way])
                    self.ways[way] += 1
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"no process of a slot ran a job within {within_s:.0f} s")
            time.sleep(POLL_S)

    def settle(self, within_s: float) -> None:
        """Wait until all jobs have ended, and look what became of each; some may be `unfinished` after that time."""
        deadline = time.monotonic() + within_s
        while True:
            self._waits = [one for ids in queue_ids(self.server) for one in ids]
            history = self.server.request("GET", "/history")[1]
            self._told = Counter(event["data"]["prompt_id"] for event in self._client.events if _is_end(event))
            self.entries = {one: history[one] for one in self.jobs if one in history}
            if (not self._waits and self._told.keys() >= self.entries.keys()) or time.monotonic() > deadline:
                return
            time.sleep(POLL_S * 4)

    def _busy(self) -> list[int]:
        """The processes that run jobs, but for those that are to end already, which the front may not know yet."""
        queues = self.server.request("GET", "/queue/all")[1]
        for _ in range(WAITING - queues["total_pending"]):
            workflow = noting(self._notes, str(len(self.jobs)))
            self.jobs.append(self.server.submit(workflow, client_id=self._client.client_id)["prompt_id"])
        running = [queue["worker"] for queue in queues["queues"] if queue["worker"] and queue["running"]]
        return [one["pid"] for one in running if one["state"] == "ready" and one["pid"] not in self._killed]

    @property
    def unfinished(self) -> list[str]:
        """Jobs that still wait or run."""
        return [job_id for job_id in self.jobs if job_id in self._waits]

    @property
    def lost(self) -> list[str]:
        """Jobs that neither wait nor run and are not in the history, or whose client was not told of their end."""
        ended = [job_id for job_id in self.jobs if job_id not in self._waits]
        return [job_id for job_id in ended if job_id not in self.entries or job_id not in self._told]

    @property
    def doubled(self) -> list[str]:
        """Jobs whose end was told twice, or that ran more often than their attempts say."""
        runs = Counter(self._notes.read_text().split() if self._notes.exists() else ())
        return [
            job_id
            for number, job_id in enumerate(self.jobs)
            if self._told[job_id] > 1
            or (job_id in self.entries and runs[str(number)] > self.entries[job_id].get("attempts", 1))
        ]

    @property
    def again(self) -> int:
        """How often a job was begun again, as its process had ended."""
        return sum(entry.get("attempts", 1) - 1 for entry in self.entries.values())

    @property
    def failed(self) -> list[str]:
        """What those say that lost two processes."""
        errors = [entry for entry in self.entries.values() if outcome(entry) == "error"]
        return [message(entry, "execution_error")["exception_message"] for entry in errors]

    @property
    def ends(self) -> Counter[str]:
        """How the front says that processes ended."""
        said = re.findall(r"\] ([^]]*); it is started again in", self.server.log()[self._log_began :])
        return Counter(re.sub(r"^was ended( by force:)?( by)? ", "", one) for one in said)


def noting(notes: Path, text: str) -> Workflow:
    """Appends a line to a file, then takes a moment."""
    note = node("CPTNote", path=str(notes), text=text, seconds=JOB_S, ends_server=False)
    return {"note": note, "out": node("CPTOut", value=["note", 0])}


def _is_end(event: JSON) -> bool:
    return event["type"] in ("execution_success", "execution_error", "execution_interrupted")
