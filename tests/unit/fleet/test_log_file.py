"""A log keeps the last lines, and its writer never waits nor fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy_parallel.fleet.log_file import LogFile


def test_lines_are_added_and_the_last_are_told(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "logs" / "one.log")
    assert log.tail(5) == []
    for number in range(10):
        log.write(f"line {number}")
    assert [line.split(" ", 2)[2] for line in log.tail(3)] == ["line 7", "line 8", "line 9"]


def test_a_long_log_is_begun_anew_and_the_last_one_kept(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "one.log", most_bytes=1000)
    for number in range(100):
        log.write(f"line {number}")
    assert {path.name for path in tmp_path.iterdir()} == {"one.log", "one.log.1"}
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert log.tail(1)[0].endswith("line 99")


def test_one_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "one.log").mkdir()
    log = LogFile(tmp_path / "one.log")
    log.write("a")
    log.write("b")
    assert [record.message for record in caplog.records if "cannot be written" in record.message] == [
        f"{tmp_path / 'one.log'} cannot be written: Is a directory; its lines are lost until it can"
    ]
