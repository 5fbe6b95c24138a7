"""How shared weights are copied to a GPU, with stand-ins for the driver and the GPU."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import homes, parts, peers, pins, transfers
from comfy_parallel.weights.gpu.parts import Part, apart
from tests.fakes import make_slots
from tests.unit.weights.device import CHUNK, Driver, Stream, stand_in_driver, stand_in_stream
from tests.unit.weights.samples import GIB, bits, collect, let_go, numbers, read, torch_store, write

pytestmark = pytest.mark.timeout(30)

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
    with transfers.complete():
        transfers.move(apart(pairs(module)), CPU, store.may_pin)
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
    assert transfers.bytes_from(slot) == {"pinned": SIZE, "staged": 0, "peer": 0}
    for parameter, home in before.items():
        assert parameter.data_ptr() != home.address
        homes.send_home(parameter)
        assert parameter.data_ptr() == home.address
    copy(store, module)
    assert sum(driver.registered.values()) == file_size


def test_copies_are_waited_for_once(driver: Driver, stream: Stream, store: Store, module: nn.Linear) -> None:
    with transfers.complete():
        with transfers.complete():
            transfers.move(apart(pairs(module)), CPU, store.may_pin)
        assert stream.waits == 0
    assert stream.waits == 1


def test_they_are_waited_for_after_an_error(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_FIRST", 1)

    def told() -> Iterator[Part]:
        yield apart(pairs(module))[0]
        raise RuntimeError("not this one")

    with pytest.raises(RuntimeError, match="not this one"), transfers.complete():
        transfers.move(told(), CPU, store.may_pin)
    assert stream.waits == 1


def test_each_part_finds_room_that_is_free(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is asked for a part's memory when the copies of the one before are queued."""
    rooms: list[ref[Any]] = []
    free_at_copy = []
    empty, foreach_copy = torch.empty, torch._foreach_copy_

    def watched_empty(*size: int, **options: Any) -> Any:
        room = empty(*size, **options)
        if size[0]:
            rooms.append(ref(room))
        return room

    def watched_copy(*args: Any, **options: Any) -> None:
        free_at_copy.append(tuple(room() is None for room in rooms))
        foreach_copy(*args, **options)

    monkeypatch.setattr(parts, "_FIRST", 1)
    monkeypatch.setattr(parts, "_SMALL", 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", watched_empty)
        patch.setattr(torch, "_foreach_copy_", watched_copy)
        copy(store, module)
    assert list(dict.fromkeys(free_at_copy)) == [(True,), (True, True)]


def test_weights_are_copied_where_there_is_no_room_for_all_at_once(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*size: int, **options: Any) -> Any:
        raise torch.OutOfMemoryError("all in use")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        copy(store, module)


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
    monkeypatch.setattr(transfers, "_BUFFER", 1000)
    driver.refused = refused
    copy(store, module)
    moved = transfers.bytes_from(slot)
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
    for parameter, _ in tensors:
        homes.send_home(parameter)
    copy(store, module)
    assert driver.registered == {}
    assert transfers.bytes_from(slot)["staged"] == SIZE


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
    assert transfers.bytes_from(slot) == {"pinned": 2 * SIZE, "staged": 0, "peer": 0}
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
        with transfers.complete():
            transfers.move(apart(pairs(half)), CPU, store.may_pin)
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


# From other GPUs.


class OnGpu:
    """A parameter with its numbers on some GPU."""

    def __init__(self, tensor: Any, gpu: int) -> None:
        self.data = SimpleNamespace(
            data_ptr=lambda: 4096, is_cuda=True, device=SimpleNamespace(type="cuda", index=gpu), owner=self
        )
        self.dtype, self.shape, self.device = tensor.dtype, tensor.shape, self.data.device

    def data_ptr(self) -> int:
        return 4096


@dataclass
class Queued:
    """What is copied between GPUs, and what is waited for."""

    pairs: list[Any] = field(default_factory=list)
    events: set[Any] = field(default_factory=set)

    def copy(self, pairs: Iterable[Any], events: Collection[Any]) -> None:
        self.pairs += pairs
        self.events |= set(events)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> Queued:
    queued = Queued()
    monkeypatch.setattr(peers, "copy", queued.copy)
    monkeypatch.setattr(peers, "is_faster_than_ram", lambda source, target: target < 2)
    return queued


def lent(tensor: Any, gpu: int, event: Any) -> OnGpu:
    parameter = OnGpu(tensor, gpu)
    homes.remember(parameter, homes.Home(tensor), homes.Arrival(event))
    return parameter


def target_on(gpu: int) -> Any:
    return SimpleNamespace(device=SimpleNamespace(index=gpu))


def test_another_gpu_is_copied_from_after_its_own_copy(queued: Queued, module: nn.Linear) -> None:
    tensor, target = module.weight.data, target_on(1)
    assert not homes.is_lent([homes.Home(tensor)], 1)
    holder = lent(tensor, 0, "event")
    assert homes.is_lent([homes.Home(tensor)], 1)
    assert not homes.is_lent([homes.Home(tensor)], 2)
    assert homes.borrow([homes.Home(tensor)], [target]) == {0: holder.data}
    assert (queued.pairs, queued.events) == ([(holder.data, target)], {"event"})


def test_a_copy_that_is_made_again_is_copied_from_after_that(queued: Queued, module: nn.Linear) -> None:
    tensor = module.weight.data
    holder, copy = lent(tensor, 0, "first"), target_on(1)
    home, data = homes.home_of(holder), holder.data
    assert home is not None
    homes.send_home(holder)
    assert homes.borrow([home], [copy]) == {}, "it is at home"
    holder.data = data
    assert homes.borrow([home], [copy]) == {}, "nobody has said yet that it is a copy"
    homes.remember(holder, home, homes.Arrival("second"))
    assert homes.borrow([home], [copy]) == {0: data}
    assert queued.events == {"second"}
    homes.remember(holder, home, None)
    assert homes.borrow([home], [copy]) == {}, "torch moved it"


def test_a_parameter_that_comes_and_goes_is_listed_once(queued: Queued, module: nn.Linear) -> None:
    tensor = module.weight.data
    holder = lent(tensor, 0, "event")
    for _ in range(3):
        homes.remember(holder, homes.Home(tensor), homes.Arrival("event"))
    region, span = homes.place_of(tensor)
    assert len(homes._holders[region][span]) == 1


def leave_alone(_holder: OnGpu) -> None:
    pass


def copy_again(holder: OnGpu) -> None:
    home = homes.home_of(holder)
    assert home is not None
    homes.remember(holder, home, homes.Arrival("another"))


@pytest.mark.parametrize(
    ("happens", "layout", "expected"),
    [
        (leave_alone, "alike", "whole"),
        (leave_alone, "other", [0, 1]),
        (leave_alone, None, [0, 1]),
        (homes.forget, "alike", [0]),
        (homes.send_home, "alike", [0]),
        (copy_again, "alike", [0, 1]),
    ],
    ids=["", "other-layout", "no-block", "forgotten", "home", "again"],
)
def test_a_block_is_copied_as_one_while_all_of_it_is_there(
    queued: Queued,
    module: nn.Linear,
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[Any], None],
    layout: str | None,
    expected: Any,
) -> None:
    monkeypatch.setattr(homes, "_memory_of", id)
    monkeypatch.setattr(peers, "wait_for_readers", lambda gpu: None)
    sources, targets = [homes.Home(one.data) for one in (module.weight, module.bias)], [target_on(1), target_on(1)]
    arrival = homes.Arrival("event", "alike")
    holders = [OnGpu(one.data, 0) for one in (module.weight, module.bias)]
    for holder, home in zip(holders, sources, strict=True):
        homes.remember(holder, home, arrival)
    happens(holders[1])
    found = homes.borrow(sources, targets, layout)
    if expected == "whole":
        assert queued.pairs == [(id(holders[0].data), id(targets[0]))]
        assert found == {0: holders[0].data, 1: holders[0].data}
        assert queued.events == {"event"}
    else:
        assert queued.pairs == [(holders[number].data, targets[number]) for number in expected]
        assert found == {number: holders[number].data for number in expected}


def test_what_is_copied_is_given_back_before_the_load_ends(
    driver: Driver, stream: Stream, store: Store, module: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    lender = torch.zeros(1)
    is_kept = ref(lender)
    monkeypatch.setattr(homes, "borrow", lambda *args, lent=[lender]: {0: lent.pop()} if lent else {})
    del lender
    with transfers.complete():
        transfers.move(apart(pairs(module)), CPU, store.may_pin)
        transfers.move([], CPU, store.may_pin)
        assert is_kept() is not None, "it is being copied"
        stream.synchronize()
        transfers.move([], CPU, store.may_pin)
        assert is_kept() is None


def test_a_parameter_that_has_another_home_by_now_is_not_copied_from(queued: Queued, module: nn.Linear) -> None:
    """As one that was converted in between."""
    holder = lent(module.weight.data, 0, "first")
    homes.remember(holder, homes.Home(module.bias.data), homes.Arrival("second"))
    assert homes.borrow([homes.Home(module.weight.data)], [target_on(1)]) == {}


def test_a_slot_on_the_same_gpu_is_copied_from_first(queued: Queued, module: nn.Linear) -> None:
    tensor = module.weight.data
    holders = [lent(tensor, gpu, gpu) for gpu in (0, 1, 0)]
    for target, expected in ((0, holders[0]), (1, holders[1])):
        assert homes.borrow([homes.Home(tensor)], [target_on(target)]) == {0: expected.data}


def test_only_the_same_numbers_are_taken_and_where_that_is_fast(queued: Queued, module: nn.Linear) -> None:
    weight = module.weight.data
    holder = lent(weight, 0, "event")
    assert homes.borrow([homes.Home(weight)], [target_on(2)]) == {}, "RAM is faster"
    assert homes.borrow([homes.Home(module.bias.data)], [target_on(1)]) == {}
    assert homes.borrow([homes.Home(weight.view(torch.int32))], [target_on(1)]) == {}
    assert homes.borrow([homes.Home(weight)], [target_on(1)]) == {0: holder.data}


@pytest.mark.parametrize("happens", ["forgotten", "replaced", "home", "gone"])
def test_nobody_copies_from_what_is_no_copy_any_more(
    queued: Queued, module: nn.Linear, happens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(peers, "wait_for_readers", waited.append)
    tensor = module.weight.data
    holder = lent(tensor, 0, "event")
    if happens == "forgotten":
        homes.forget(holder)
    elif happens == "replaced":
        holder.data.data_ptr = lambda: 8192
    elif happens == "home":
        homes.send_home(holder)
        assert holder.data is tensor
    else:
        del holder
        collect()
    assert homes.borrow([homes.Home(tensor)], [target_on(1)]) == {}
    assert waited == ([0] if happens == "forgotten" else [])
    assert not queued.pairs


def test_a_budget_of_gigabytes_is_no_limit_here(store: Store) -> None:
    assert store.may_pin(GIB)
    assert not store.may_pin(GIB + 1)
