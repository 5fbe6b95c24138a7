"""Ports for servers that tests start a moment later."""

from __future__ import annotations

import itertools
import os
import socket

# Below those that Linux gives to whoever asks for any (32768 and up), so that no connection of a test beside takes one
# that was chosen and is not bound yet.
FIRST, LAST = 10_000, 30_000
BLOCK = 100  # to each process its own, as far as there are enough

_tried = itertools.count()


def free_port() -> int:
    """A port that nobody listens on, and that no other test process chooses soon."""
    start = os.getpid() * BLOCK
    while True:
        port = FIRST + (start + next(_tried)) % (LAST - FIRST)
        if _is_free(port):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: connections that have ended stay
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    print(free_port())
