"""Whether an error says that a GPU is lost to this process, by its text. Pure.

After some errors every further call on that device fails until the process ends: CUDA calls them sticky. Others concern
one call only: out of memory, a wrong argument, a kernel that does not exist for this GPU.
"""

from __future__ import annotations

import re
from enum import Enum

_SOURCE = re.compile(r"\b(cuda|hip)( driver)? error|\bcublas_status_|\bcudnn_status_|\bcudnn error|\bnccl error", re.I)
_ONE_CALL_ONLY = re.compile(r"out of memory|not enough memory|alloc_failed", re.I)
_STICKY = re.compile(
    r"device-side assert"
    r"|illegal (memory access|instruction|address)"
    r"|misaligned address"
    r"|hardware stack error"
    r"|invalid (program counter|pc\b|address space)"
    r"|operation not supported on global/shared address space"
    r"|unspecified launch failure"
    r"|launch timed out"
    r"|uncorrectable (ecc|nvlink)"
    r"|nvlink error"
    r"|context is destroyed"
    r"|(gpu|device) (is lost|has fallen off the bus|not detected)"
    r"|gpu lost",
    re.I,
)


class Fate(Enum):
    """What an error says of the device."""

    USABLE = "usable"
    ASK = "ask"  # It came from the device; whether that still works is to be tried.
    LOST = "lost"


def fate_of(text: str) -> Fate:
    """What an error with this text says of the device that it came from."""
    if not _SOURCE.search(text) or _ONE_CALL_ONLY.search(text):
        return Fate.USABLE
    return Fate.LOST if _STICKY.search(text) else Fate.ASK
