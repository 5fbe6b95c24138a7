"""What a supervised command writes, line by line in a file of its own."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_BYTES = 32 << 20  # Then a new file is begun, and the last one is kept beside it as `NAME.1`.
_TAIL_BYTES = 1 << 20


class LogFile:
    """A file to which lines are added. One that cannot be written is told of once; nothing waits for it."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self.path = path
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._is_broken = False

    def write(self, line: str) -> None:
        """Add a line, with the time."""
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
        try:
            with self._lock:
                self._make_room(len(text))
                with self.path.open("a", encoding="utf-8", errors="replace") as file:
                    file.write(text)
            self._is_broken = False
        except OSError as error:
            if not self._is_broken:
                logger.error("%s cannot be written: %s; its lines are lost until it can", self.path, error.strerror)
            self._is_broken = True

    def _make_room(self, size: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size + size > self._most_bytes:
            os.replace(self.path, self.path.with_name(f"{self.path.name}.1"))

    def tail(self, lines: int) -> list[str]:
        """The last lines, of at most the last MiB; none where there is no file."""
        try:
            with self.path.open("rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
                file.seek(start)
                text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found = text.splitlines()
        return (found[1:] if start else found)[-lines:]
