"""What was found in source files is kept until one of them changes.

A place that cannot be written to, or read, only costs the time to look again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)


def state_of(paths: Iterable[Path]) -> str:
    """Equal to an earlier value while these files, and the Python that reads them, are the same."""
    states = [(str(path), stat.st_mtime_ns, stat.st_size) for path in paths for stat in [path.stat()]]
    return hashlib.sha256(repr((sys.version, states)).encode()).hexdigest()


def keep(place: Path, content: bytes) -> None:
    """Write a file as a whole, for others may read it at this moment."""
    part = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(exist_ok=True)
        part.write_bytes(content)
        part.replace(place)
    except OSError as error:
        logger.debug("%s is not kept: %s", place, error)
