"""Ports that are free and follow each other."""

from __future__ import annotations

import random
import socket

_OUT_OF_THE_SYSTEMS_OWN = range(12000, 32000)


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, of those that no program is given by itself."""
    for _ in range(1000):
        first = random.choice(_OUT_OF_THE_SYSTEMS_OWN)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError(f"no {count} free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
