"""Ending the server in order because a slot has failed, with a status that a service manager starts it again for."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
from typing import Any

from comfy_parallel.slots.stopping import Stopping

logger = logging.getLogger(__name__)

STATUS = 75  # EX_TEMPFAIL of sysexits.h: to start it again is the remedy.
_ENDS_WITHIN_S = 60.0

_status = 0


def prepare() -> None:
    """Have the process end with the status that `Leaving` sets; call it before others register what they do at exit."""
    atexit.register(_exit)


class Leaving:
    """Ends the server once: running jobs have `drain_s` seconds, then they are put back."""

    def __init__(self, front: Any, drain_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._front, self._drain_s, self._loop = front, drain_s, loop
        self._lock = threading.Lock()

    def leave(self) -> None:
        """Begin; returns at once. Safe to call twice."""
        if self._lock.acquire(blocking=False):  # for good
            threading.Thread(target=self._leave, daemon=True, name="comfy_parallel-leaving").start()

    def _leave(self) -> None:
        global _status
        _status = STATUS
        Stopping(self._front, self._drain_s, self._loop).drain(
            f"a slot has failed, and ComfyUI ends with status {STATUS}"
        )
        timer = threading.Timer(_ENDS_WITHIN_S, self._leave_by_force)
        timer.daemon = True
        timer.start()

    def _leave_by_force(self) -> None:
        logger.critical("comfy_parallel: ComfyUI has not ended within %g s, and is ended now", _ENDS_WITHIN_S)
        self._front.ledger.close()
        _exit()


def _exit() -> None:
    """At the exit's end: what is left to torch, with a device that is lost, may raise or hang."""
    if _status:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)
