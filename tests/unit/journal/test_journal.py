"""What the journal's file holds after a kill, a migration and a failure."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from comfy_parallel.errors import JournalError
from comfy_parallel.journal import log, schema
from comfy_parallel.journal.journal import Journal

REPO_DIR = Path(__file__).parents[3]
KILLED = """
import os, signal, sys
from pathlib import Path
from comfy_parallel.journal.journal import Journal
journal = Journal(Path(sys.argv[1]), ["token"])
for job in range(100):
    extra_data = {"client_id": "c", "token": "hidden"}
    journal.accept(job, (job, f"id-{job}", {}, extra_data, ["out"]), target=1, counter=job + 1)
journal.start(0, 1)
journal.end(1, "id-1", {"prompt": 0, "outputs": {"a": 1}})
journal.remove([2])
journal.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_nothing_and_secrets_are_not_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=REPO_DIR, check=False)
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


def await_problem(journal: Journal) -> None:
    """The thread that copies changes into the database looks once a second."""
    journal.flush()
    deadline = time.monotonic() + 60
    while journal.problem is None and time.monotonic() < deadline:
        time.sleep(0.01)


def as_killed(path: Path, to: Path) -> Journal:
    """A journal over what a kill would leave now."""
    for end in ("", "-wal", "-log"):
        shutil.copy(f"{path}{end}", f"{to}{end}")
    return Journal(to)


def test_what_a_full_file_does_not_take_is_written_when_there_is_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    connection = journal._file._connection
    connection.execute("PRAGMA max_page_count=10")
    journal.accept(1, (1, "big", {"text": "x" * 200_000}, {}, []), target=None)
    await_problem(journal)
    assert journal.problem is not None
    assert "make room" in journal.problem
    asyncio.run(asyncio.wait_for(journal.kept(), 20))  # nobody waits for a disk that is full
    connection.execute("PRAGMA max_page_count=1000000")
    journal.accept(2, (2, "small", {}, {}, []), target=None, soon=True)
    deadline = time.monotonic() + 60
    while journal.problem is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert journal.problem is None
    assert [job.job for job in journal.recover().waiting] == [1, 2]
    journal.close()


@pytest.mark.parametrize("is_power_safe", [False, True])
def test_many_wait_together_and_find_all_that_was_told_before(tmp_path: Path, is_power_safe: bool) -> None:
    journal = Journal(tmp_path / "state.sqlite3", is_power_safe=is_power_safe)

    async def accept(number: int) -> None:
        journal.accept(number, (number, f"id-{number}", {}, {}, []), target=None)
        await asyncio.wait_for(journal.kept(), 60)
        if number in (0, 150):
            after = as_killed(journal.path, tmp_path / f"copy-{number}")
            assert number in {job.job for job in after.recover().waiting}
            after.close()

    async def accept_all() -> None:
        await asyncio.gather(*(accept(number) for number in range(200)))

    asyncio.run(accept_all())
    assert [job.job for job in journal.recover().waiting] == list(range(200))
    journal.close()


def test_ids_that_are_no_unicode_are_kept_and_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    for job, prompt_id in enumerate(("half \ud800", "whole")):
        journal.accept(job, (job, prompt_id, {}, {}, []), target=None)
        journal.end(job, prompt_id, {"outputs": {}})
    journal.flush()
    assert [ended.item[1] for ended in journal.recover().ended] == ["half \ud800", "whole"]
    journal.forget(["half \ud800"])
    journal.flush()
    assert [ended.item[1] for ended in journal.recover().ended] == ["whole"]
    journal.close()


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    code = "import sys, pathlib; from comfy_parallel.journal.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(journal.path)]
    second = subprocess.run(command, cwd=REPO_DIR, capture_output=True, text=True, check=False)
    journal.close()
    assert "another server uses it" in second.stderr


@pytest.mark.parametrize("is_power_safe", [False, True])
def test_it_reaches_the_disk_soon_and_before_the_answer_where_that_is_asked(
    tmp_path: Path, is_power_safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    fsync = os.fsync

    def note(fd: int) -> None:
        fsync(fd)
        synced.set()

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal(tmp_path / "state.sqlite3", is_power_safe=is_power_safe)
    journal.accept(1, (1, "id", {}, {}, []), target=None)
    asyncio.run(asyncio.wait_for(journal.kept(), 60))
    assert synced.is_set() or not is_power_safe
    assert synced.wait(60)
    journal.close()


def test_a_request_that_is_cancelled_takes_no_other_along(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")

    async def two() -> None:
        first, second = (asyncio.ensure_future(journal.kept()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait_for(second, 60)

    asyncio.run(two())
    journal.close()


def test_it_is_up_to_date_only_when_all_that_came_meanwhile_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    with closing(sqlite3.connect(tmp_path / "state.sqlite3", isolation_level=None)) as other:
        for attempt in range(3):
            other.execute("BEGIN IMMEDIATE")
            while journal.problem is None:
                journal.accept(2 * attempt, (0, f"a-{attempt}", {}, {}, []), target=None)
                journal.flush()
            journal.accept(2 * attempt + 1, (0, f"b-{attempt}", {}, {}, []), target=None)
            other.execute("ROLLBACK")
            while journal.problem is not None:
                time.sleep(0.001)
            assert other.execute("SELECT count(*) FROM jobs").fetchone() == (2 * attempt + 2,)
    journal.close()


def test_what_does_not_fit_into_the_log_is_kept_at_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "HALF_BYTES", 2000)
    journal = Journal(tmp_path / "state.sqlite3")
    for job in range(60):
        journal.accept(job, (job, f"id-{job}", {"text": "x" * (job % 7 * 500)}, {}, []), target=None)
        journal.start(job, 1)
        if job % 2:
            journal.remove([job])
        journal.flush()
        if job % 5 == 0:
            after = as_killed(journal.path, tmp_path / f"copy-{job}")
            kept = after.recover().waiting
            assert [one.job for one in kept] == list(range(0, job + 1, 2))
            assert [one.attempts for one in kept] == [1] * len(kept)
            after.close()
    journal.close()


def test_a_problem_of_the_database_does_not_keep_changes_from_the_log(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    with closing(sqlite3.connect(tmp_path / "state.sqlite3", isolation_level=None)) as other:
        for job in range(2):  # In both halves: those of the first are still needed.
            other.execute("BEGIN IMMEDIATE")
            journal.accept(2 * job, (0, f"before-{job}", {}, {}, []), target=None)
            await_problem(journal)
            journal.accept(2 * job + 1, (0, f"after-{job}", {}, {}, []), target=None)
            journal.flush()
            after = as_killed(journal.path, tmp_path / f"copy-{job}")
            assert [one.job for one in after.recover().waiting] == list(range(2 * job + 2))
            after.close()
            other.execute("ROLLBACK")
            while journal.problem is not None:
                time.sleep(0.001)
    journal.close()


def test_an_older_copy_of_the_database_gets_nothing_of_the_newer_log(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    journal = Journal(path)
    journal.accept(0, (0, "old", {}, {}, []), target=None)
    journal.close()
    old = path.read_bytes()
    journal = Journal(path)
    for job in range(1, 20):
        journal.accept(job, (0, f"id-{job}", {}, {}, []), target=None)
        journal.flush()
    log_now = path.with_name("state.sqlite3-log").read_bytes()
    journal.close()
    path.write_bytes(old)
    path.with_name("state.sqlite3-log").write_bytes(log_now)
    journal = Journal(path)
    assert [job.job for job in journal.recover().waiting] == [0]
    journal.close()


def test_what_the_log_holds_stays_there_while_the_database_does_not_take_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    journal.accept(0, (0, "id", {}, {}, []), target=None)
    journal.flush()
    for end in ("", "-wal", "-log"):
        shutil.copy(f"{journal.path}{end}", tmp_path / f"copy{end}")
    journal.close()
    path = tmp_path / "copy"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            with pytest.raises(JournalError, match="locked"):
                Journal(path)
    journal = Journal(path)
    assert [job.job for job in journal.recover().waiting] == [0]
    journal.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        journal = Journal(path)  # The log holds nothing that would be lost.
        other.execute("ROLLBACK")
    assert [job.job for job in journal.recover().waiting] == [0]
    journal.close()


def test_who_asks_hears_at_once_that_the_database_takes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state.sqlite3")
    with closing(sqlite3.connect(tmp_path / "state.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        journal.accept(0, (0, "id", {}, {}, []), target=None)
        journal.flush()
        asyncio.run(journal.tried())
        assert "locked" in str(journal.problem)
        other.execute("ROLLBACK")
    asyncio.run(journal.tried())
    assert journal.problem is None
    assert [job.job for job in journal.recover().waiting] == [0]
    journal.close()
