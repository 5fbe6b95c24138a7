"""Ends the processes of slots at random moments while jobs run, and tells which jobs were lost or ended twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

from tests.host.jobs import message, outcome, progress
from tests.host.server import JSON, POLL_S, HostServer

WAITING = 12  # jobs that are in the queue at any time
READY_S = 180.0
SIGNALS = (signal.SIGKILL, signal.SIGSEGV)


class Kills:
    """Jobs under load, each of which reports some steps, and what became of them. Use it as a context."""

    def __init__(self, server: HostServer, seed: int) -> None:
        self.server, self._dice = server, random.Random(seed)
        self._client = server.websocket()
        self.jobs: list[str] = []
        self.entries: dict[str, JSON] = {}
        self.kills = 0

    def __enter__(self) -> Kills:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.entries = self.server.wait(self.jobs, timeout_s=600)
        self._client.wait_for(lambda event: event["data"].get("prompt_id") == self.jobs[-1] and _is_end(event), 60)
        self._told = Counter(event["data"]["prompt_id"] for event in self._client.events if _is_end(event))
        self._client.close()

    def kill_one(self, number: signal.Signals | None = None) -> None:
        """End the process of a slot that runs a job, once one does, by this signal or one of `SIGNALS`."""
        deadline = time.monotonic() + READY_S
        while not (pids := self._busy()):
            assert time.monotonic() < deadline, "no process slot runs a job"
            time.sleep(POLL_S)
        time.sleep(self._dice.random() * 0.3)
        try:
            os.kill(self._dice.choice(pids), number or self._dice.choice(SIGNALS))
        except ProcessLookupError:
            return self.kill_one(number)
        self.kills += 1
        return None

    def _busy(self) -> list[int]:
        queues = self.server.request("GET", "/queue/all")[1]
        for _ in range(WAITING - queues["total_pending"]):
            workflow = progress(self._dice.getrandbits(60), steps=20, ms=10)
            self.jobs.append(self.server.submit(workflow, client_id=self._client.client_id)["prompt_id"])
        slots = [queue for queue in queues["queues"] if queue["worker"] and queue["running"]]
        return [slot["worker"]["pid"] for slot in slots if slot["worker"]["state"] == "ready"]

    @property
    def doubled(self) -> list[str]:
        """Jobs whose end was told more than once."""
        return [job_id for job_id, count in self._told.items() if count != 1]

    @property
    def lost(self) -> list[str]:
        """Jobs whose end was not told."""
        return [job_id for job_id in self.jobs if job_id not in self._told]

    @property
    def failed(self) -> list[str]:
        """What those say that lost two processes."""
        errors = [entry for entry in self.entries.values() if outcome(entry) == "error"]
        return [message(entry, "execution_error")["exception_message"] for entry in errors]


def _is_end(event: JSON) -> bool:
    return event["type"] in ("execution_success", "execution_error", "execution_interrupted")
