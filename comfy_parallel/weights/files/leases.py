"""Being told before a mapped file is overwritten.

Whoever opens a leased file for writing waits until the lease is given back (fcntl(2), "Leases"; by default 45 s at
most). Without this a file that is overwritten in place changes under running jobs, and one that is cut off kills the
process (SIGBUS).
"""

from __future__ import annotations

import fcntl
import logging
import signal
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

_F_SETSIG, _F_SETOWN_EX, _OWNER_IS_THREAD = 10, 15, 0  # Linux, <fcntl.h>


class Leases:
    """Leases on files; `on_break` is called, on a thread of its own, with the descriptor that must be given back."""

    def __init__(self, on_break: Callable[[int], None]) -> None:
        self._on_break = on_break
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._thread_id: int | None = None
        self._is_ready = threading.Event()
        self._signal = signal.SIGRTMIN + 7

    def take(self, fd: int) -> bool:
        """Whether the file is leased now: not on network file systems, nor if another user owns it or writes to it."""
        with self._lock:
            thread_id = self._start()
            try:
                fcntl.fcntl(fd, _F_SETSIG, self._signal)
                fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("ii", _OWNER_IS_THREAD, thread_id))
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except OSError as error:
                logger.debug("no lease: %s", error)
                return False
            self._held.add(fd)
            return True

    def give_back(self, fd: int) -> None:
        """Let others write to the file. Takes no lock: finalizers call it."""
        if fd in self._held:
            self._held.discard(fd)
            with suppress(BlockingIOError):  # The kernel took it away: a writer had waited too long.
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _start(self) -> int:
        if self._thread_id is None:
            threading.Thread(target=self._watch, name="weight-file-leases", daemon=True).start()
            self._is_ready.wait()
        assert self._thread_id is not None
        return self._thread_id

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {self._signal})
        self._thread_id = threading.get_native_id()
        self._is_ready.set()
        while True:
            signal.sigwait({self._signal})
            with self._lock:  # Who takes a lease at the moment has it in `_held` then.
                held = list(self._held)
            for fd in held:
                try:
                    if fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                        self._on_break(fd)
                except OSError as error:
                    if fd in self._held:  # else its region went meanwhile
                        logger.critical("comfy_parallel: a weight file in use is overwritten: %s", error)
