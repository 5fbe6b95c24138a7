"""Interrupts at random moments among many short jobs, and which jobs then ended otherwise than they may."""

from __future__ import annotations

import random
import threading
import time
from typing import NamedTuple

from tests.host.jobs import await_idle, interrupt, outcome, progress, start_held
from tests.host.server import JSON, HostServer

NOBODY = "a client that is not connected"  # so that no socket carries these jobs' events
RECENT_JOBS = 12


class Window(NamedTuple):
    """From before an interrupt was sent until after it was answered, on one slot or (None) on all."""

    slot: int | None
    start_ms: int
    end_ms: int


class Storm:
    """Each trial submits some short jobs on random slots and interrupts something.

    On leaving the block it waits for all jobs; then ask `wrong_by_id()` or `wrong_by_scope()`.
    """

    def __init__(self, server: HostServer, num_slots: int, seed: int) -> None:
        self.server, self.num_slots, self.seed = server, num_slots, seed
        self.entries: dict[str, JSON] = {}
        self._lock = threading.Lock()
        self._jobs: list[str] = []
        self._must_end: set[str] = set()
        self._may_end: set[str] = set()
        self._windows: list[Window] = []
        self._free_since_ms: dict[str, int] = {}

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_exc_info: object) -> None:
        await_idle(self.server)
        history = self.server.request("GET", "/history")[1]
        previous_end: dict[int, int] = {}
        for job_id, entry in history.items():  # in the order in which the jobs ended
            self._free_since_ms[job_id] = previous_end.get(entry["gpu_id"], 0)
            previous_end[entry["gpu_id"]] = end_ms(entry)
        self.entries = {job_id: history[job_id] for job_id in self._jobs}

    # Trials.

    def interrupt_by_id(self, number: int) -> None:
        """Name a job that surely runs, or one of the latest short ones, which may wait, run or have ended."""
        dice = self._submit_some(number)
        header = dice.choice([None, *range(self.num_slots)])
        if dice.random() < 0.5:
            named = self._hold(dice)
        else:
            named = dice.choice(self._jobs[-RECENT_JOBS:])
            with self._lock:
                self._may_end.add(named)
        interrupt(self.server, named, header)

    def interrupt_slot(self, number: int) -> None:
        """Interrupt what runs on one slot: at least one job that surely runs."""
        dice = self._submit_some(number)
        held = self._hold(dice)
        slot = dice.slot_of[held]
        self._interrupt_scope(slot)

    def interrupt_all(self, number: int) -> None:
        """Interrupt what runs anywhere, among it one job that surely runs."""
        self._hold(self._submit_some(number))
        self._interrupt_scope(None)

    def _interrupt_scope(self, slot: int | None) -> None:
        start = now_ms()
        interrupt(self.server, slot=slot)
        with self._lock:
            self._windows.append(Window(slot, start, now_ms()))

    def _submit_some(self, number: int) -> Dice:
        dice = Dice(f"{self.seed} {number}")
        for _ in range(dice.randint(1, 3)):
            workflow = progress(dice.getrandbits(60), steps=dice.randint(1, 8), ms=dice.randint(1, 4))
            target = dice.choice([None, *range(self.num_slots)])
            job_id = self.server.submit(workflow, target, NOBODY)["prompt_id"]
            with self._lock:
                self._jobs.append(job_id)
        return dice

    def _hold(self, dice: Dice) -> str:
        slot = dice.randrange(self.num_slots)
        with self.server.websocket() as watcher:
            job_id = start_held(self.server, watcher, slot, seed=dice.getrandbits(60))
        dice.slot_of[job_id] = slot
        with self._lock:
            self._jobs.append(job_id)
            self._must_end.add(job_id)
        return job_id

    # Verdicts.

    def count(self, wanted: str) -> int:
        return sum(outcome(entry) == wanted for entry in self.entries.values())

    def wrong_by_id(self) -> list[str]:
        """Jobs that no interrupt named and that did not succeed, and running ones that were named and did."""
        allowed = {job_id: {"success"} for job_id in self.entries}
        allowed.update({job_id: {"success", "interrupted"} for job_id in self._may_end})
        allowed.update({job_id: {"interrupted"} for job_id in self._must_end})
        return [
            f"{job_id}: {outcome(entry)}, not {allowed[job_id]}"
            for job_id, entry in self.entries.items()
            if outcome(entry) not in allowed[job_id]
        ]

    def wrong_by_scope(self) -> list[str]:
        """Jobs interrupted although their slot was in no interrupt's scope while they ran, and survivors."""
        return [f"{job_id}: {fault}" for job_id in self.entries if (fault := self._fault_by_scope(job_id))]

    def _fault_by_scope(self, job_id: str) -> str:
        entry = self.entries[job_id]
        ended = outcome(entry)
        if ended == "success":
            return "was to be interrupted" if job_id in self._must_end else ""
        if ended == "error":
            return "ended as an error"
        # The job took its slot after the slot's previous job had ended; times are whole milliseconds.
        first, last = self._free_since_ms[job_id] - 1, end_ms(entry) + 1
        hit = any(w.slot in (None, entry["gpu_id"]) and w.start_ms <= last and w.end_ms >= first for w in self._windows)
        return "" if hit else f"interrupted on slot {entry['gpu_id']}, which nobody interrupted then"


class Dice(random.Random):
    """A trial's random choices, and the slots it put held jobs on."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.slot_of: dict[str, int] = {}


def now_ms() -> int:
    return int(time.time() * 1000)


def end_ms(entry: JSON) -> int:
    timestamp: int = entry["status"]["messages"][-1][1]["timestamp"]
    return timestamp
