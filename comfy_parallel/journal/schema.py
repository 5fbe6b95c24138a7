"""The tables of a journal file, and how a file of an older version becomes one of today's."""

from __future__ import annotations

import sqlite3

from comfy_parallel.errors import JournalError

# A job's row is written once, because it may be large; what changes has small tables of its own.
_VERSION_1 = (
    "CREATE TABLE version (number INTEGER NOT NULL)",
    "INSERT INTO version VALUES (1)",
    "CREATE TABLE jobs (job INTEGER PRIMARY KEY, item TEXT NOT NULL, target INTEGER, counter INTEGER NOT NULL,"
    " secrets TEXT NOT NULL)",
    "CREATE TABLE runs (job INTEGER PRIMARY KEY, attempts INTEGER NOT NULL)",
    "CREATE TABLE ends (position INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL, prompt_id TEXT UNIQUE"
    " NOT NULL, entry TEXT NOT NULL)",
)
_VERSION_2 = (
    "ALTER TABLE jobs ADD COLUMN request_key TEXT",
    "ALTER TABLE jobs ADD COLUMN traits TEXT NOT NULL DEFAULT '{}'",
)
# Which records of the log are in the tables: those up to this number, of the log that has this name.
_VERSION_3 = (
    "CREATE TABLE log (name TEXT NOT NULL, number INTEGER NOT NULL)",
    "INSERT INTO log VALUES (hex(randomblob(16)), 0)",
)
_STEPS = (_VERSION_1, _VERSION_2, _VERSION_3)  # step i leads from version i to version i + 1

VERSION = len(_STEPS)


def migrate(connection: sqlite3.Connection) -> None:
    """Make a new or an older file one of this version, wholly or not at all.

    Raises:
        JournalError: when a newer comfy_parallel, or another program, has written the file.
    """
    found = _version_of(connection)
    if found > VERSION:
        raise JournalError(
            f"it has version {found}, and this comfy_parallel knows versions up to {VERSION}",
            "install the newer comfy_parallel again, or name another file in COMFY_PARALLEL_STATE",
        )
    if found == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    for step in _STEPS[found:]:
        for statement in step:
            connection.execute(statement)
    connection.execute("UPDATE version SET number = ?", (VERSION,))
    connection.execute("COMMIT")


def _version_of(connection: sqlite3.Connection) -> int:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return 0
    rows = connection.execute("SELECT number FROM version").fetchall() if "version" in tables else []
    if len(rows) != 1 or type(rows[0][0]) is not int or rows[0][0] < 1:
        raise JournalError("it is the database of another program", "name another file in COMFY_PARALLEL_STATE")
    return int(rows[0][0])
