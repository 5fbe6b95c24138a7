"""Weight files that are overwritten while they are used: their users keep the old bytes, new users get the new ones."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_parallel.weights.files import mapping
from comfy_parallel.weights.files.leases import Leases
from comfy_parallel.weights.files.mapping import MappedFile
from comfy_parallel.weights.files.regions import SharedMemory, is_unwritten
from comfy_parallel.weights.files.store import Store, WeightFile
from comfy_parallel.weights.spans import Span
from tests.unit.weights.samples import GIB, PATIENCE_S, bits, collect, numbers, overwrite, read, write

pytestmark = pytest.mark.timeout(120)

COUNT = 5000
TRUNCATE = ': > "$1"'
ENLARGE = 'head -c 100000 /dev/zero > "$1"'
APPEND = 'echo more >> "$1"'
PATCH = 'printf XXXXXXXX | dd of="$1" bs=1 seek=9000 conv=notrunc status=none'
CUT = f"{sys.executable} -S -c 'import os, sys; os.truncate(sys.argv[1], 5000)' \"$1\""
REFUSED = "are copied into shared memory"


@pytest.fixture(autouse=True)
def no_leases_of_other_tests() -> None:
    collect()


@pytest.fixture
def store() -> Store:
    return Store("map", GIB)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", a=numbers(COUNT), b=numbers(COUNT, start=9))


class Users:
    """A shared tensor, a private view that is as read, and one that was written to."""

    def __init__(self, store: Store, path: str) -> None:
        self.views = read(store, path)
        self.shared = store.shared(self.views["a"], torch.float32, 0, must_align=False)
        self.written = read(store, path)["b"]
        self.written[7] = -1
        self.expected = self.bits()
        assert self.shared is not None

    def bits(self) -> list[bytes]:
        return [bits(tensor) for tensor in (self.views["a"], self.views["b"], self.shared, self.written)]


def content_of(store: Store, path: str) -> Any:
    file = store.find(path)
    with file.lock:
        return store.content(file)


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


# By another process, in place.


@pytest.mark.parametrize("script", [TRUNCATE, ENLARGE, APPEND, PATCH, CUT])
def test_users_keep_the_old_bytes_of_a_file_that_is_overwritten(store: Store, path: str, script: str) -> None:
    users = Users(store, path)
    file = store.find(path)
    assert isinstance(file.content, MappedFile)
    overwrite(script, path)
    assert users.bits() == users.expected
    assert users.written[7] == -1
    assert store.find(path) is not file
    assert file in store.files()


@pytest.mark.parametrize("script", [TRUNCATE, PATCH])
def test_the_copies_are_as_writable_as_what_they_replace(store: Store, path: str, script: str) -> None:
    users = Users(store, path)
    overwrite(script, path)
    users.views["a"].fill_(5)
    users.written.fill_(6)
    assert users.views["a"].eq(5).all()
    assert users.written.eq(6).all()
    assert bits(users.shared) == users.expected[2]


def test_an_old_view_is_shared_with_its_old_numbers(store: Store, path: str) -> None:
    users = Users(store, path)
    overwrite(PATCH, path)
    again = store.shared(users.views["b"], torch.float32, 1, must_align=False)
    assert bits(again) == users.expected[1]
    assert store.shared(users.written, torch.float32, 1, must_align=False) is None


def test_the_next_load_reads_what_was_written(store: Store, path: str, tmp_path: Path) -> None:
    users = Users(store, path)
    new = write(tmp_path / "new.safetensors", a=numbers(COUNT, start=70))
    overwrite(f"cat '{new}' > \"$1\"", path)
    views = read(store, path)
    assert views.keys() == {"a"}
    assert bits(views["a"]) == bits(numbers(COUNT, start=70))
    assert bits(users.shared) == bits(numbers(COUNT))


def test_a_file_that_was_overwritten_is_new_even_if_its_size_and_date_are_not(store: Store, path: str) -> None:
    users = Users(store, path)
    file, stat = store.find(path), os.stat(path)
    overwrite(PATCH, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.find(path).identity == file.identity
    assert store.find(path) is not file
    assert b"XXXXXXXX" in bits(read(store, path)["a"])
    assert users.bits() == users.expected
    assert file.slots == [0]


def test_two_files_may_be_overwritten_at_once(store: Store, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{index}.safetensors", a=numbers(COUNT), b=numbers(COUNT)) for index in range(4)]
    users = [Users(store, path) for path in paths]
    writers = [subprocess.Popen(["sh", "-c", TRUNCATE, "sh", path]) for path in paths]
    assert [writer.wait(PATIENCE_S) for writer in writers] == [0] * 4
    assert all(user.bits() == user.expected for user in users)


def test_each_of_two_stores_keeps_its_bytes(path: str) -> None:
    users = [Users(Store("map", GIB), path) for _ in range(2)]
    overwrite(TRUNCATE, path)
    assert all(user.bits() == user.expected for user in users)


def test_a_file_may_be_overwritten_again_and_again(store: Store, path: str, tmp_path: Path) -> None:
    held = []
    for start in range(3):
        new = write(tmp_path / "new.safetensors", a=numbers(COUNT, start=start), b=numbers(COUNT))
        overwrite(f"cat '{new}' > \"$1\"", path)
        held.append(Users(store, path))
    assert [user.shared[0].item() for user in held] == [0, 1, 2]
    assert all(user.bits() == user.expected for user in held)


def test_one_line_says_that_a_file_in_use_is_overwritten(
    store: Store, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    users = Users(store, path)
    overwrite(TRUNCATE, path)
    assert len(lines(caplog, "running jobs keep its old bytes")) == 1
    assert users.bits() == users.expected


# When nobody uses it.


def test_a_mapping_that_nobody_uses_is_let_go(store: Store, path: str) -> None:
    file = store.find(path)
    region = content_of(store, path)
    overwrite(ENLARGE, path)
    assert not region.is_current
    assert not region.is_detached
    assert file.is_outdated
    assert store.find(path) is not file
    store.drop_unused()
    assert store.files() == []


def test_what_was_dropped_keeps_no_writer_waiting(store: Store, path: str) -> None:
    region = content_of(store, path)
    fd = region.fd
    del region
    store.drop_unused()
    collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    overwrite(TRUNCATE, path)
    assert Path(path).stat().st_size == 0


def test_bytes_that_were_copied_count_as_copied(store: Store, path: str) -> None:
    users = Users(store, path)
    file = store.find(path)
    size = Path(path).stat().st_size
    assert (file.mapped_bytes, file.copied_bytes) == (size, 0)
    overwrite(TRUNCATE, path)
    assert (file.mapped_bytes, file.copied_bytes) == (0, size)
    del users
    collect()
    store.find(path)
    store.drop_unused()
    assert file not in store.files()


# By this process.


def test_this_process_may_overwrite_a_file_that_it_uses(store: Store, path: str) -> None:
    users = Users(store, path)
    with open(path, "wb") as file:
        file.write(b"new")
    assert users.bits() == users.expected


def test_what_is_let_go_first_is_written_without_waiting(
    store: Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[int] = []
    monkeypatch.setattr(mapping._leases, "_on_break", broken.append)
    users = Users(store, path)
    store.let_go(path)
    save_file({"a": numbers(3)}, path)
    assert users.bits() == users.expected
    assert bits(read(store, path)["a"]) == bits(numbers(3))
    assert broken == []


@pytest.mark.parametrize("times", [1, 2])
def test_letting_go_of_what_nobody_mapped_does_nothing(store: Store, path: str, tmp_path: Path, times: int) -> None:
    for _ in range(times):
        store.let_go(path)
        store.let_go(str(tmp_path / "none"))
    views = read(store, path)
    for _ in range(times):
        store.let_go(path)
    assert bits(views["a"]) == bits(numbers(COUNT))


# The process that the kernel tells.


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> Leases:
    own = Leases(mapping._broken)
    monkeypatch.setattr(mapping, "_leases", own)
    return own


def test_another_one_is_told_when_it_ends(
    leases: Leases, store: Store, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    users = Users(store, path)
    assert leases._guard is not None
    first, _ = leases._guard
    first.kill()
    deadline = time.monotonic() + PATIENCE_S
    while leases._guard is None or leases._guard[0] is first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(lines(caplog, "it starts again")) == 1
    overwrite(TRUNCATE, path)
    assert users.bits() == users.expected


def test_without_one_files_are_copied(leases: Leases, store: Store, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/none")
    assert isinstance(content_of(store, path), SharedMemory)


# Where the old bytes cannot be kept.


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is told. No memory is left for copies."""
    found: list[Any] = []

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mapping, "_copy_in_place", fail)
    monkeypatch.setattr(mapping, "on_loss", lambda region, error: found.append((region, error.errno)))
    return found


@pytest.mark.parametrize("script", [TRUNCATE, ENLARGE, PATCH])
def test_bytes_that_cannot_be_kept_are_told_and_read_as_zeros(
    store: Store, path: str, losses: list[Any], script: str
) -> None:
    users = Users(store, path)
    region = store.find(path).content
    overwrite(script, path)
    assert losses == [(region, errno.ENOMEM)]
    assert region is not None
    assert region.is_lost
    assert {byte for content in users.bits() for byte in content} == {0}, "a read does not end the process"
    users.views["a"].fill_(1)


def test_what_is_lost_is_read_anew(store: Store, path: str, tmp_path: Path, losses: list[Any]) -> None:
    users = Users(store, path)
    new = write(tmp_path / "new.safetensors", a=numbers(COUNT, start=70))
    overwrite(f"cat '{new}' > \"$1\"", path)
    assert bits(read(store, path)["a"]) == bits(numbers(COUNT, start=70))
    assert users.bits() != users.expected


def test_nothing_is_lost_where_nobody_uses_it(store: Store, path: str, losses: list[Any]) -> None:
    region = content_of(store, path)
    overwrite(TRUNCATE, path)
    assert losses == []
    assert not region.is_lost


def test_without_a_listener_a_loss_is_loud(
    store: Store, path: str, losses: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "on_loss", mapping._tell_of_loss)
    users = Users(store, path)
    overwrite(TRUNCATE, path)
    assert [record.levelname for record in caplog.records if "could not be kept" in record.getMessage()] == ["CRITICAL"]
    assert users.shared is not None


# By renaming another file over it, or removing it.


def test_a_file_that_is_renamed_over_leaves_the_old_one_mapped(store: Store, path: str, tmp_path: Path) -> None:
    users = Users(store, path)
    file = store.find(path)
    new = write(tmp_path / "new.safetensors", a=numbers(COUNT, start=70))
    os.replace(new, path)
    assert users.bits() == users.expected
    assert not file.is_outdated
    assert store.find(path) is not file
    assert bits(read(store, path)["a"]) == bits(numbers(COUNT, start=70))


def test_a_file_that_is_removed_stays_with_its_users(store: Store, path: str) -> None:
    users = Users(store, path)
    os.remove(path)
    assert users.bits() == users.expected
    with pytest.raises(FileNotFoundError):
        store.find(path)


# Where files cannot be guarded.


def refuse(self: Leases, fd: int) -> bool:
    return False


def test_without_leases_files_are_copied_and_one_line_says_so(
    store: Store, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Leases, "take", refuse)
    other = write(tmp_path / "b.safetensors", a=numbers(3))
    assert isinstance(content_of(store, path), SharedMemory)
    assert isinstance(content_of(store, other), SharedMemory)
    (line,) = lines(caplog, REFUSED)
    assert path in line
    users = Users(store, path)
    overwrite(TRUNCATE, path)
    assert users.bits() == users.expected


def test_a_file_that_somebody_writes_to_is_copied(
    store: Store, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = subprocess.Popen(
        ["sh", "-c", 'exec 3>>"$1"; echo; read line', "sh", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    users = Users(store, path)
    assert isinstance(content_of(store, path), SharedMemory)
    assert isinstance(content_of(store, write(tmp_path / "b.safetensors", a=numbers(3))), MappedFile)
    writer.communicate(b"\n", timeout=PATIENCE_S)
    assert len(lines(caplog, REFUSED)) == 1
    overwrite(TRUNCATE, path)
    assert users.bits() == users.expected


def test_a_file_that_this_process_writes_to_is_copied(store: Store, path: str) -> None:
    with open(path, "r+b"):
        assert isinstance(content_of(store, path), SharedMemory)


def test_a_refused_file_leaves_no_descriptor_behind(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "take", refuse)
    collect()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="guard it against being overwritten"):
        MappedFile(path, None)
    collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


# Leases.


def test_a_lease_that_was_given_back_keeps_nobody_waiting(path: str) -> None:
    broken: list[int] = []
    leases = Leases(broken.append)
    with open(path, "rb") as file:
        assert leases.take(file.fileno())
        leases.give_back(file.fileno())
        leases.give_back(file.fileno())
        overwrite(APPEND, path)
    assert broken == []


def test_a_reader_breaks_no_lease(store: Store, path: str) -> None:
    users = Users(store, path)
    overwrite('cat "$1" > /dev/null', path)
    Path(path).read_bytes()
    load_file(path)
    file = store.find(path)
    assert file.mapped_bytes
    assert not file.is_outdated
    assert users.bits() == users.expected


def test_a_mapped_file_is_no_copy(path: str) -> None:
    store = Store("map", GIB)
    file: WeightFile = store.find(path)
    region = content_of(store, path)
    assert isinstance(region, MappedFile)
    assert bits(region.tensor(Span.contiguous(0, torch.uint8, (region.size,)))) == Path(path).read_bytes()
    assert is_unwritten(read(store, path)["a"])
    assert (file.copied_bytes, store.used_bytes) == (0, 0)
