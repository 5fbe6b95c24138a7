"""File numbers: a number is its job's until the job has ended, whatever becomes of the number meanwhile."""

from __future__ import annotations

import copy
import itertools
import json
import operator
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest

from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.save_numbers import Counter, reserving
from comfy_parallel.slots.slot import Run, Slot, current_runs, entered
from tests.fakes import in_thread, make_slots

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def jobs() -> Iterator[tuple[Slot, ...]]:
    """Three slots, each of which runs a job."""
    slots = make_slots("cpu", "cpu", "cpu")
    for slot in slots:
        slot.run = Run(f"job {slot.index}")
    yield slots
    for slot in slots:
        slot.run = None
    with save_numbers._listing():
        assert save_numbers._holders == {}


def host_function(folder: Path) -> Any:
    """Like the host's get_save_image_path: the highest number in the folder plus one."""

    def get_save_image_path(filename_prefix: str, output_dir: str = "", width: int = 0) -> tuple[Any, ...]:
        numbers = [int(path.stem.rpartition("_")[2]) for path in folder.glob(f"{filename_prefix}_*")]
        return str(folder), filename_prefix, max(numbers, default=0) + 1, "", filename_prefix

    return get_save_image_path


class Folder:
    """Where jobs save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._get_save_image_path = reserving(host_function(path))

    def ask(self, slot: Slot | None, by: str = "nodes", *, prefix: str = "image") -> Any:
        """The number that a node of the slot's job gets, by default one of the host's own."""
        namespace: dict[str, Any] = {"__name__": by, "get_save_image_path": self._get_save_image_path}
        exec("def ask(prefix): return get_save_image_path(prefix)[2]", namespace)
        with entered(slot):
            return namespace["ask"](prefix)

    def write(self, *numbers: int, prefix: str = "image") -> None:
        for number in numbers:
            with (self.path / f"{prefix}_{number:05}").open("x"):
                pass


PACK = "/comfyui/custom_nodes/pack"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def end(slot: Slot, *, next_job: bool = True) -> None:
    slot.end_run(None)
    if next_job:
        slot.run = Run("the next job")


def test_jobs_at_once_get_different_numbers(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    folder.write(4)
    assert [folder.ask(slot) for slot in jobs] == [5, 6, 7]


def test_other_folders_and_prefixes_count_for_themselves(
    folder: Folder, jobs: tuple[Slot, ...], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Folder(tmp_path / "other")
    assert [folder.ask(jobs[0]), other.ask(jobs[1]), folder.ask(jobs[2], prefix="other")] == [1, 1, 1]


WAYS: dict[str, Callable[[Any], str]] = {
    "f-string": lambda number: f"{number:05}",
    "f-string with type": lambda number: f"{number:05d}",
    "str.format": lambda number: "{:05}".format(number),  # noqa: UP032
    "format": lambda number: format(number, "05"),
    "str": lambda number: str(number).zfill(5),
    "%d": lambda number: "%05d" % number,  # noqa: UP031
    "%s": lambda number: ("%s" % number).zfill(5),  # noqa: UP031
    "repr": lambda number: repr(number).zfill(5),
    "int": lambda number: f"{int(number):05}",
    "str of int": lambda number: str(int(number)).zfill(5),
    "index": lambda number: f"{number.__index__():05}",
    "numpy": lambda number: f"{numpy.int64(number):05}",
    "array": lambda number: f"{numpy.asarray([number])[0]:05}",
    "copy": lambda number: f"{copy.copy(number):05}",
    "deepcopy": lambda number: f"{copy.deepcopy([number])[0]:05}",
    "pickle": lambda number: f"{pickle.loads(pickle.dumps(number)):05}",
    "json": lambda number: json.dumps(number).zfill(5),
    "thread": lambda number: in_thread(lambda: f"{number:05}").result(5),
    "arithmetic": lambda number: f"{number * 2 // 2 - 0:05}",
    "not at all": lambda number: "00042",
}


@pytest.mark.parametrize("by", ["nodes", PACK])
@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_a_number_stays_taken_however_it_is_written(
    folder: Folder, jobs: tuple[Slot, ...], write: Callable[[Any], str], by: str
) -> None:
    folder.write(41)
    assert write(folder.ask(jobs[0], by)) == "00042"  # and nobody keeps it
    assert folder.ask(jobs[1]) > 42


def test_a_number_is_free_again_once_its_job_has_ended(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    assert [folder.ask(jobs[0]), folder.ask(jobs[1])] == [1, 2]
    end(jobs[0])
    assert folder.ask(jobs[2]) == 1
    assert folder.ask(jobs[0]) == 3  # it is another job's slot now
    end(jobs[1], next_job=False)
    folder.write(3)
    assert folder.ask(jobs[2]) == 4


@pytest.mark.parametrize("by", ["nodes", PACK])
@pytest.mark.parametrize("batch", [1, 3])
def test_alone_the_numbers_are_the_hosts(folder: Folder, jobs: tuple[Slot, ...], batch: int, by: str) -> None:
    host = host_function(folder.path)
    for _ in range(3):
        for _ in range(3):
            number = folder.ask(jobs[0], by)
            assert number == host("image")[2]
            assert folder.ask(jobs[0], by) == number  # before it has written
            folder.write(*(number + index for index in range(batch)))
        end(jobs[0])


def test_a_job_that_asks_again_before_it_writes_gets_the_same(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    folder.ask(jobs[1])
    number = folder.ask(jobs[0])
    end(jobs[1])
    assert number == folder.ask(jobs[0]) == 2
    folder.write(2)
    assert folder.ask(jobs[0]) == 3


COUNTING: dict[str, Callable[[Any, int], list[int]]] = {
    "adding one": lambda number, count: list(itertools.accumulate([1] * (count - 1), operator.add, initial=number)),
    "adding the index": lambda number, count: [number + index for index in range(count)],
    "index first": lambda number, count: [index + number for index in range(count)],
    "int": lambda number, count: [int(number) + index for index in range(count)],
    "range": lambda number, count: list(range(number, number + count)),
    "enumerate": lambda number, count: [index for index, _ in enumerate(range(count), number)],
    "numpy": lambda number, count: [int(value) for value in numpy.arange(count) + number],
    "arange": lambda number, count: [int(value) for value in numpy.arange(number, number + count)],
    "a copy": lambda number, count: [copy.copy(number) + index for index in range(count)],
}


@pytest.mark.parametrize("counting", COUNTING.values(), ids=COUNTING)
def test_batches_of_jobs_at_once_share_no_number(
    folder: Folder, jobs: tuple[Slot, ...], counting: Callable[[Any, int], list[int]]
) -> None:
    sizes = [4, 1, 30]
    first = [folder.ask(slot, PACK) for slot in jobs]
    numbers = [counting(number, size) for number, size in zip(first, sizes, strict=True)]
    assert list(map(len, numbers)) == sizes
    assert len({number for batch in numbers for number in batch}) == sum(sizes)
    assert numbers[0] == [1, 2, 3, 4]


def test_who_writes_as_the_host_does_leaves_no_room(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    for number, slot in enumerate(jobs, 1):
        counter = folder.ask(slot, PACK)
        assert f"{counter:05}" == f"{number:05}"


@pytest.mark.parametrize("plain", [int, lambda counter: counter.__index__()])
def test_who_makes_a_plain_number_after_it_has_written_has_room_again(
    folder: Folder, jobs: tuple[Slot, ...], plain: Callable[[Any], int]
) -> None:
    counter = folder.ask(jobs[0])
    assert f"{counter:05}" == "00001"
    number = plain(counter)
    assert f"{counter + 1:05}" == "00002"
    other = folder.ask(jobs[1])
    assert other not in range(number, number + 20)


HOSTS = ["nodes", "comfy_extras.nodes_audio", "comfy_api.latest._ui", "/comfyui/comfy_extras/nodes_audio"]
OTHERS = [
    PACK,
    "/comfyui/custom_nodes/comfy_extras/nodes/save",
    "nodes_of_mine",
    "comfy_api_pack",
    "C:\\packs\\nodes",
    "",
]


@pytest.mark.parametrize("name", HOSTS + OTHERS)
def test_the_hosts_nodes_need_no_room(folder: Folder, jobs: tuple[Slot, ...], name: str) -> None:
    folder.ask(jobs[0], name)
    assert folder.ask(jobs[1]) == (2 if name in HOSTS else 101)


def test_a_job_that_asked_twice_holds_what_it_counts_to(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    first, again = folder.ask(jobs[0], PACK), folder.ask(jobs[0], PACK)
    assert f"{first:05}" == f"{again:05}" == "00001"
    other = folder.ask(jobs[1])
    assert other == 2
    assert [first + 1, again + 1] == [3, 3]
    assert folder.ask(jobs[2]) == 4


def test_what_is_added_beyond_that_is_held_by_nobody_else(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    numbers = [folder.ask(slot) for slot in jobs]
    more = [[number + index for index in range(4)] for number in numbers]
    assert len({number for batch in more for number in batch}) == 12
    assert all(batch == sorted(batch) for batch in more)
    for batch, number in zip(more, numbers, strict=True):
        assert [number + index for index in range(4)] == batch  # asked again: the same
        assert [number, number + 1, number + 1 + 1, number + 2 + 1] == batch


def test_a_job_whose_number_was_freed_meanwhile_keeps_what_it_was_given(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    first, second = folder.ask(jobs[0]), folder.ask(jobs[1])
    added = first + 1
    assert (second, added) == (2, 3)
    end(jobs[1])
    assert first + 1 == 3


@pytest.mark.parametrize(
    ("change", "result"),
    [
        (lambda counter: counter + 0, 5),
        (lambda counter: counter + -1, 4),
        (lambda counter: counter - 1, 4),
        (lambda counter: counter * 2, 10),
        (lambda counter: counter + 0.5, 5.5),
        (lambda counter: counter + True, 6),
        (lambda counter: counter + 10**9, 10**9 + 5),
        (lambda counter: -counter, -5),
    ],
)
def test_other_arithmetic_gives_plain_numbers(
    folder: Folder, jobs: tuple[Slot, ...], change: Any, result: float
) -> None:
    folder.write(4)
    value = change(folder.ask(jobs[0]))
    assert value == result
    assert not isinstance(value, Counter)


def test_it_is_a_number_to_everyone(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    folder.write(4)
    counter = folder.ask(jobs[0])
    assert isinstance(counter, int)
    assert (counter == 5, counter < 6, hash(counter), [0] * counter) == (True, True, hash(5), [0, 0, 0, 0, 0])
    assert max(counter, 3) is counter
    assert type(copy.deepcopy(counter)) is int


def test_outside_of_jobs_a_number_is_avoided_and_not_held(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    assert folder.ask(jobs[0]) == 1
    assert [folder.ask(None), folder.ask(None)] == [2, 2]
    assert folder.ask(jobs[1]) == 2


def test_what_is_written_while_a_folder_is_listed_is_not_overwritten(jobs: tuple[Slot, ...], tmp_path: Path) -> None:
    """A job that ends in between leaves a file that the listing may lack."""
    listed, go_on = threading.Event(), threading.Event()
    host = host_function(tmp_path)

    def slow(prefix: str) -> tuple[Any, ...]:
        found = host(prefix)
        listed.set()
        assert go_on.wait(60)
        return tuple(found)

    def ask(function: Any, slot: Slot) -> int:
        with entered(slot):
            return int(function("image")[2])

    quick = Folder(tmp_path)
    assert quick.ask(jobs[0]) == 1
    waiting = in_thread(ask, reserving(slow), jobs[1])
    assert listed.wait(60)
    quick.write(1)
    end(jobs[0])
    assert quick.ask(jobs[2]) == 2
    go_on.set()
    assert waiting.result(5) == 3


def test_the_hosts_result_keeps_its_shape(tmp_path: Path) -> None:
    wrapped = reserving(host_function(tmp_path))
    assert wrapped.__name__ == "get_save_image_path"
    folder, name, counter, *rest = wrapped("image", output_dir="x", width=64)
    assert (folder, name, counter, rest) == (str(tmp_path), "image", 1, ["", "image"])
    assert isinstance(counter, Counter)


def test_the_same_folder_written_otherwise_is_the_same_series(jobs: tuple[Slot, ...], tmp_path: Path) -> None:
    def elsewhere(prefix: str) -> tuple[Any, ...]:
        return f"{tmp_path}/sub/../", "image", 1, "", prefix

    with entered(jobs[0]):
        assert reserving(host_function(tmp_path))("image")[2] == 1
    with entered(jobs[1]):
        assert reserving(elsewhere)("image")[2] > 1


@contextmanager
def job(slot: Slot) -> Iterator[None]:
    slot.run = Run("one of many")
    with entered(slot):
        yield
    slot.end_run(None)


def test_batches_saved_by_many_jobs_overwrite_nothing(jobs: tuple[Slot, ...], tmp_path: Path) -> None:
    saves, batch = 15, 3
    get_save_image_path = reserving(host_function(tmp_path))
    start = threading.Barrier(len(jobs))

    def save_all(slot: Slot) -> list[Path]:
        start.wait(60)
        written = []
        for _ in range(saves):
            with job(slot):
                folder, name, counter, *_ = get_save_image_path("image", "x")
                for _ in range(batch):
                    path = Path(folder) / f"{name}_{counter:05}"
                    with path.open("x") as file:
                        file.write(str(slot.index))
                    written.append(path)
                    counter += 1
        return written

    futures = [in_thread(save_all, slot) for slot in jobs]
    for slot, future in zip(jobs, futures, strict=True):
        written = future.result(8)
        assert len(written) == saves * batch
        assert {path.read_text() for path in written} == {str(slot.index)}
    assert len(list(tmp_path.iterdir())) == len(jobs) * saves * batch


def test_what_jobs_held_is_forgotten_after_them(folder: Folder, jobs: tuple[Slot, ...]) -> None:
    folder.ask(jobs[0], prefix="one")
    folder.ask(jobs[1], prefix="two")
    end(jobs[0])
    folder.ask(jobs[1], prefix="three")
    assert {prefix for _, prefix in save_numbers._holders} == {"two", "three"}
    assert len(current_runs()) == 3
