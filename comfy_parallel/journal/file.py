"""The journal's file: writing to it without fail, or saying once why that does not work.

A change goes two steps. It is written to a log, from where a killed process cannot lose it: requests and slots wait for
that, which takes microseconds. Once a second a thread copies what came into the SQLite file and brings that to the
disk, which a power cut leaves as it is. With `is_power_safe` requests wait for the disk, together.
"""

from __future__ import annotations

import asyncio
import itertools
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
from comfy_parallel.journal.log import Log, Statement

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_Failure = (sqlite3.Error, OSError, ValueError, OverflowError)

_BUSY_S = 0.2
_EVERY_S = 1.0  # how often changes are copied into the database, what could not be written is tried again, and more
_NOTED = "UPDATE log SET number = ?"
_RENAMED = "UPDATE log SET name = hex(randomblob(16))"
_MOST_WAL_BYTES = 64 << 20


class JournalFile:
    """An SQLite file that this process alone writes to.

    Changes that cannot be written now (a full disk, a lock) are kept and written, in order, as soon as that works.

    Args:
        is_power_safe: `kept` waits for the disk too.

    Raises:
        JournalError: when the file cannot be used, with what to do.
    """

    def __init__(self, path: Path, *, is_power_safe: bool = False) -> None:
        self.path = path
        self._is_power_safe = is_power_safe
        self._is_ahead_of_disk = False
        self.problem: str | None = None  # why changes are not in the file now
        self._mutex = threading.Lock()  # of these lists and `_new`; never held while a disk is waited for
        self._logging = threading.Lock()  # of the log, `_backlog` and the numbers
        self._writing = threading.Lock()  # of `_connection`
        self._new: list[Statement] = []  # not in the log yet
        self._backlog: list[Statement] = []  # not in the database yet
        self._awaiting: list[asyncio.Future[None]] = []  # until changes are on the disk
        self._asking: list[asyncio.Future[None]] = []  # whether they can be written
        self._takes_no_more = False  # closed, or broken for good
        self._is_ended, self._wake = threading.Event(), threading.Event()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._connection = _connect(path)
            schema.migrate(self._connection)
            self._open_log()
            self._wal = os.open(f"{path}-wal", os.O_RDWR)
        except _Failure as error:
            raise JournalError(f"{path}: {error}", _remedy(error)) from error
        self._threads = [
            threading.Thread(target=work, daemon=True, name="comfy_parallel-journal")
            for work in (self._write_when_woken, self._copy_log)
        ]
        for thread in self._threads:
            thread.start()

    def _open_log(self) -> None:
        """Begin the log anew, under another name, after what a killed process has left in it is in the database."""
        [(name, number)] = self._connection.execute("SELECT name, number FROM log").fetchall()
        self._log = Log(self.path.with_name(self.path.name + "-log"), name)
        records = self._log.read(number)
        self._number = records[-1][0] if records else number
        changes = [statement for _, statements in records for statement in statements]
        try:
            _in_one_go(self._connection, [*changes, (_RENAMED, ()), (_NOTED, (self._number,))])
        except sqlite3.OperationalError:  # It is locked or full.
            if records:  # They must not be written over.
                raise
            with suppress(sqlite3.Error):
                self._connection.rollback()
        self._log.rename(self._connection.execute("SELECT name FROM log").fetchone()[0])
        self._missing = self._number  # the last record that did not get into the log
        self._copied = self._number  # the last one that is in the database

    def read(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query.

        Raises:
            JournalError: when the file is broken.
        """
        self._flush()
        try:
            with self._writing:
                return self._connection.execute(query).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"{self.path}: {error}", _remedy(error)) from error

    def write(self, *statements: Statement, soon: bool = False) -> None:
        """Have these changes made, all or none of them, at the next `flush` or `kept`, with `soon` at once on a
        thread. Waits for nothing and never raises."""
        with self._mutex:
            if not self._takes_no_more:
                self._new.extend(statements)
        if soon:
            self._wake.set()

    def flush(self) -> None:
        """Give all changes so far to the operating system. Never raises: what cannot be written is kept in memory, and
        tried again once a second."""
        with self._logging:
            self._log_new()
            is_missing = self._missing > self._copied
        if is_missing and self.problem is None:
            self._flush()

    async def kept(self) -> None:
        """Wait until all changes so far are where a kill of the process leaves them, or cannot be brought there now."""
        if self._takes_no_more:
            return
        if self._is_power_safe and self.problem is None:
            await self._on_disk()
        else:
            self.flush()

    async def tried(self) -> None:
        """Wait until `problem` tells of all changes so far whether the database takes them; a second at most."""
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._next_round(self._asking), _EVERY_S)

    async def _on_disk(self) -> None:
        await self._next_round(self._awaiting)

    async def _next_round(self, waiting: list[asyncio.Future[None]]) -> None:
        if self._is_ended.is_set():
            return
        future = asyncio.get_running_loop().create_future()
        with self._mutex:
            waiting.append(future)
        self._wake.set()
        await future

    def close(self) -> None:
        """Write what is left and let go of the file. Again: nothing."""
        if self._is_ended.is_set():
            return
        self._is_ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        self._flush()
        with self._writing:
            with self._logging, self._mutex:
                self._takes_no_more = True
                self._log.close()
            with suppress(sqlite3.Error):  # What a problem has kept from the file has been told.
                self._connection.close()
            os.close(self._wal)
            if self._lock is not None:
                self._lock.close()

    def _flush(self) -> None:
        if not self._write_backlog() or self.problem is None:
            return
        logger.warning("comfy_parallel: %s is up to date again", self.path)
        self.problem = None
        self._write_backlog()  # What came meanwhile was left to this thread.

    def _log_new(self) -> None:
        """Write to the log what is not there yet."""
        with self._mutex:
            new, self._new = self._new, []
        if not new:
            return
        self._number += 1
        if not self._log.append(self._number, new):
            self._missing = self._number
        self._backlog += new
        if self._log.is_filling:
            self._wake.set()

    def _write_backlog(self) -> bool:
        """Copy what there is into the database, and what comes meanwhile; whether there was anything, and all went."""
        has_written = False
        with self._writing:
            while batch := self._take_backlog():
                changes, number = batch
                try:
                    _in_one_go(self._connection, [*changes, (_NOTED, (number,))])
                except _Failure as error:
                    self._fail(error, changes)
                    return False
                with self._logging:
                    self._copied = number
                    self._log.release()
                has_written = self._is_ahead_of_disk = True
        return has_written

    def _take_backlog(self) -> tuple[list[Statement], int] | None:
        """The changes that are not in the database, and the number of the last record of them; None without any."""
        with self._logging:
            self._log_new()
            if not self._backlog or self._takes_no_more:
                return None
            self._log.turn()
            batch, self._backlog = self._backlog, []
            return batch, self._number

    def _fail(self, error: Exception, batch: list[Statement]) -> None:
        with suppress(sqlite3.Error):  # It has told what is wrong; a transaction that it has ended is none.
            self._connection.rollback()
        is_new = self.problem is None
        self.problem = f"{error}; {_remedy(error)}"
        with self._logging:
            if isinstance(error, sqlite3.OperationalError | OSError):
                self._backlog[:0] = batch
            else:  # broken: no later attempt can work
                self._takes_no_more, is_new = True, True
        if is_new:
            logger.error(
                "comfy_parallel: the queue is not kept in %s, so a restart would lose jobs, or run some once more;"
                " jobs go on in memory: %s",
                self.path,
                self.problem,
            )

    def _write_when_woken(self) -> None:
        while not self._is_ended.is_set():
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            self._bring_to_disk()
        self._bring_to_disk()

    def _bring_to_disk(self) -> None:
        """Write what there is, also what could not be written before; once it is on the disk, tell who waits."""
        with self._mutex:
            asking, awaiting = self._asking[:], self._awaiting[:]
            self._asking.clear()
            self._awaiting.clear()
        self._flush()
        _tell(asking)
        try:
            if (awaiting or self._is_ahead_of_disk) and self.problem is None:
                self._is_ahead_of_disk = False
                os.fsync(self._wal)
        except OSError as error:
            with self._writing:
                self._fail(error, [])
        _tell(awaiting)

    def _copy_log(self) -> None:
        """Copy SQLite's log into the database once a second, and begin it anew before it gets large."""
        with closing(sqlite3.connect(self.path, timeout=_BUSY_S, check_same_thread=False)) as connection:
            while not self._is_ended.wait(_EVERY_S):
                try:
                    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
                    if os.fstat(self._wal).st_size > _MOST_WAL_BYTES:
                        with self._writing:
                            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                except (sqlite3.Error, OSError) as error:
                    with self._writing:
                        if self.problem is None:
                            self._fail(error, [])


def _tell(waiting: list[asyncio.Future[None]]) -> None:
    for loop in {future.get_loop() for future in waiting}:
        with suppress(RuntimeError):  # The server ends, and its loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(_release, [one for one in waiting if one.get_loop() is loop])


def _release(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # else its request was cancelled
            future.set_result(None)


def _in_one_go(connection: sqlite3.Connection, statements: Iterable[Statement]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statement, same in itertools.groupby(statements, key=lambda one: one[0]):
        connection.executemany(statement, [values for _, values in same])
    connection.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    os.chmod(path, 0o600)  # Workflows are their clients' own.
    for setting in ("journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=0"):
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
            f"{path}: another server uses it", "stop that server, or name another file in COMFY_PARALLEL_STATE"
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
