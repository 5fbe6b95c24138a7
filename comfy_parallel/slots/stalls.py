"""Finds jobs that have shown no sign of life for too long, and does about them what the operator wants.

A sign of life is any event that the job sends: a node begins, a step is done, a preview is shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from comfy_parallel.config import REPORT, REQUEUE
from comfy_parallel.errors import JobStalled, StalledAndWaitsAgain
from comfy_parallel.slots.slot import Run, Slot, current_slot, slots

logger = logging.getLogger(__name__)


def watch(after_s: float, policy: str) -> Callable[[], None]:
    """Look now and then from now on, unless `after_s` is 0; returns what ends that."""
    return Stalls(after_s, policy).start() if after_s else lambda: None


class Stalls:
    """Looks at all slots.

    Args:
        after_s: a job without a sign of life for so long is stalled.
        policy: `report` only says so; `fail` interrupts the job, which then fails with the reason; `requeue` has it
            wait again, once.
    """

    def __init__(self, after_s: float, policy: str) -> None:
        self._after_s, self._policy = after_s, policy
        self._is_ended = threading.Event()

    def start(self) -> Callable[[], None]:
        """Look now and then from now on; returns what ends that."""
        threading.Thread(target=self._look_now_and_then, daemon=True, name="comfy_parallel-stalls").start()
        return self._is_ended.set

    def _look_now_and_then(self) -> None:
        while not self._is_ended.wait(min(self._after_s / 4, 5.0)):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Tell of each stalled job once, and once more when an interrupt has not ended it."""
        for slot in slots():
            run = slot.run
            if run is None or now - run.alive_at < self._after_s:
                continue
            run.alive_at = now
            if run.stalls == 0:
                self._act(slot, run)
            elif run.stalls == 1 and self._policy != REPORT:
                logger.error(
                    "%s: job %s does not react to the interrupt; no thread can be ended from outside. The slot is free"
                    " again when the job ends by itself, or after a restart; a slot in a process of its own is ended",
                    slot.name,
                    run.prompt_id,
                )
            run.stalls += 1

    def _act(self, slot: Slot, run: Run) -> None:
        reason = f"no sign of life for {self._after_s:g} s (COMFY_PARALLEL_STALL_S)"
        if run.trouble is not None:
            reason = f"{reason}; {run.trouble}"
        done = {REPORT: "left as it is", REQUEUE: "interrupted, to run once more"}.get(self._policy, "interrupted")
        logger.error("%s: job %s is stalled: %s; %s", slot.name, run.prompt_id, reason, done)
        if self._policy == REPORT:
            return
        if slot.process is not None:
            slot.process.kill(f"job {run.prompt_id} gave {reason}")
            return
        run.stalled = StalledAndWaitsAgain(reason) if self._policy == REQUEUE else JobStalled(reason)
        run.interrupted = True


def raise_if_stalled() -> None:
    """Where a job learns that it was interrupted: because it had stalled?

    Raises:
        JobStalled: a node's error.
        StalledAndWaitsAgain: passes through the host's handling of node errors.
    """
    slot = current_slot()
    if slot is not None and slot.run is not None and (stalled := slot.run.stalled) is not None:
        slot.run.stalled = None
        raise stalled
