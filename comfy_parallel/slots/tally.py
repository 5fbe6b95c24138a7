"""The line in the log that tells how a slot's jobs went, after every tenth job or once a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from comfy_parallel.slots.slot import Slot, SlotStats

logger = logging.getLogger(__name__)

_JOBS = 10
_SECONDS = 60.0


class Tally:
    """Counts one slot's jobs since the last line. Only the slot's own worker calls it, holding no lock.

    `is_told`: whether lines are written; in a slot's own process they are not, for the front writes them.
    """

    is_told = True

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._told_at = time.monotonic()
        self._told = (0, 0.0, 0.0)

    def job_ended(self, count_waiting: Callable[[], int]) -> None:
        """Write the line if it is due. `count_waiting` says how many jobs wait that this slot may take."""
        sums = _sums(self._slot.stats)
        now = time.monotonic()
        jobs = sums[0] - self._told[0]
        if self.is_told and jobs and (jobs >= _JOBS or now - self._told_at >= _SECONDS):
            wait_s, run_s = ((new - old) / jobs for new, old in zip(sums[1:], self._told[1:], strict=True))
            self._told, self._told_at = sums, now
            logger.info("%s", line(self._slot, count_waiting(), wait_s, run_s))


def line(slot: Slot, waiting: int, wait_s: float, run_s: float) -> str:
    """The line: counts since the start, and for how long the jobs since the last line waited and ran on average."""
    stats = slot.stats
    total = _sums(stats)[0]
    return (
        f"📊 [GPU {slot.index}] tasks={total}, success={100 * stats.succeeded / total:.1f}%, queue={waiting}, "
        f"wait={wait_s * 1000:.0f}ms, exec={run_s * 1000:.0f}ms, oom={stats.out_of_memory}, "
        f"interrupted={stats.interrupted}"
    )


def _sums(stats: SlotStats) -> tuple[int, float, float]:
    return stats.succeeded + stats.failed + stats.interrupted, stats.wait_seconds, stats.runs.sum_s
