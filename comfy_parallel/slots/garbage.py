"""Collecting garbage for certain, while other threads may be collecting."""

from __future__ import annotations

import gc
import logging
import time
from weakref import ref

logger = logging.getLogger(__name__)

_PAUSE_S = 0.001
_LONGEST_WAIT_S = 30.0


class _Probe:
    """Garbage that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def collect() -> None:
    """Free all garbage that there is now.

    `gc.collect()` returns at once, having done nothing, while another thread collects: that other run may have passed
    what this caller has just let go of. Two slots that free their memory at the same time did that to each other.
    """
    deadline = time.monotonic() + _LONGEST_WAIT_S
    gone = ref(_Probe())
    while gone() is not None:
        gc.collect()
        if gone() is not None:
            if time.monotonic() > deadline:
                logger.warning("comfy_parallel: garbage was not collected, for a collection on another thread hangs")
                return
            time.sleep(_PAUSE_S)
