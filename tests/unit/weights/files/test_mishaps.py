"""Overwriting at bad moments: during a load, during a conversion, while leases come and go."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from comfy_parallel.weights import loading
from comfy_parallel.weights.files.formats import read_entries
from comfy_parallel.weights.files.leases import Leases
from comfy_parallel.weights.files.mapping import MappedFile
from comfy_parallel.weights.files.store import Store
from tests.unit.weights.samples import GIB, bits, numbers, overwrite, read, write

TRUNCATE = ': > "$1"'


def test_a_conversion_after_an_overwrite_leaves_the_old_bytes(tmp_path: Path) -> None:
    store = Store("map", GIB)
    path = write(tmp_path / "a.safetensors", a=numbers(5000))
    view = read(store, path)["a"]
    shared = store.shared(view, torch.float32, 0, must_align=False)
    overwrite(TRUNCATE, path)
    assert bits(shared) == bits(numbers(5000))
    store.shared(shared, torch.float16, 1, must_align=False)
    assert bits(shared) == bits(numbers(5000))  # pages are zero: MADV_DONTNEED on what is anonymous memory by now


@pytest.mark.parametrize("has_users", [True, False])
@pytest.mark.parametrize("script", [TRUNCATE, 'head -c 100000 /dev/urandom > "$1"'])
def test_an_overwrite_during_a_load_is_told(tmp_path: Path, script: str, has_users: bool) -> None:
    store = Store("map", GIB)
    path = write(tmp_path / "a.safetensors", a=numbers(50))
    with store.find(path).lock:
        store.content(store.find(path))
    kept = read(store, path) if has_users else None

    def load() -> Any:
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
        overwrite(script, path)
        return weights

    with pytest.raises(OSError, match="a.safetensors was overwritten while it was loaded"):
        loading.load_file(store, path, load)
    assert kept is None or bits(kept["a"]) == bits(numbers(50))


def test_a_file_that_is_not_there_leaves_no_error_in_a_finalizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_value))
    with pytest.raises(FileNotFoundError):
        MappedFile(str(tmp_path / "none"), None)
    gc.collect()
    assert unraisable == []


def test_the_watcher_survives_a_lease_that_is_given_back_meanwhile(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(b"x")
    fds = [os.open(path, os.O_RDONLY) for path in paths]

    def on_break(fd: int) -> None:
        leases.give_back(fd)
        for other in list(leases._held):  # what other threads' finalizers do at any time
            leases.give_back(other)
            os.close(other)

    leases = Leases(on_break)
    assert all(leases.take(fd) for fd in fds)
    overwrite('echo > "$1"', str(paths[fds.index(next(iter(leases._held)))]))
    assert is_watching(leases)


def test_the_watcher_survives_an_error_while_it_copies(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)

    def on_break(fd: int) -> None:
        leases.give_back(fd)
        raise OSError("Cannot allocate memory")

    leases = Leases(on_break)
    assert leases.take(fd)
    overwrite('echo > "$1"', str(path))
    assert is_watching(leases)


def is_watching(leases: Leases) -> bool:
    """The thread that dies says so on stderr; every later writer then waits 45 s and overwrites what is in use."""
    threads = [t for t in threading.enumerate() if t.native_id == leases._thread_id]
    for thread in threads:
        thread.join(1)
    return any(thread.is_alive() for thread in threads)


def test_the_watcher_survives_the_garbage_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_parallel.weights.files import mapping

    watcher = Leases(mapping._broken)  # a watcher of its own: other tests keep theirs
    monkeypatch.setattr(mapping, "_leases", watcher)
    gc.collect()
    gc.disable()
    try:
        store = Store("map", GIB)
        paths = [write(tmp_path / f"{index}.safetensors", a=numbers(5000)) for index in range(20)]
        kept = [read(store, path)["a"] for path in paths]
        first = os.path.basename(os.readlink(f"/proc/self/fd/{next(iter(watcher._held))}"))
        used = str(tmp_path / first)
        tensor = kept[paths.index(used)]
        del kept, store  # without `drop_unused`: what a test, or a dropped orphan (12), leaves behind
        copy_in_place = mapping._copy_in_place
        monkeypatch.setattr(mapping, "_copy_in_place", lambda *args: (gc.collect(), copy_in_place(*args)))
        overwrite(TRUNCATE, used)
        assert is_watching(watcher)
        assert bits(tensor) == bits(numbers(5000))
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "header", [b"[]", b"null", b"5", b'{"a":{}}', b'{"a":1}', b'{"a":{"dtype":"U8","shape":[1],"data_offsets":null}}']
)
def test_a_header_of_another_shape_is_a_value_error(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with (tmp_path / "a").open("rb") as file, pytest.raises(ValueError):
        read_entries(file.fileno())


def test_a_file_that_waits_to_be_loaded_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another slot begins a load, and tidies up, between finding the file and locking it."""
    store = Store("map", GIB)
    path = write(tmp_path / "a.safetensors", a=numbers(50))
    find = store.find
    found = []

    def find_and_tidy(path: str) -> Any:
        found.append(find(path))
        if len(found) == 1:
            store.keep_to_budget()
        return found[-1]

    monkeypatch.setattr(store, "find", find_and_tidy)
    tensor = read(store, path)["a"]
    assert len(found) == 2
    assert [file.content is not None for file in store.files()] == [True]
    assert bits(tensor) == bits(numbers(50))


def test_a_file_that_was_renamed_is_opened_by_its_new_name(tmp_path: Path) -> None:
    store = Store("map", GIB)
    path = write(tmp_path / "a.safetensors", a=numbers(50))
    store.find(path)
    Path(path).rename(tmp_path / "b.safetensors")
    assert bits(read(store, str(tmp_path / "b.safetensors"))["a"]) == bits(numbers(50))


def test_the_users_can_be_listed_while_others_come(tmp_path: Path) -> None:
    store = Store("map", GIB)
    path = write(tmp_path / "a.safetensors", **{f"w{index}": numbers(3) for index in range(200)})
    views = read(store, path)
    file, stop = store.find(path), threading.Event()

    def use() -> None:
        while not stop.is_set():
            _ = [store.shared(view, torch.float32, 0, must_align=False) for view in views.values()]

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        seen = [file.slots for _ in range(2000)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {tuple(slots) for slots in seen} <= {(), (0,)}
