"""What several ComfyUIs that save into the same folders tell each other of the file numbers that their jobs hold.

They share a folder. In it each has a file with what it holds, which it keeps locked as long as it lives, and one more
file is locked by whoever reads or changes any of it. The locks end with their processes: nobody is waited for in vain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A folder, what its files are named before the number, the first and the last of some numbers, and when the job that
# held them ended, in seconds of the machine's monotonic clock; None while it runs.
Held = list[tuple[str, str, int, int, float | None]]

_ENDING = ".held"


class SharedNumbers:
    """This process's part. `folder` is made if it is not there; Linux only.

    Raises:
        OSError: when the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._all = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._path = folder / f"{os.getpid()}-{os.urandom(4).hex()}{_ENDING}"
        self._own = -1
        with self.locked():
            self._own = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _lock(self._own)
        self._told: Held = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else reads or tells in the body."""
        _lock(self._all)
        try:
            yield
        finally:
            _unlock(self._all)

    def others(self) -> Held:
        """What the other processes hold. Call it, and `tell`, within `locked`."""
        return [held for path in self._folder.glob(f"*{_ENDING}") if path != self._path for held in self._read(path)]

    def tell(self, held: Held) -> None:
        """Say what this process holds."""
        if held != self._told:
            data = json.dumps(held).encode()
            os.pwrite(self._own, data, 0)
            os.ftruncate(self._own, len(data))
            self._told = held

    def close(self) -> None:
        """Hold nothing any more."""
        with suppress(OSError):
            self._path.unlink()
        os.close(self._own)
        os.close(self._all)

    def _read(self, path: Path) -> Held:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # It has just been closed.
            return []
        try:
            if _is_dead(fd):
                path.unlink(missing_ok=True)
                return []
            text = os.pread(fd, os.fstat(fd).st_size, 0)
            return [(folder, name, first, last, end) for folder, name, first, last, end in json.loads(text or b"[]")]
        finally:
            os.close(fd)


def _lock(fd: int) -> None:
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_EX)


def _unlock(fd: int) -> None:
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_UN)


def _is_dead(fd: int) -> bool:
    """Whether the process that keeps the file locked has ended."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
