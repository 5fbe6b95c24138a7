"""Where the participants of one job leave what their shares gave, and the job finds it.

No participant waits for another, and the job waits only for shares that a slot is computing now, or that one slot has
failed at and another is about to try. What nobody has begun when the job gets there, the job computes itself. So no two
jobs wait for each other, and a slot that is paused, drained or lost holds up nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from comfy_parallel.errors import ShareLost

MOST_SLOTS_TRIED = 2  # besides the job's own, which is the last


class _Work(Enum):
    FRESH = "fresh"  # It was offered to nobody yet.
    WAITING = "waiting"  # A job of its own waits in the queue.
    RUNNING = "running"  # A slot runs it.
    OURS = "ours"  # What is missing of it the parent computes.


@dataclass(slots=True)
class _Share:
    work: _Work = _Work.FRESH
    is_lost: Callable[[], bool] = bool
    failed_on: frozenset[int] = frozenset()
    tried_here: set[str] = field(default_factory=set)  # the collectors for which the parent has computed it


class Wait(Enum):
    """The answer that the job has to ask again."""

    WAIT = "wait"


class Gathering:
    """The shares of one job, by participant from 1 on, and what each gave to each collector."""

    def __init__(self, participants: int = 1) -> None:
        self._changed = threading.Condition()
        self._shares: dict[int, _Share] = {}
        self._given: dict[tuple[str, int], Any] = {}
        self._is_closed = False
        self.open(participants)

    def open(self, participants: int) -> None:
        """There are so many from now on."""
        with self._changed:
            self._shares = {participant: _Share() for participant in range(1, participants)}

    # The slots' side.

    def offer_next(self, most: int) -> int | None:
        """The first share that was not offered yet, which any slot may run from now on; None when there is none, or
        when `most` are out already."""
        with self._changed:
            out = sum(share.work in (_Work.WAITING, _Work.RUNNING) for share in self._shares.values())
            fresh = next((one for one, share in self._shares.items() if share.work is _Work.FRESH), None)
            if fresh is None or out >= most or self._is_closed:
                return None
            self._shares[fresh].work = _Work.WAITING
            return fresh

    def begin(self, participant: int, is_lost: Callable[[], bool] = bool) -> bool:
        """A slot begins this share; False when it must not, because it is no longer wanted there.

        `is_lost()` says that the slot will never end it.
        """
        with self._changed:
            share = self._shares[participant]
            if self._is_closed or share.work is not _Work.WAITING:
                return False
            share.work, share.is_lost = _Work.RUNNING, is_lost
            return True

    def end(self, participant: int) -> None:
        """The slot has ended this share. What it has not given is the parent's to compute."""
        with self._changed:
            self._shares[participant].work = _Work.OURS
            self._changed.notify_all()

    def fail(self, participant: int, slot: int, may_take: Callable[[frozenset[int]], bool]) -> frozenset[int]:
        """The slot has failed at this share; returns the slots that have when others are to try it, else none.

        `may_take(slots)` says whether one that is not among these could.
        """
        with self._changed:
            share = self._shares[participant]
            share.failed_on |= {slot}
            if len(share.failed_on) < MOST_SLOTS_TRIED and not self._is_closed and may_take(share.failed_on):
                share.work = _Work.WAITING
                return share.failed_on
            return frozenset()

    # The job's side.

    def give(self, collector: str, participant: int, values: Any) -> None:
        """Leave what a share gave for a collector. What was given first stays: it is the same."""
        with self._changed:
            self._given.setdefault((collector, participant), values)
            self._changed.notify_all()

    def next_to_compute(
        self, collector: str, count: int, may_take: Callable[[frozenset[int]], bool] = lambda failed: False
    ) -> int | Wait | None:
        """The participant whose share the parent is to compute now; None once the first `count` have given theirs.

        Raises:
            ShareLost: when the parent has computed a share and it gave nothing.
        """
        with self._changed:
            missing = [one for one in range(1, count) if (collector, one) not in self._given]
            if not missing:
                return None
            fresh = [one for one in missing if self._shares[one].work is _Work.FRESH]
            for participant in (*fresh, *reversed(missing)):  # The queue gives the first to slots first.
                if self._is_free(self._shares[participant], may_take):
                    return self._take(collector, participant)
            return Wait.WAIT

    def _is_free(self, share: _Share, may_take: Callable[[frozenset[int]], bool]) -> bool:
        if share.work is _Work.RUNNING:
            return share.is_lost()
        return not (share.work is _Work.WAITING and share.failed_on and may_take(share.failed_on))

    def _take(self, collector: str, participant: int) -> int:
        share = self._shares[participant]
        share.work = _Work.OURS
        if collector in share.tried_here:
            raise ShareLost(f"the share of participant {participant} gave nothing to node {collector}")
        share.tried_here.add(collector)
        return participant

    def wait(self, timeout_s: float) -> None:
        """Return when something has changed, or after that time."""
        with self._changed:
            self._changed.wait(timeout_s)

    def given(self, collector: str, count: int) -> list[Any]:
        """What each of the first `count` participants gave, from participant 0 on."""
        with self._changed:
            return [self._given[collector, one] for one in range(count)]

    def close(self) -> None:
        """The job has ended: no share is to begin any more."""
        with self._changed:
            self._is_closed = True

    @property
    def is_closed(self) -> bool:
        return self._is_closed
