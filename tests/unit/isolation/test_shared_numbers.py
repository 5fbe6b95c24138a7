"""File numbers of several processes that save into one folder: nobody gets what another's running job holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.shared_numbers import SharedNumbers
from comfy_parallel.slots.slot import Run, Slot, entered
from tests.fakes import make_slots

pytestmark = pytest.mark.timeout(120)

REPO_DIR = Path(__file__).resolve().parents[3]
# Another process with one slot: it does what the lines that it reads say, and answers each with a line.
OTHER = """
import sys
from pathlib import Path
from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.shared_numbers import SharedNumbers
from comfy_parallel.slots.slot import Run, Slot, entered, set_slots
save_numbers.share(SharedNumbers(Path(sys.argv[1])))
slot, given = Slot(0, "cpu"), []
set_slots((slot,))
for line in sys.stdin:
    word, *numbers = line.split()
    with entered(slot):
        if word == "begin":
            slot.run = Run("other")
        elif word == "ask":
            with save_numbers.kept_here() as reserve:
                given = [reserve(("folder", "image"), int(numbers[0]), int(numbers[1]))]
        elif word == "next":
            given.append(given[-1] + 1)
        elif word == "end":
            slot.end_run(None)
    print(int.__pos__(given[-1]) if given else 0, flush=True)
"""


class Other:
    """Another process."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO_DIR,
        )

    def do(self, line: str) -> int:
        into, out = self.process.stdin, self.process.stdout
        assert into is not None
        assert out is not None
        _say(into, line)
        return int(out.readline())

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def _say(into: IO[str], line: str) -> None:
    into.write(f"{line}\n")
    into.flush()


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    (slot,) = make_slots("cpu")
    slot.run = Run("here")
    shared = SharedNumbers(tmp_path)
    save_numbers.share(shared)
    yield slot
    slot.run = None
    with save_numbers._listing():
        pass
    save_numbers.share(None)
    shared.close()
    save_numbers._holders.clear()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    other = Other(tmp_path)
    yield other
    if other.process.poll() is None:
        other.kill()


def ask(slot: Slot, at_least: int = 1, room: int = 1) -> Any:
    with entered(slot), save_numbers.kept_here() as reserve:
        return reserve(("folder", "image"), at_least, room)


def plain(number: Any) -> int:
    return int.__pos__(number)


def test_a_number_is_one_processs_until_its_job_has_ended(slot: Slot, other: Other) -> None:
    assert plain(ask(slot)) == 1
    other.do("begin")
    assert other.do("ask 1 1") == 2
    other.do("end")
    slot.end_run(None)
    other.do("begin")
    assert other.do("ask 1 1") == 1, "the ended job's number was free again"


def test_who_counts_on_passes_over_what_the_other_has(slot: Slot, other: Other) -> None:
    number = ask(slot)
    other.do("begin")
    assert other.do("ask 1 1") == 2
    with entered(slot):
        number = number + 1
    assert plain(number) == 3
    assert other.do("next") == 4


def test_room_is_kept_from_the_other(slot: Slot, other: Other) -> None:
    other.do("begin")
    assert other.do("ask 1 100") == 1
    assert plain(ask(slot, room=100)) == 101


def test_a_killed_process_holds_nothing(slot: Slot, other: Other, tmp_path: Path) -> None:
    other.do("begin")
    assert other.do("ask 1 1") == 1
    other.kill()
    assert plain(ask(slot)) == 1
    assert len(list(tmp_path.glob("*.held"))) == 1


def test_what_was_written_while_a_folder_was_listed_is_not_given_again(slot: Slot, other: Other) -> None:
    other.do("begin")
    assert other.do("ask 1 1") == 1
    with entered(slot), save_numbers.kept_here() as reserve:
        # Here the folder is listed, without the other's file, which comes now.
        other.do("end")
        assert plain(reserve(("folder", "image"), 1, 1)) == 2


def test_what_a_whole_job_wrote_while_a_folder_was_listed_is_not_given_again(slot: Slot, other: Other) -> None:
    with entered(slot), save_numbers.kept_here() as reserve:
        # Here the folder is listed, without what the other's job asks for and writes now.
        other.do("begin")
        assert other.do("ask 1 1") == 1
        other.do("next")
        other.do("end")
        number = reserve(("folder", "image"), 1, 1)
        assert plain(number) == 3
        other.do("begin")
        assert other.do("ask 4 1") == 4
        other.do("end")
        assert plain(number + 1) == 5, "the other has written number 4 since the folder was listed"


def test_what_ended_jobs_held_is_forgotten_once_nobody_can_need_it(
    slot: Slot, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(slot)
    slot.end_run(None)
    monkeypatch.setattr(save_numbers, "_KEPT_S", 0.0)
    other.do("begin")
    other.do("ask 2 1")
    with save_numbers._listing():
        assert save_numbers._holders, "the other may count on from before"
    other.do("end")
    with save_numbers._listing():
        pass
    assert not save_numbers._holders
    assert not save_numbers._ended_at


def test_other_series_are_not_touched(slot: Slot, other: Other) -> None:
    other.do("begin")
    other.do("ask 1 1")
    with entered(slot), save_numbers.kept_here() as reserve:
        assert plain(reserve(("folder", "other"), 1, 1)) == 1
