"""Where the participants of one job leave what their shares gave, and the job finds it.

No participant waits for another, and the job waits only for shares that a slot is computing now. What nobody has begun
when the job gets there, or what a slot has failed at, the job computes itself. So two jobs cannot wait for each other,
and a slot that is paused, drained or lost holds up nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Any

from comfy_parallel.errors import ShareLost

POLL_S = 0.1  # An interrupt sets a flag and wakes nobody.


class _Work(Enum):
    WAITING = "waiting"  # A job of its own waits in the queue.
    RUNNING = "running"  # A slot runs it.
    OURS = "ours"  # What is missing of it the parent computes.


class Gathering:
    """The shares of one job, by participant from 1 on, and what each gave to each collector."""

    def __init__(self, participants: int) -> None:
        self._changed = threading.Condition()
        self._work = dict.fromkeys(range(1, participants), _Work.OURS)
        self._lost: dict[int, Callable[[], bool]] = {}
        self._given: dict[tuple[str, int], Any] = {}
        self._tried: set[tuple[str, int]] = set()
        self._is_closed = False

    def offer(self, participant: int) -> None:
        """Any slot may run this share from now on."""
        with self._changed:
            self._work[participant] = _Work.WAITING

    def begin(self, participant: int, is_lost: Callable[[], bool] = lambda: False) -> bool:
        """A slot begins this share; False when it must not, because it is no longer wanted there.

        `is_lost()` says that the slot will never end it.
        """
        with self._changed:
            if self._is_closed or self._work[participant] is not _Work.WAITING:
                return False
            self._work[participant], self._lost[participant] = _Work.RUNNING, is_lost
            return True

    def end(self, participant: int) -> None:
        """The slot has ended this share. What it has not given is the parent's to compute."""
        with self._changed:
            self._work[participant] = _Work.OURS
            self._changed.notify_all()

    def give(self, collector: str, participant: int, values: Any) -> None:
        """Leave what a share gave for a collector. What was given first stays: it is the same."""
        with self._changed:
            self._given.setdefault((collector, participant), values)
            self._changed.notify_all()

    def next_to_compute(self, collector: str, count: int, check: Callable[[], None] = lambda: None) -> int | None:
        """The participant whose share the parent is to compute now; None once the first `count` have given theirs.

        Waits while others compute. `check()` is called all the while, and ends the waiting by an exception.

        Raises:
            ShareLost: when the parent has computed a share and it gave nothing.
        """
        with self._changed:
            while True:
                check()
                missing = [one for one in range(1, count) if (collector, one) not in self._given]
                if not missing:
                    return None
                for participant in reversed(missing):  # The queue gives the first to slots first.
                    if self._work[participant] is not _Work.RUNNING or self._lost[participant]():
                        return self._take(collector, participant)
                self._changed.wait(POLL_S)

    def _take(self, collector: str, participant: int) -> int:
        self._work[participant] = _Work.OURS
        if (collector, participant) in self._tried:
            raise ShareLost(f"the share of participant {participant} gave nothing to node {collector}")
        self._tried.add((collector, participant))
        return participant

    def given(self, collector: str, participant: int) -> Any:
        """What a participant gave for a collector."""
        return self._given[collector, participant]

    def collected(self, collector: str, count: int) -> list[Any]:
        """What the first `count` participants gave, from participant 0 on, without those that had nothing to do."""
        with self._changed:
            given = [self._given[collector, one] for one in range(count)]
            return [values for values in given if values is not None]

    def close(self) -> None:
        """The job has ended: no share is to begin any more."""
        with self._changed:
            self._is_closed = True

    @property
    def is_closed(self) -> bool:
        return self._is_closed
