"""Being told before a mapped file is overwritten.

Whoever opens a leased file for writing waits until the lease is given back (fcntl(2), "Leases"; by default 45 s at
most). Without this a file that is overwritten in place changes under running jobs, and one that is cut off kills the
process (SIGBUS).

A writer in this process may hold the interpreter while it waits (safetensors before 0.8 and `torch.save` do, for they
open files in native code), so that no thread of ours could give the lease back. The kernel therefore tells a small
process of its own (`lease_guard.py`). If nothing has happened a moment later, that sends the waiting thread a signal,
whose handler is Python: it runs in that thread, within its call of `open`, and lets others run until the lease is back.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

logger = logging.getLogger(__name__)

_F_SETSIG, _F_SETOWN_EX, _OWNER_IS_PROCESS = 10, 15, 1  # Linux, <fcntl.h>
_GUARD = Path(__file__).with_name("lease_guard.py")
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_LONGEST_S = 60.0  # The kernel's patience with us is shorter.


class Leases:
    """Leases on files; `on_break` is called, on a thread of its own, with the descriptor that must be given back."""

    def __init__(self, on_break: Callable[[int], None]) -> None:
        self._on_break = on_break
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._guard: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._thread_id: int | None = None
        self._is_told_again = False
        self._signal = signal.SIGRTMIN + 7  # from the kernel to the guard, and from it to a thread that waits
        _every.add(self)

    def take(self, fd: int) -> bool:
        """Whether the file is leased now: not on network file systems, nor if another user owns it or writes to it."""
        with self._lock:
            try:
                guard, _ = self._guard or self._start()
                self._lease(fd, guard.pid)
            except OSError as error:
                logger.debug("no lease: %s", error)
                return False
            self._held.add(fd)
            return True

    def give_back(self, fd: int) -> None:
        """Let others write to the file. Takes no lock: finalizers call it."""
        if fd not in self._held:
            return
        if threading.get_native_id() == self._thread_id:
            self._while_guard_is_quiet(lambda: self._unlease(fd))
        else:
            self._unlease(fd)

    def _unlease(self, fd: int) -> None:
        with suppress(BlockingIOError):  # The kernel took it away: a writer had waited too long.
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        self._held.discard(fd)  # now: until then `_let_others_run` must

    def _lease(self, fd: int, guard_pid: int) -> None:
        fcntl.fcntl(fd, _F_SETSIG, self._signal)
        fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("ii", _OWNER_IS_PROCESS, guard_pid))
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start the guard, and the thread that listens to it."""
        _on_signal(self._signal)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", str(_GUARD), str(theirs.fileno()), str(int(self._signal))]
            guard = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        if ours.recv(1) != b"r":
            raise OSError("the process that is told of overwritten files does not start")
        self._guard = guard, ours
        threading.Thread(target=self._watch, args=self._guard, name="weight-file-leases", daemon=True).start()
        return self._guard

    def _watch(self, guard: subprocess.Popen[bytes], told: socket.socket) -> None:
        self._thread_id = threading.get_native_id()
        while told.recv(1):
            self._is_told_again = True
            while self._is_told_again:
                self._is_told_again = False
                self._serve()
        guard.wait()
        self._replace_guard()

    def _serve(self) -> None:
        with self._lock:  # Who takes a lease at the moment has it in `_held` then.
            held = list(self._held)
        for fd in held:
            try:
                if _is_breaking(fd):
                    self._on_break(fd)
            except Exception:
                if fd in self._held:  # else its region went meanwhile
                    logger.critical("comfy_parallel: a weight file in use is overwritten", exc_info=True)

    def _replace_guard(self) -> None:
        """The guard died: another one is told from now on, or nothing stays mapped, for nobody guards it."""
        logger.warning("comfy_parallel: the process that is told of overwritten weight files ended; it starts again")
        with self._lock:
            self._guard = None
            held = list(self._held)
            try:
                guard, _ = self._start()
                for fd in held:
                    fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("ii", _OWNER_IS_PROCESS, guard.pid))
            except OSError as error:
                logger.critical("comfy_parallel: it does not start (%s); all mapped weight files are copied", error)
                for fd in held:
                    self._on_break(fd)
        self._serve()  # Somebody may have begun to write meanwhile.

    def _while_guard_is_quiet(self, action: Callable[[], object]) -> None:
        """The guard must not send its signal to a thread that waits no more."""
        _, told = self._guard or (None, None)
        if told is None:
            action()
            return
        told.send(b"m")
        while told.recv(1) not in (b"y", b""):
            self._is_told_again = True  # of another file, which `_serve` may have looked at already
        action()
        told.send(b"c" if self.is_breaking else b"d")

    @property
    def is_breaking(self) -> bool:
        """Whether a writer waits."""
        return any(map(_is_breaking, list(self._held)))


_every: WeakSet[Leases] = WeakSet()


def _let_others_run(_signal: int) -> None:
    """In a thread that waits for a lease and holds the interpreter."""
    deadline = time.monotonic() + _LONGEST_S
    while any(leases.is_breaking for leases in list(_every)) and time.monotonic() < deadline:
        time.sleep(0.005)


_handler = _HANDLER(_let_others_run)  # as long as the process


def _is_breaking(fd: int) -> bool:
    """Whether a writer waits for this lease."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK
    except OSError:  # It was closed meanwhile.
        return False


def _on_signal(number: int) -> None:
    """Not `signal.signal`: such handlers run on the main thread, when that has the interpreter."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, _HANDLER]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(number, _handler)
