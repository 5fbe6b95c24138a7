"""A signal that ends the process at once: what runs is put back first, so that this run does not count.

To stop the server is the operator's wish and no job's fault.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_NAMES = ("SIGTERM", "SIGHUP")
_MOST_S = 5.0  # that the queue's lock is waited for


def _end_by(number: int) -> None:
    os.kill(os.getpid(), number)


class StoppingAtOnce:
    """Handles the signals that would end the process without a word, and ends it by the same signal."""

    def __init__(self, front: Any, end_by: Callable[[int], None] = _end_by) -> None:
        self._front, self._end_by = front, end_by

    def listen(self) -> Callable[[], None]:
        """Handle these signals from now on, where nobody else does; returns what takes it back."""
        numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
        taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
        try:
            for number in taken:
                signal.signal(number, self._on_signal)
        except ValueError as error:  # not on the main thread
            logger.warning(
                "comfy_parallel: SIGTERM counts as an attempt of the jobs that run, for it is not seen: %s", error
            )
            return lambda: None
        return lambda: _give_back(taken)

    def _on_signal(self, number: int, frame: Any) -> None:
        # Whatever the main thread holds now, it still holds: nothing here may take a lock. A second signal ends it.
        signal.signal(number, signal.SIG_DFL)
        _thread.start_new_thread(self._put_back, (number,))

    def _put_back(self, number: int) -> None:
        if self._front.mutex.acquire(timeout=_MOST_S):  # For good: from now on no job begins or ends.
            self._front.ledger.close()
        else:
            logger.error("comfy_parallel: somebody holds the queue's lock; the runs of this moment count as attempts")
        self._end_by(number)


def _give_back(numbers: list[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
