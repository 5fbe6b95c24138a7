"""The newest changes of a journal, in a file from where a kill cannot take them, until its database has them.

One write of the system per change is all that the hot path pays. A commit of SQLite takes several, and lets go of the
interpreter at each, which other threads then have for up to 5 ms.
"""

from __future__ import annotations

import marshal
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Statement = tuple[str, tuple[Any, ...]]

HALF_BYTES = 4 << 20
_HEADER = struct.Struct("<IIQ")  # how long the record is, its checksum, its number
_FORMAT = 4  # of marshal: texts, numbers and None, as every Python from 3.4 on reads them


class Log:
    """Numbered records of changes. Its halves take turns: one is written to while the other's records are copied.

    The file has its full size from the start, so that a disk that becomes full later does not matter.

    Args:
        name: the records have it in their checksums; those with another name are not read.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.rename(name)
        self._half, self._position = 0, 0
        self._is_other_free = True
        self._file: int | None = None
        if hasattr(os, "pwrite"):
            try:
                self._file = _opened(path)
            except OSError:  # Changes then go to the database at once, which says what is wrong, if anything is.
                self._file = None

    def rename(self, name: str) -> None:
        """Have all records that there are be read no more."""
        self._seed = zlib.crc32(name.encode()) or 1  # Zeros are no record.

    def append(self, number: int, statements: Sequence[Statement]) -> bool:
        """Write one record to the operating system; False when there is no room, or no file."""
        if self._file is None:
            return False
        data = marshal.dumps(list(statements), _FORMAT)
        if self._position + _HEADER.size + len(data) > HALF_BYTES:
            return False
        record = _HEADER.pack(len(data), self._sum(number, data), number) + data
        try:
            written = os.pwrite(self._file, record, self._half * HALF_BYTES + self._position)
        except OSError:
            return False
        if written < len(record):
            return False
        self._position += len(record)
        return True

    @property
    def is_filling(self) -> bool:
        """Whether it is time to copy the records into the database."""
        return self._position > HALF_BYTES // 2

    def turn(self) -> None:
        """All records are about to be copied: write to the other half from now on, if its own are in the database."""
        if self._is_other_free:
            self._half, self._position, self._is_other_free = 1 - self._half, 0, False

    def release(self) -> None:
        """The records that there were at the last `turn` are in the database."""
        self._is_other_free = True

    def read(self, after: int) -> list[tuple[int, list[Statement]]]:
        """The records with the numbers that follow `after`, without a gap."""
        if self._file is None:
            return []
        found = {number: data for half in (0, 1) for number, data in self._records(half)}
        records = []
        while (data := found.get(after + 1)) is not None:
            after += 1
            records.append((after, marshal.loads(data)))
        return records

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _records(self, half: int) -> Iterator[tuple[int, bytes]]:
        """Those of one half: behind them are older ones, or one that a kill has cut off."""
        assert self._file is not None
        written = os.pread(self._file, HALF_BYTES, half * HALF_BYTES)
        position, expected = 0, None
        while position + _HEADER.size <= len(written):
            length, checksum, number = _HEADER.unpack_from(written, position)
            data = written[position + _HEADER.size : position + _HEADER.size + length]
            if (
                not length
                or len(data) < length
                or checksum != self._sum(number, data)
                or number != (expected or number)
            ):
                return
            yield number, data
            position, expected = position + _HEADER.size + length, number + 1

    def _sum(self, number: int, data: bytes) -> int:
        return zlib.crc32(data, self._seed ^ (number & 0xFFFFFFFF))


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    file = os.open(path, flags, 0o600)  # Workflows are their clients' own.
    missing = 2 * HALF_BYTES - os.fstat(file).st_size
    try:
        if missing:
            os.ftruncate(file, 0)
            os.pwrite(file, bytes(2 * HALF_BYTES), 0)
        if os.fstat(file).st_size != 2 * HALF_BYTES:
            raise OSError("there is no room for it")
    except OSError:
        os.ftruncate(file, 0)  # What it got of the disk is the database's.
        os.close(file)
        raise
    return file
