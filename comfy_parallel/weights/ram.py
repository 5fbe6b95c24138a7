"""How much RAM the weights may take beyond the page cache."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def budget_bytes(ram_gb: float | None) -> int:
    """What the user asked for, in bytes; by default half of the RAM that this process may use."""
    return int(ram_gb * (1 << 30)) if ram_gb is not None else _available() // 2


def _available() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return total if limit == "max" else min(total, int(limit))
