"""The log gives back what was written to it, also when a kill cut the last record off, and nothing of another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from comfy_parallel.journal import log
from comfy_parallel.journal.log import Log


def changes(number: int) -> list[log.Statement]:
    return [("INSERT", (number, "half \ud800", None))]


def numbers(path: Path, after: int = 0, name: str = "a") -> list[int]:
    found = Log(path, name)
    records = found.read(after)
    found.close()
    assert all(statements == changes(number) for number, statements in records)
    return [number for number, _ in records]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(log, "HALF_BYTES", 1000)
    return tmp_path / "log"


def test_records_come_back_in_order_from_both_halves(path: Path) -> None:
    written = Log(path, "a")
    for number in range(1, 6):
        assert written.append(number, changes(number))
        if number == 3:
            written.turn()
    written.turn()  # The first three are not copied yet, so it goes on where it is.
    assert written.append(6, changes(6))
    assert numbers(path) == [1, 2, 3, 4, 5, 6]
    assert numbers(path, after=4) == [5, 6]
    assert numbers(path, after=7) == []
    assert numbers(path, name="of another database") == []
    written.release()
    written.turn()
    assert written.append(7, changes(7))
    assert numbers(path, after=6) == [7]
    assert numbers(path) == []  # The first ones are gone, and none is given without what came before.
    written.close()


def test_a_record_that_was_cut_off_is_none(path: Path) -> None:
    written = Log(path, "a")
    ends = [0]
    for number in range(1, 4):
        assert written.append(number, changes(number))
        ends.append(written._position)
    written.close()
    whole = path.read_bytes()
    for cut in range(ends[2], ends[3]):
        path.write_bytes(whole[:cut] + bytes(len(whole) - cut))
        assert numbers(path) == [1, 2]
    path.write_bytes(whole[: ends[1]] + b"x" + whole[ends[1] + 1 :])
    assert numbers(path) == [1]


def test_what_was_there_before_it_was_renamed_is_not_read(path: Path) -> None:
    written = Log(path, "a")
    for number in range(1, 6):
        assert written.append(number, changes(number))
    written.rename("b")
    assert written.read(0) == []
    written.turn()
    assert written.append(1, changes(1))
    assert numbers(path, name="b") == [1]
    written.close()


def test_one_that_is_full_or_cannot_be_made_says_so(path: Path, tmp_path: Path) -> None:
    written = Log(path, "a")
    number = 1
    while written.append(number, changes(number)):
        number += 1
    assert numbers(path) == list(range(1, number))
    assert written.is_filling
    written.close()
    assert not written.append(number, changes(number))
    assert not Log(tmp_path, "a").append(1, changes(1))
    assert Log(tmp_path, "a").read(0) == []


def test_a_log_for_which_there_is_no_room_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "log", os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: write(file, data[:4096], position))
    log_without_room = Log(path, "a")
    assert log_without_room.append(1, [("INSERT", ())]) is False
    assert path.stat().st_size == 0
