"""Two stores of one group, as two processes have them: what one has copied or converted the other maps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comfy_parallel.weights import loading
from comfy_parallel.weights.files.group import Group
from comfy_parallel.weights.files.group_server import GroupServer
from comfy_parallel.weights.files.regions import origin_of
from comfy_parallel.weights.files.store import Store
from tests.unit.weights.samples import GIB, bits, collect, numbers, read, write

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[GroupServer]:
    server = GroupServer()
    yield server
    server.close()


def stores(server: GroupServer, mode: str = "map") -> tuple[Store, Store]:
    return Store(mode, GIB, group=Group(server.name)), Store(mode, GIB, group=Group(server.name))


def converted(store: Store, path: str, dtype: Any = torch.float16) -> Any:
    return store.shared(read(store, path)["a"], dtype, 0, must_align=False)


def memory_of(tensor: Any) -> int:
    """Which memory of the machine a tensor lies in."""
    origin = origin_of(tensor)
    assert origin is not None
    return os.fstat(origin.region.fd).st_ino


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", a=numbers(50, 30), b=numbers(7, start=9))


@pytest.mark.parametrize("mode", ["map", "copy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_a_conversion_is_made_once(server: GroupServer, path: str, mode: str, dtype: Any) -> None:
    first, second = stores(server, mode)
    made, found = converted(first, path, dtype), converted(second, path, dtype)
    assert memory_of(made) == memory_of(found)
    assert bits(made) == bits(found)
    assert bits(made) == bits(read(first, path)["a"].to(dtype))


def test_who_joins_later_shares_what_it_opens_then(server: GroupServer, path: str, tmp_path: Path) -> None:
    first, second = Store("map", GIB, group=Group(server.name)), Store("map", GIB)
    own = converted(second, path)
    second.join(Group(server.name))
    assert bits(converted(second, path)) == bits(own)
    assert memory_of(converted(second, path)) == memory_of(own)
    later = write(tmp_path / "b.safetensors", a=numbers(50, 30))
    assert memory_of(converted(first, later)) == memory_of(converted(second, later))


def test_other_dtypes_and_other_tensors_have_their_own_places(server: GroupServer, path: str) -> None:
    first, second = stores(server)
    half, quarter = converted(first, path), converted(first, path, torch.float8_e4m3fn)
    other = second.shared(read(second, path)["b"], torch.float16, 0, must_align=False)
    assert bits(other) == bits(numbers(7, start=9).half())
    assert bits(converted(second, path)) == bits(half)
    assert bits(converted(second, path, torch.float8_e4m3fn)) == bits(quarter)


def test_a_copied_file_is_copied_once(server: GroupServer, path: str) -> None:
    first, second = stores(server, "copy")
    ours, theirs = (read(store, path)["a"] for store in (first, second))
    assert memory_of(ours) == memory_of(theirs)
    ours[0] = 5  # each may write to what it has
    assert bits(theirs) == bits(numbers(50, 30))


def pickled(store: Store, path: str, loads: list[str]) -> Any:
    def load() -> Any:
        loads.append(path)
        return torch.load(path, weights_only=True)

    return loading.load_file(store, path, load)


def test_a_pickled_file_is_read_once(server: GroupServer, tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    torch.save({"a": numbers(50, 30), "step": 7}, path)
    first, second = stores(server)
    loads: list[str] = []
    ours, theirs = pickled(first, path, loads), pickled(second, path, loads)
    assert loads == [path]
    assert (theirs["step"], bits(theirs["a"])) == (7, bits(numbers(50, 30)))
    assert memory_of(ours["a"]) == memory_of(theirs["a"])
    assert memory_of(first.shared(ours["a"], torch.float16, 0, must_align=False)) == memory_of(
        second.shared(theirs["a"], torch.float16, 0, must_align=False)
    )


def test_what_is_more_than_tensors_is_read_by_each(server: GroupServer, tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    torch.save([numbers(5)], path)
    first, second = stores(server)
    loads: list[str] = []
    assert bits(pickled(first, path, loads)[0]) == bits(pickled(second, path, loads)[0])
    assert loads == [path, path]


def test_a_file_that_was_written_to_is_another(server: GroupServer, path: str) -> None:
    first, second = stores(server)
    old = converted(first, path)
    stat = os.stat(path)
    content = bytearray(Path(path).read_bytes())
    content[-200:-100] = bytes(100)
    first.let_go(path)
    second.let_go(path)
    Path(path).write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as who copies a file with its times does
    new = converted(second, path)
    assert bits(new) == bits(read(second, path)["a"].half())
    assert memory_of(old) != memory_of(new)


def test_the_budget_counts_it_once(server: GroupServer, path: str) -> None:
    first, second = stores(server)
    kept = [converted(first, path)]
    used = first.used_bytes
    assert used >= 50 * 30 * 2
    kept.append(converted(second, path))
    assert first.used_bytes == second.used_bytes == used
    file = second.files()[0]
    assert (file.own_bytes, file.converted_bytes) == (0, used)


def test_it_lasts_as_long_as_anybody_uses_it(server: GroupServer, path: str) -> None:
    first, second = stores(server)
    made, found = converted(first, path), converted(second, path)
    expected = bits(made)
    del made
    collect()
    first.drop_unused()
    assert second.used_bytes > 0
    assert bits(found) == expected
    del found
    collect()
    second.drop_unused()
    assert second.used_bytes == 0
    assert first.files() == second.files() == []


def test_without_the_parent_each_makes_its_own(
    server: GroupServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = stores(server)
    made = converted(first, path)
    server.close()
    own = converted(second, path)
    assert bits(own) == bits(made)
    assert memory_of(own) != memory_of(made)
    assert caplog.text.count("this process's own") == 1
    assert second.used_bytes > 0


def test_what_fails_is_left_to_the_next(server: GroupServer, tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    torch.save({"a": numbers(5)}, path)
    first, second = stores(server)

    def fail() -> Any:
        raise RuntimeError("no such class")

    with pytest.raises(RuntimeError, match="no such class"):
        loading.load_file(first, path, fail)
    assert bits(pickled(second, path, [])["a"]) == bits(numbers(5))
