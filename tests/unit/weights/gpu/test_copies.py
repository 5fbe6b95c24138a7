"""How shared weights are copied to a GPU, with stand-ins for the driver and the GPU."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import copies, homes, loads, pins
from tests.fakes import make_slots
from tests.unit.weights.device import CHUNK, Driver, Stream, stand_in_driver, stand_in_stream
from tests.unit.weights.samples import GIB, bits, collect, let_go, numbers, read, torch_store, write

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
ROWS = 1500  # of 4 numbers each: 24,000 bytes


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return stand_in_driver(monkeypatch)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return stand_in_stream(monkeypatch)


@pytest.fixture
def slot() -> Slot:
    return make_slots("cuda:0")[0]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return torch_store(monkeypatch)


@pytest.fixture
def module(driver: Driver, store: Store, slot: Slot, tmp_path: Path) -> Iterator[nn.Linear]:
    module = nn.Linear(4, ROWS)
    path = write(tmp_path / "a.safetensors", weight=numbers(ROWS, 4), bias=numbers(ROWS))
    with entered(slot):
        module.load_state_dict(read(store, path))
        yield module
    let_go(store, module)


def pairs(module: nn.Linear) -> list[tuple[Any, homes.Home]]:
    found = [(parameter, loading.home_at(parameter)) for parameter in module.parameters()]
    return [(parameter, home) for parameter, home in found if home is not None]


def copy(store: Store, module: nn.Linear) -> None:
    """As if the CPU were the GPU that the module moves to."""
    with copies.complete():
        loads.load_apart(store, pairs(module), CPU)
    assert bits(module.weight) == bits(numbers(ROWS, 4))
    assert bits(module.bias) == bits(numbers(ROWS))


SIZE = ROWS * 5 * 4


# Pinned, in chunks.


def test_all_is_copied_from_chunks_that_are_pinned_once(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, slot: Slot
) -> None:
    before = dict(pairs(module))
    copy(store, module)
    file_size = store.files()[0].identity.size
    assert sorted(driver.registered.values(), reverse=True) == [*[CHUNK] * (file_size // CHUNK), file_size % CHUNK]
    assert store.files()[0].pinned_bytes == file_size
    assert copies.bytes_from(slot) == {"pinned": SIZE, "staged": 0, "peer": 0}
    for parameter, home in before.items():
        assert parameter.data_ptr() != home.address
        homes.go_home(parameter, home)
        assert parameter.data_ptr() == home.address
    copy(store, module)
    assert sum(driver.registered.values()) == file_size


def test_copies_are_waited_for_once(driver: Driver, stream: Stream, store: Store, module: nn.Linear) -> None:
    with copies.complete():
        with copies.complete():
            loads.load_apart(store, pairs(module), CPU)
        assert stream.waits == 0
    assert stream.waits == 1


def test_they_are_waited_for_after_an_error(driver: Driver, stream: Stream, store: Store, module: nn.Linear) -> None:
    def load() -> None:
        with copies.complete():
            loads.load_apart(store, pairs(module), CPU)
            raise RuntimeError("not this one")

    with pytest.raises(RuntimeError, match="not this one"):
        load()
    assert stream.waits == 1


@pytest.mark.parametrize("refused", [{0}, {3}, {1, 2, 7}, set(range(100))], ids=str)
def test_what_the_driver_refuses_goes_through_buffers(
    driver: Driver,
    stream: Stream,
    store: Store,
    module: nn.Linear,
    slot: Slot,
    refused: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies, "_BUFFER", 1000)
    driver.refused = refused
    copy(store, module)
    moved = copies.bytes_from(slot)
    assert moved["pinned"] + moved["staged"] == SIZE
    assert moved["staged"] > 0
    assert (moved["pinned"] == 0) == (refused == set(range(100)))
    assert driver.cleared == min(len(refused), -(-store.files()[0].identity.size // CHUNK))


def test_what_the_driver_refuses_is_told_once(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, caplog: pytest.LogCaptureFixture
) -> None:
    pins._tell_once.cache_clear()
    caplog.set_level(logging.INFO)
    driver.refused = {1, 2, 3}
    copy(store, module)
    assert driver.cleared == 3
    told = [message for message in caplog.messages if "does not register weights" in message]
    assert told == [
        "comfy_parallel: CUDA does not register weights (error 801); they are copied through pinned buffers"
    ]


def test_the_next_chunk_is_pinned_while_the_last_is_copied(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = []
    original = torch._foreach_copy_

    def queue(targets: Any, sources: Any, **options: Any) -> None:
        registered.append(len(driver.registered))
        original(targets, sources, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", queue)
    copy(store, module)
    assert registered == list(range(1, len(driver.registered) + 1))


def test_a_stream_that_reads_is_waited_for_before_memory_is_given_up(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, slot: Slot
) -> None:
    tensors = pairs(module)
    copy(store, module)
    waits = stream.waits
    store.let_go(store.files()[0].path)
    assert stream.waits == waits + 1
    assert driver.registered == {}
    for parameter, home in tensors:
        homes.go_home(parameter, home)
    copy(store, module)
    assert driver.registered == {}
    assert copies.bytes_from(slot)["staged"] == SIZE


def test_a_region_that_goes_is_unpinned_first(driver: Driver, stream: Stream, store: Store, module: nn.Linear) -> None:
    copy(store, module)
    assert driver.registered
    for parameter in module.parameters():
        homes.forget(parameter)
    collect()
    store.drop_unused()
    assert driver.registered == {}
    assert store.files() == []


def test_pieces_end_where_chunks_end(driver: Driver) -> None:
    assert list(pins.pieces(10, 2 * CHUNK)) == [(10, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 10)]
    assert list(pins.pieces(CHUNK, CHUNK)) == [(CHUNK, 2 * CHUNK)]
    assert list(pins.pieces(5, 0)) == []


def test_the_kernel_is_told_ahead_of_what_is_pinned(
    driver: Driver, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    class Mapping(mmap.mmap):
        def madvise(self, option: int, *place: int) -> None:
            assert option == mmap.MADV_WILLNEED
            told.append(place)  # type: ignore[arg-type]

    monkeypatch.setattr(mmap, "mmap", Mapping)
    size = 2 * CHUNK + 100
    fd = os.memfd_create("weights")
    os.ftruncate(fd, size)
    memory = pins.Pins(fd, size)
    memory.read([(0, 0, size)], Stream(), lambda size: True, lambda pieces: None)
    os.close(fd)
    assert told == [(0, 2 * CHUNK), (CHUNK, CHUNK + 100), (2 * CHUNK, 100)]


def test_the_driver_does_not_know_the_memory_that_others_copy(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear
) -> None:
    """The driver refuses copies of what lies in two chunks, and others do not wait for copies of registered memory."""
    tensors = [(parameter.data_ptr(), parameter.nbytes) for parameter in module.parameters()]
    copy(store, module)
    assert driver.registered
    for start, size in tensors:
        assert not any(start < a + length and a < start + size for a, length in driver.registered.items())


# The budget.


def test_what_is_pinned_counts(driver: Driver, stream: Stream, store: Store, module: nn.Linear) -> None:
    store.budget_bytes = 3 * CHUNK
    copy(store, module)
    assert store.used_bytes == sum(driver.registered.values()) == 3 * CHUNK


def test_what_nobody_uses_makes_room(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, slot: Slot, tmp_path: Path
) -> None:
    copy(store, module)
    first = store.files()[0]
    store.budget_bytes = first.identity.size + CHUNK
    for parameter in module.parameters():
        homes.forget(parameter)
    other = nn.Linear(4, ROWS)
    other.load_state_dict(read(store, write(tmp_path / "b.safetensors", weight=numbers(ROWS, 4), bias=numbers(ROWS))))
    collect()
    copy(store, other)
    assert first.pinned_bytes == 0
    assert copies.bytes_from(slot) == {"pinned": 2 * SIZE, "staged": 0, "peer": 0}
    assert [Path(file.path).name for file in store.files()] == ["b.safetensors"]


def test_an_outdated_file_that_nobody_uses_goes(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, tmp_path: Path
) -> None:
    copy(store, module)
    store.let_go(store.files()[0].path)
    for parameter in module.parameters():
        homes.forget(parameter)
    collect()
    store.keep_to_budget()
    assert store.files() == []


def test_conversions_are_pinned_but_count_once(
    driver: Driver, stream: Stream, store: Store, slot: Slot, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.safetensors", weight=numbers(ROWS, 4), bias=numbers(ROWS))
    half = nn.Linear(4, ROWS, dtype=torch.float16)
    with entered(slot):
        half.load_state_dict(read(store, path))
        with copies.complete():
            loads.load_apart(store, pairs(half), CPU)
        assert bits(half.weight) == bits(numbers(ROWS, 4, dtype=torch.float16))
        (file,) = store.files()
        assert file.pinned_bytes > 0
        assert store.used_bytes == file.converted_bytes


# Moves by torch and by the host.


def test_only_modules_with_tensors_elsewhere_are_moved(
    store: Store, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, buffered, grown = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
    model = nn.Sequential(inside, nn.Sequential(buffered, grown))
    moved, apply = [], nn.Module._apply

    def note(self: nn.Module, fn: Any, recurse: bool = True) -> Any:
        moved.append(self)
        return apply(self, fn, recurse)

    monkeypatch.setattr(nn.Module, "_apply", note)
    meta = torch.device("meta")
    with entered(slot):
        model.to(CPU)
        assert moved == []
        grown.weight.grad = torch.zeros(2, 2)
        model.to(CPU)
        assert moved == [grown]
        buffered.running_mean = torch.zeros(2, device=meta)
        buffered.to(meta)
        assert moved == [grown, buffered]
        model.to(meta)
        assert moved == [grown, buffered, inside, grown]
        assert {tensor.device for tensor in model.state_dict().values()} == {meta}
        inside.to(meta)
        assert len(moved) == 4


def test_a_module_that_moves_in_its_own_way_does_so(store: Store, slot: Slot) -> None:
    class Own(nn.Linear):
        applied = 0

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            Own.applied += 1
            return super()._apply(fn, recurse)

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    with entered(slot):
        model.to(CPU)
        model[1].to(CPU)
    assert Own.applied == 2


def test_parameters_are_told_once_and_in_order() -> None:
    tied = nn.Linear(3, 3)
    model = nn.Sequential(tied, nn.Linear(3, 3, bias=False), tied)
    assert [id(p) for p in loading.parameters_of(loading.modules_of(model))] == [id(p) for p in model.parameters()]


def test_a_budget_of_gigabytes_is_no_limit_here(store: Store) -> None:
    assert store.may_pin(GIB)
    assert not store.may_pin(GIB + 1)
