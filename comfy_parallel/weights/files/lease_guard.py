"""A process of its own that the kernel tells when somebody wants to write to a leased file; see `leases.py`.

    python lease_guard.py SOCKET SIGNAL

It knows nothing but the standard library, and ends with the process that started it.

What it sends:
    r: it is ready.
    b: a writer waits for a lease.
    y: it sends no signals until it hears `d` or `c`.
What it is sent:
    m: a lease is about to be given back.
    d, c: it has been; with `c`, writers wait for others.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import socket
import sys
import time

PATIENCE_S = (
    1.0  # A thread that can run gives a lease back sooner, unless it has much to copy; then a signal is no harm.
)
TGKILL = {"x86_64": 234, "aarch64": 131}  # Linux, system call numbers


def main() -> None:
    told = socket.socket(fileno=int(sys.argv[1]))
    number = int(sys.argv[2])
    wake, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    signal.signal(number, lambda *_: None)
    told.send(b"r")
    waits_since: float | None = None
    while True:
        timeout = None if waits_since is None else PATIENCE_S / 4
        readable = select.select([told.fileno(), wake], [], [], timeout)[0]
        if wake in readable:
            os.read(wake, 4096)
            told.send(b"b")
            waits_since = waits_since or time.monotonic()
        if told.fileno() in readable:
            if not told.recv(1):
                return
            told.send(b"y")
            waits_since = time.monotonic() if told.recv(1) == b"c" else None
        elif waits_since is not None and time.monotonic() - waits_since > PATIENCE_S:
            wake_waiting_threads(os.getppid(), number)
            waits_since = time.monotonic()


def wake_waiting_threads(pid: int, number: int) -> None:
    """Send the signal to the threads of a process that wait for a lease."""
    libc = ctypes.CDLL(None)
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/wchan") as file:
                waits = "break_lease" in file.read()
        except OSError:  # It has ended.
            continue
        if waits:
            libc.syscall(TGKILL[platform.machine()], pid, int(thread), number)


if __name__ == "__main__":
    # A process that ends with something unread is gone as one is that has read all.
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        main()
