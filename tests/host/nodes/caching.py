"""How a test node says that it must run each time."""

from __future__ import annotations


def never_cached() -> float:
    """A new NaN each time: the host's cache finds one and the same object equal to itself."""
    return float("nan")
