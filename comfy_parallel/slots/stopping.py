"""SIGTERM with `COMFY_PARALLEL_DRAIN_S`: the jobs that run may end first, for so long."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from comfy_parallel.core.shown import shown

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_LAST_EVENTS_S = 1.0  # After a job's end its worker still tells the client, and the server sends what is queued.


class Stopping:
    """Drains the server at the first SIGTERM, then ends it as Ctrl+C does. A second SIGTERM ends it at once.

    Args:
        drain_s: how many seconds the jobs that run have to end.
        loop: the host's event loop, on the main thread.
    """

    def __init__(self, front: Any, drain_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._front, self._drain_s, self._loop = front, drain_s, loop
        self._was_asked = False
        self._previous: Any = None

    def listen(self) -> Callable[[], object]:
        """Handle SIGTERM from now on; where that cannot be, say so. Returns what takes it back."""
        try:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError as error:  # not on the main thread
            logger.warning("comfy_parallel: COMFY_PARALLEL_DRAIN_S has no effect, SIGTERM cannot be handled: %s", error)
            return lambda: None
        return lambda: signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _on_signal(self, number: int, frame: Any) -> None:
        # Whatever the main thread holds now, it still holds: nothing here may take a lock.
        if self._was_asked or self._loop.is_closed():
            raise KeyboardInterrupt
        self._was_asked = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        threading.Thread(target=self.drain, daemon=True, name="comfy_parallel-drain").start()

    def drain(self, why: str = "SIGTERM") -> None:
        """Wait for the jobs that run, tell which are lost, and end the server."""
        logger.warning("comfy_parallel: %s: no new jobs; those that run have %g s to end", why, self._drain_s)
        self._front.closing.drain_for_good()
        self._await_running()
        seen = self._front.snapshot()
        self._tell_lost("still runs", [item for items in seen.running for item in items])
        self._tell_lost("waits", [item for items in (*seen.pending, seen.unassigned) for item in items])
        if not self._loop.is_closed():  # A second signal may have ended the server meanwhile.
            self._loop.call_soon_threadsafe(self._end)

    def _await_running(self) -> None:
        deadline = time.monotonic() + self._drain_s
        had_jobs = self._runs_jobs()
        while self._runs_jobs() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if had_jobs:
            time.sleep(_LAST_EVENTS_S)

    def _runs_jobs(self) -> bool:
        return any(queue.slot.run is not None for queue in self._front.slot_queues)

    def _tell_lost(self, what: str, items: list[Any]) -> None:
        if items and self._front.ledger.keeps:
            logger.warning("comfy_parallel: %d jobs go on when the server is started again: each %s", len(items), what)
            return
        if items:
            logger.warning("comfy_parallel: %d jobs are lost, because the queue is kept in memory only", len(items))
        for item in items:
            logger.warning("comfy_parallel: lost, it %s: job number %g, prompt_id %s", what, item[0], shown(item[1]))

    def _end(self) -> None:
        if callable(self._previous):  # a node pack's
            self._previous(signal.SIGTERM, None)
        raise KeyboardInterrupt
