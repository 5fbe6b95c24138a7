"""The journal's file: writing to it without fail, or saying once why that does not work.

A change is in the file when `write` returns, as far as a killed process is concerned: it has been given to the
operating system (WAL, synchronous=NORMAL). To the disk it is brought at most a second or two later, on a thread, so a
power cut may lose that much, but never leaves a file that contradicts itself. To wait for the disk in every
`POST /prompt` would hold up ComfyUI's event loop.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

from comfy_parallel.errors import JournalError
from comfy_parallel.journal import schema

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Statement = tuple[str, tuple[Any, ...]]

_BUSY_S = 0.2  # Whoever else writes to the file must not hold up the event loop.
_SYNC_EVERY_S = 1.0
_MOST_WAL_BYTES = 64 << 20


class JournalFile:
    """An SQLite file that this process alone writes to.

    Changes that cannot be written now (a full disk, a lock) are kept and written, in order, as soon as that works.

    Raises:
        JournalError: when the file cannot be used, with what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None  # why changes are not in the file now
        self._mutex = threading.Lock()
        self._backlog: list[Statement] = []
        self._is_lost = False
        self._is_ended = threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._connection = _connect(path)
            schema.migrate(self._connection)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(str(error), _remedy(error)) from error
        self._syncing = threading.Thread(target=self._sync, daemon=True, name="comfy_parallel-journal")
        self._syncing.start()

    def read(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query.

        Raises:
            JournalError: when the file is broken.
        """
        try:
            with self._mutex:
                return self._connection.execute(query).fetchall()
        except sqlite3.Error as error:
            raise JournalError(str(error), _remedy(error)) from error

    def write(self, *statements: Statement) -> None:
        """Make these changes, all or none of them. Never raises: what cannot be written is kept in memory."""
        with self._mutex:
            if self._is_lost:
                return
            self._backlog.extend(statements)
            self._write_backlog()

    def close(self) -> None:
        """Write what is left and let go of the file."""
        self._is_ended.set()
        self._syncing.join()
        with self._mutex:
            if self._backlog:
                self._write_backlog()
            self._connection.close()
            if self._lock is not None:
                self._lock.close()

    def _write_backlog(self) -> None:
        try:
            _in_one_go(self._connection, self._backlog)
        except sqlite3.Error as error:
            self._fail(error)
            return
        self._backlog.clear()
        if self.problem is not None:
            logger.warning("comfy_parallel: %s is up to date again", self.path)
            self.problem = None

    def _fail(self, error: sqlite3.Error) -> None:
        with suppress(sqlite3.Error):  # It has told what is wrong; a transaction that it has ended is none.
            self._connection.rollback()
        is_new = self.problem is None
        self.problem = f"{error}; {_remedy(error)}"
        if not isinstance(error, sqlite3.OperationalError):  # broken: no later attempt can work
            self._is_lost = True
            self._backlog.clear()
        if is_new or self._is_lost:
            logger.error(
                "comfy_parallel: the queue is not kept in %s, so a restart would lose jobs, or run some once more;"
                " jobs go on in memory: %s",
                self.path,
                self.problem,
            )

    def _sync(self) -> None:
        """Bring what was written to the disk, once a second; and try again what could not be written."""
        with closing(sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)) as connection:
            while not self._is_ended.wait(_SYNC_EVERY_S):
                with self._mutex:
                    if self._backlog and not self._is_lost:
                        self._write_backlog()
                try:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
                except sqlite3.Error as error:
                    with self._mutex:
                        if self.problem is None:
                            self._fail(error)


def _in_one_go(connection: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statement, values in statements:
        connection.execute(statement, values)
    connection.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    os.chmod(path, 0o600)  # Workflows are their clients' own.
    for setting in (
        "journal_mode=WAL",
        "synchronous=NORMAL",
        "wal_autocheckpoint=0",
        f"journal_size_limit={_MOST_WAL_BYTES}",
    ):
        connection.execute(f"PRAGMA {setting}")
    if (problems := connection.execute("PRAGMA quick_check(1)").fetchall()) != [("ok",)]:
        raise sqlite3.DatabaseError(problems[0][0])
    return connection


def _lock(path: Path) -> IO[bytes] | None:
    """Keep other servers from the file. The lock is the process's: it ends with it, and no child inherits it."""
    if fcntl is None:
        return None
    lock = path.with_name(path.name + ".lock").open("ab")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise JournalError(
            "another server uses it", "stop that server, or name another file in COMFY_PARALLEL_STATE"
        ) from error
    return lock


def _remedy(error: Exception) -> str:
    text = str(error)
    if "malformed" in text or "not a database" in text or "***" in text:
        return "move the file away and restart, or restore it from a copy"
    if "full" in text or "No space" in text:
        return "make room on its disk"
    if "locked" in text:
        return "end the other program that writes to it"
    return "make it writable, or name another file in COMFY_PARALLEL_STATE"
