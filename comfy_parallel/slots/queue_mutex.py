"""The queue's lock, which the host's code and node packs know as `prompt_queue.mutex`.

It is as `threading.RLock`, with one difference: a job that holds it and does not give it back would stop every slot
and the server. Whoever has waited `LIMIT_S` for one and the same hold of a job takes it over; what that job gives back
later has no effect.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from comfy_parallel.slots.slot import Slot, current_slot

logger = logging.getLogger(__name__)

LIMIT_S = 5.0
_LOOKS = 10  # A machine that was asleep makes one long wait of it; the holder then still has the others.


@dataclass(slots=True, eq=False)
class _Hold:
    """One thread's hold. `job_of`: the slot whose job took it, None when it was our code or the server.

    `ours`: how many of the `count` are calls of our own code, in the middle of which nothing may be taken over.
    """

    thread: int
    job_of: Slot | None
    count: int = 1
    ours: int = 0


class QueueMutex:
    """The lock itself, for our code. `public` is the same lock for everybody else."""

    def __init__(self, limit_s: float | None = None) -> None:
        self._block = threading.Lock()
        self._holds: dict[int, _Hold] = {}  # by thread; at most one
        self._taken_away: dict[int, int] = {}  # by thread, how often it will still give back what it has lost
        self._limit_s = limit_s
        self.public = PublicMutex(self)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As of a `threading.RLock`."""
        return self.take(None, 1, blocking, timeout)

    def release(self) -> None:
        """As of a `threading.RLock`."""
        self.drop(1)

    def take(self, job_of: Slot | None, ours: int, blocking: bool = True, timeout: float = -1) -> bool:
        """Hold it once more; whether that was possible in time."""
        me = threading.get_ident()
        hold = self._holds.get(me)
        if hold is not None:
            hold.count += 1
            hold.ours += ours
            return True
        if not self._block.acquire(False) and not (blocking and self._wait(None if timeout < 0 else timeout)):
            return False
        self._holds[me] = _Hold(me, job_of, 1, ours)
        return True

    def drop(self, ours: int) -> None:
        """Give it back once.

        Raises:
            RuntimeError: when the calling thread does not hold it.
        """
        me = threading.get_ident()
        hold = self._holds.get(me)
        if hold is None:
            return self._drop_what_was_lost(me)
        if hold.count > 1:
            hold.count -= 1
            hold.ours -= ours
            return None
        if self._holds.pop(me, None) is hold:  # else it was taken over at this very moment
            self._block.release()
        return None

    def drop_left(self) -> bool:
        """Give back what a job has left taken, which has ended on the calling thread; whether it had."""
        me = threading.get_ident()
        self._taken_away.pop(me, None)
        hold = self._holds.get(me)
        if hold is None or hold.ours or self._holds.pop(me, None) is not hold:
            return False
        self._block.release()
        return True

    def __enter__(self) -> bool:
        return self.take(None, 1)

    def __exit__(self, *_exc_info: object) -> None:
        self.drop(1)

    # What `threading.Condition` asks of an RLock.

    def _is_owned(self) -> bool:
        return threading.get_ident() in self._holds

    def _release_save(self) -> _Hold:
        hold = self._holds.pop(threading.get_ident(), None)
        if hold is None:
            raise RuntimeError("cannot release un-acquired lock")
        self._block.release()
        return hold

    def _acquire_restore(self, hold: _Hold) -> None:
        if not self._block.acquire(False):
            self._wait(None)
        self._holds[hold.thread] = replace(hold)  # Whoever waits tells by the object that it is another hold.

    # Waiting, and taking over.

    def _wait(self, timeout: float | None) -> bool:
        """Wait for the lock; whether it came in time. The caller then notes its hold."""
        deadline = None if timeout is None else time.monotonic() + timeout
        seen, looks = self._holder(), 0
        while True:
            pause_s = (LIMIT_S if self._limit_s is None else self._limit_s) / _LOOKS
            if deadline is not None:
                pause_s = min(pause_s, deadline - time.monotonic())
            if pause_s > 0 and self._block.acquire(timeout=pause_s):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            holder = self._holder()
            looks = looks + 1 if holder is seen else 0
            seen = holder
            if holder is not None and looks >= _LOOKS and self._take_over(holder):
                return True

    def _holder(self) -> _Hold | None:
        return next(iter(list(self._holds.values())), None)

    def _take_over(self, hold: _Hold) -> bool:
        """Take it from a job; whether it was to be had. The lock below stays taken, from now on for the caller."""
        if hold.job_of is None or hold.ours or self._holds.pop(hold.thread, None) is not hold:
            return False
        self._taken_away[hold.thread] = hold.count
        _tell(hold)
        return True

    def _drop_what_was_lost(self, me: int) -> None:
        count = self._taken_away.pop(me, 0)
        if not count:
            raise RuntimeError("cannot release un-acquired lock")
        if count > 1:
            self._taken_away[me] = count - 1


class PublicMutex:
    """The same lock, as the host, its node packs and jobs see it: it is noted which job took it."""

    def __init__(self, mutex: QueueMutex) -> None:
        self._mutex = mutex
        self._is_owned: Callable[[], bool] = mutex._is_owned
        self._release_save: Callable[[], Any] = mutex._release_save
        self._acquire_restore: Callable[[Any], None] = mutex._acquire_restore

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As of a `threading.RLock`."""
        return self._mutex.take(current_slot(), 0, blocking, timeout)

    def release(self) -> None:
        """As of a `threading.RLock`."""
        self._mutex.drop(0)

    def __enter__(self) -> bool:
        return self._mutex.take(current_slot(), 0)

    def __exit__(self, *_exc_info: object) -> None:
        self._mutex.drop(0)


def _tell(hold: _Hold) -> None:
    slot = hold.job_of
    run = None if slot is None else slot.run
    job = "a job that has ended" if run is None else f"job {run.prompt_id}"
    if run is not None:
        run.trouble = "it holds the queue's lock (prompt_queue.mutex)"
    frame = sys._current_frames().get(hold.thread)
    where = "its thread has ended" if frame is None else "".join(traceback.format_stack(frame)[-4:]).rstrip()
    logger.error(
        "%s: %s has not given back the queue's lock (prompt_queue.mutex), and everybody waits for it: it is taken from"
        " the job, and the other slots go on. The job is here:\n%s",
        getattr(slot, "name", "?"),
        job,
        where,
    )
