"""How much RAM the weights may take beyond the page cache, and giving RAM back."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def budget_bytes(ram_gb: float | None) -> int:
    """What the user asked for, in bytes; by default half of the RAM that this process may use."""
    return int(ram_gb * (1 << 30)) if ram_gb is not None else _available() // 2


def pss_bytes(pid: int) -> int | None:
    """A process's memory with its share of what several processes map; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # It has ended, it is another user's, or there is no Linux.
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), None)


def _available() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return total if limit == "max" else min(total, int(limit))


def trim() -> None:
    """Have the C library give freed memory back: parameters that the host makes and we replace leave much of it."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any]:
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # glibc's
