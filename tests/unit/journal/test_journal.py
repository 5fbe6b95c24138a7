"""What the journal's file holds after a kill, a migration and a failure."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_parallel.errors import JournalError
from comfy_parallel.journal import schema
from comfy_parallel.journal.journal import Journal

KILLED = """
import os, signal, sys
from pathlib import Path
from comfy_parallel.journal.journal import Journal
journal = Journal(Path(sys.argv[1]), ["token"])
for job in range(100):
    journal.accept(job, (job, f"id-{job}", {}, {"client_id": "c", "token": "hidden"}, ["out"]), target=1, counter=job + 1)
journal.start(0, 1)
journal.end(1, "id-1", {"prompt": 0, "outputs": {"a": 1}})
journal.remove([2])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_nothing_and_secrets_are_not_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not any(b"hidden" in file.read_bytes() for file in tmp_path.iterdir())
    journal = Journal(path)
    kept = journal.recover()
    journal.close()
    assert [job.job for job in kept.waiting] == [0, *range(3, 100)]
    assert kept.waiting[0].attempts == 1
    assert kept.waiting[0].secrets == ("token",)
    assert kept.waiting[0].item == [0, "id-0", {}, {"client_id": "c"}, ["out"]]
    assert [end.entry for end in kept.ended] == [{"outputs": {"a": 1}}]
    assert (kept.counter, kept.next_job) == (100, 100)


def test_version_1_migrates_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    with sqlite3.connect(path) as old:
        for statement in schema._VERSION_1:
            old.execute(statement)
        old.execute("""INSERT INTO jobs VALUES (7, '[1, "a", {}, {}, []]', 0, 3, '[]')""")
    old.close()
    journal = Journal(path)
    assert [(job.job, job.request_key) for job in journal.recover().waiting] == [(7, None)]
    journal.close()
    with sqlite3.connect(path) as newer:
        newer.execute("UPDATE version SET number = 99")
    newer.close()
    with pytest.raises(JournalError, match="version 99"):
        Journal(path)


def test_a_broken_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(os.urandom(8192))
    with pytest.raises(JournalError, match="move the file away"):
        Journal(path)


def test_what_a_full_file_does_not_take_is_written_when_there_is_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    connection = journal._file._connection
    connection.execute("PRAGMA max_page_count=10")
    journal.accept(1, (1, "big", {"text": "x" * 200_000}, {}, []), target=None)
    assert journal.problem is not None
    assert "make room" in journal.problem
    connection.execute("PRAGMA max_page_count=1000000")
    journal.accept(2, (2, "small", {}, {}, []), target=None)
    assert journal.problem is None
    assert [job.job for job in journal.recover().waiting] == [1, 2]
    journal.close()
