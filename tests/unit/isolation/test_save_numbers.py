"""File numbers: reserved when asked for, given back when unused, never held by two."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.save_numbers import Counter, reserving
from tests.fakes import in_thread

pytestmark = pytest.mark.timeout(10)

_series = itertools.count()
_folder = ""


@pytest.fixture(autouse=True)
def own_folder() -> Iterator[None]:
    """Each test has a folder of its own, in which it leaves no reservation."""
    global _folder
    _folder = f"/output/{next(_series)}"
    yield
    with save_numbers._lock:
        save_numbers._forget_dropped()
    assert [key for key in save_numbers._reserved if key[0] == _folder] == []


def reserve(at_least: int = 1, *, folder: str = "", prefix: str = "comfyui") -> Counter:
    return Counter.reserve((folder or _folder, prefix), at_least)


def number(counter: Counter) -> int:
    """The number, without marking it used."""
    return int(counter)


def test_two_at_once_get_different_numbers() -> None:
    first, second = reserve(5), reserve(5)
    assert (number(first), number(second)) == (5, 6)


def test_other_folders_and_prefixes_count_for_themselves() -> None:
    held = [reserve(5), reserve(5, folder="/other"), reserve(5, prefix="other")]
    assert [number(counter) for counter in held] == [5, 5, 5]


def test_a_number_that_the_host_found_higher_is_taken_from_there() -> None:
    held = [reserve(5), reserve(9), reserve(6)]
    assert [number(counter) for counter in held] == [5, 9, 10]


def test_with_none_held_the_host_alone_decides() -> None:
    first = reserve(5)
    assert f"{first:05}" == "00005"
    del first
    assert number(reserve(3)) == 3


def test_an_unused_number_is_given_back() -> None:
    held, unused = reserve(5), reserve(5)
    del unused
    assert number(reserve(5)) == 6
    assert number(held) == 5


def test_a_used_number_is_not_given_back_while_another_is_held() -> None:
    held, used = reserve(5), reserve(5)
    assert f"image_{used:05}_.png" == "image_00006_.png"
    del used
    assert number(reserve(5)) == 7
    assert number(held) == 5


def test_a_number_below_the_highest_is_not_given_back() -> None:
    held, unused, highest = reserve(5), reserve(5), reserve(5)
    del unused
    assert number(reserve(5)) == 8
    assert (number(held), number(highest)) == (5, 7)


def test_adding_one_twice_is_one_number() -> None:
    counter = reserve(5)
    first, second = counter + 1, counter + 1
    assert first is second
    assert (number(first), number(reserve(5))) == (6, 7)


def test_the_batch_of_one_job_is_numbered_without_gaps() -> None:
    counter: Any = reserve(5)
    written = []
    for _ in range(4):
        written.append(f"{counter:05}")
        counter += 1
    assert written == ["00005", "00006", "00007", "00008"]


def test_batches_of_two_jobs_never_share_a_number() -> None:
    counters: list[Any] = [reserve(1), reserve(1)]
    written = []
    for turn in (0, 0, 1, 0, 1, 1):
        written.append(f"{counters[turn]:05}")
        counters[turn] += 1
    assert len(set(written)) == len(written)


def test_adding_more_reserves_what_is_that_far_away() -> None:
    counter = reserve(5)
    later = counter + 10
    assert isinstance(later, Counter)
    assert (number(later), number(reserve(5))) == (15, 16)


def test_one_plus_the_number_is_reserved_as_well() -> None:
    counter = reserve(5)
    later = 1 + counter
    assert later is counter + 1


@pytest.mark.parametrize(
    ("change", "result"),
    [
        (lambda counter: counter + 0, 5),
        (lambda counter: counter + -1, 4),
        (lambda counter: counter - 1, 4),
        (lambda counter: counter * 2, 10),
        (lambda counter: counter + 0.5, 5.5),
        (lambda counter: counter + True, 6),
        (lambda counter: -counter, -5),
    ],
)
def test_other_arithmetic_gives_plain_numbers(change: Any, result: float) -> None:
    counter = reserve(5)
    value = change(counter)
    assert value == result
    assert not isinstance(value, Counter)


@pytest.mark.parametrize(
    "write",
    [
        lambda counter: f"{counter:05}",
        lambda counter: f"{counter:05d}",
        lambda counter: "{:05}".format(counter),  # noqa: UP032
        lambda counter: format(counter, "05"),
        lambda counter: str(counter).zfill(5),
        lambda counter: "%05d" % counter,  # noqa: UP031
        lambda counter: ("%s" % counter).zfill(5),  # noqa: UP031
        lambda counter: f"{int(counter):05}",
    ],
)
def test_every_way_of_writing_it_gives_the_hosts_text_and_keeps_it_reserved(write: Any) -> None:
    counter = reserve(42)
    assert write(counter) == "00042"
    assert number(reserve(42)) == 43


def test_it_is_a_number_to_everyone() -> None:
    counter = reserve(5)
    assert isinstance(counter, int)
    assert (counter == 5, counter < 6, hash(counter), [0] * counter) == (True, True, hash(5), [0, 0, 0, 0, 0])
    assert json.dumps({"counter": counter}) == '{"counter": 5}'
    assert max(counter, 3) is counter


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda counter: pickle.loads(pickle.dumps(counter))])
def test_a_copy_is_a_plain_number(duplicate: Any) -> None:
    counter = reserve(5)
    copied = duplicate([counter]) if duplicate is copy.deepcopy else [duplicate(counter)]
    assert copied == [5]
    assert type(copied[0]) is int


# The host's function.


def host_function(folder: Path) -> Any:
    """Like the host's get_save_image_path: the highest number in the folder plus one."""

    def get_save_image_path(filename_prefix: str, output_dir: str, width: int = 0) -> tuple[Any, ...]:
        numbers = [int(path.stem.rpartition("_")[2]) for path in folder.glob(f"{filename_prefix}_*")]
        return str(folder), filename_prefix, max(numbers, default=0) + 1, "", filename_prefix

    return get_save_image_path


def test_the_hosts_result_keeps_its_shape(tmp_path: Path) -> None:
    wrapped = reserving(host_function(tmp_path))
    assert wrapped.__name__ == "get_save_image_path"
    folder, name, counter, *rest = wrapped("image", output_dir="x", width=64)
    assert (folder, name, counter, rest) == (str(tmp_path), "image", 1, ["", "image"])
    assert isinstance(counter, Counter)


def test_the_same_folder_written_otherwise_is_the_same_series(tmp_path: Path) -> None:
    def elsewhere(prefix: str) -> tuple[Any, ...]:
        return f"{tmp_path}/sub/../", "image", 1, "", prefix

    first = reserving(host_function(tmp_path))("image", "x")[2]
    second = reserving(elsewhere)("image")[2]
    assert (number(first), number(second)) == (1, 2)


def test_batches_saved_by_many_threads_overwrite_nothing(tmp_path: Path) -> None:
    threads, saves, batch = 4, 15, 3
    get_save_image_path = reserving(host_function(tmp_path))
    start = threading.Barrier(threads)

    def save_all(thread: int) -> list[Path]:
        start.wait(5)
        written = []
        for _ in range(saves):
            folder, name, counter, *_ = get_save_image_path("image", "x")
            for _ in range(batch):
                path = Path(folder) / f"{name}_{counter:05}"
                with path.open("x") as file:
                    file.write(str(thread))
                written.append(path)
                counter += 1
        return written

    futures = [in_thread(save_all, thread) for thread in range(threads)]
    for thread, future in enumerate(futures):
        written = future.result(8)
        assert len(written) == saves * batch
        assert {path.read_text() for path in written} == {str(thread)}
    assert len(list(tmp_path.iterdir())) == threads * saves * batch


def test_a_collection_while_the_lock_is_held_waits_for_nothing() -> None:
    """The collector may drop a reservation on a thread that is reserving, or while another one is."""
    counter = reserve(5)
    cycle: list[Any] = [counter]
    cycle.append(cycle)
    counter = reserve(5)
    del cycle
    with save_numbers._lock:
        gc.collect(0)
        assert in_thread(gc.collect, 0).result(5) >= 0
        dropped = [counter]
        dropped.clear()
        del counter
    assert number(reserve(5)) == 5
