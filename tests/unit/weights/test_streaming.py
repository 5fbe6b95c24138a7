"""Weights on hosts with dynamic VRAM: copied to the GPU one by one, from one place for all slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading, streaming
from comfy_parallel.weights.files.formats import read_entries
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import copies
from tests.fakes import make_slots
from tests.unit.weights.device import Driver, Stream, stand_in_driver, stand_in_stream
from tests.unit.weights.samples import GIB, bits, collect, numbers, read, slots_store, wrapper, write

ROWS = 1500  # of 4 numbers each: 24,000 bytes


class FileSlice(NamedTuple):
    """ComfyUI's, comfy/memory_management.py."""

    file_ref: object
    lock: object
    offset: int
    size: int


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    yield stand_in_driver(monkeypatch)
    collect()  # what it has registered


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    return stand_in_stream(monkeypatch)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return slots_store(monkeypatch)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", weight=numbers(ROWS, 4), bias=numbers(ROWS))


def mapped_by_host(path: str) -> dict[str, Any]:
    """As ComfyUI loads a safetensors file where it has dynamic VRAM."""
    with open(path, "rb") as file, safe_open(path, framework="pt") as opened:
        entries = read_entries(file.fileno())
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    for name, tensor in weights.items():
        entry = entries[name]
        where = FileSlice(3, threading.Lock(), entry.start, tensor.nbytes)
        tensor.untyped_storage()._comfy_tensor_file_slice = where  # type: ignore[attr-defined]
    return weights


def loaded(store: Store, path: str, slot: Slot) -> nn.Linear:
    """A module of the host's, whose weights are the file's."""
    with entered(slot):
        weights: dict[str, Any] = loading.load_file(store, path, lambda: mapped_by_host(path))
    module = nn.Linear(4, ROWS, device="meta")
    module.load_state_dict(weights, assign=True)
    return module


@pytest.fixture
def module(store: Store, path: str, slots: tuple[Slot, ...]) -> nn.Linear:
    return loaded(store, path, slots[0])


def copied(store: Store, tensor: Any, slot: Slot) -> Any:
    """A copy as the host asks for it; None if it was not made."""
    target = torch.zeros(tensor.shape, dtype=tensor.dtype)
    with entered(slot):
        return target if streaming.copy_in(store, tensor, target, None) else None


def test_a_weight_is_copied_from_the_file_as_it_was_when_it_was_loaded(
    store: Store, module: nn.Linear, slots: tuple[Slot, ...], driver: Driver
) -> None:
    assert bits(copied(store, module.weight, slots[0])) == bits(numbers(ROWS, 4))
    assert bits(copied(store, module.bias.data, slots[0])) == bits(numbers(ROWS))
    assert sum(driver.registered.values()) == Path(store.files()[0].path).stat().st_size
    assert copies.bytes_from(slots[0])["pinned"] == ROWS * 20


def test_slots_copy_from_one_place(store: Store, path: str, slots: tuple[Slot, ...], driver: Driver) -> None:
    modules = [loaded(store, path, slot) for slot in slots]
    assert bits(copied(store, modules[0].weight, slots[0])) == bits(copied(store, modules[1].weight, slots[1]))
    (file,) = store.files()
    assert file.slots == [0, 1]
    assert file.pinned_bytes == sum(driver.registered.values()) <= Path(path).stat().st_size
    assert store.used_bytes == file.pinned_bytes


def test_a_part_of_a_weight_is_copied(store: Store, module: nn.Linear, slots: tuple[Slot, ...]) -> None:
    assert bits(copied(store, module.weight[7:9], slots[0])) == bits(numbers(ROWS, 4)[7:9])


def test_what_does_not_lie_in_shared_memory_as_it_is_is_left_to_the_host(
    store: Store, module: nn.Linear, slots: tuple[Slot, ...], path: str
) -> None:
    assert copied(store, numbers(ROWS, 4), slots[0]) is None
    assert copied(store, module.weight.data.T, slots[0]) is None, "its numbers are in another order"
    with entered(slots[0]):
        target = torch.zeros(ROWS, 4, dtype=torch.float16)
        assert not streaming.copy_in(store, module.weight, target, None), "of another dtype"
        written = read(store, path)["weight"]
    assert copied(store, written, slots[0]) is None, "its owner may have written to it"


def test_what_the_driver_refuses_is_left_to_the_host(
    store: Store, module: nn.Linear, slots: tuple[Slot, ...], driver: Driver
) -> None:
    driver.refused = {1}
    assert copied(store, module.weight, slots[0]) is None
    assert bits(copied(store, module.bias.data[:100], slots[0])) == bits(numbers(ROWS)[:100]), (
        "it is in the first chunk"
    )


def test_a_slice_that_the_file_does_not_hold_is_not_read(store: Store, path: str, slots: tuple[Slot, ...]) -> None:
    weights = mapped_by_host(path)
    storage = weights["weight"].untyped_storage()
    storage._comfy_tensor_file_slice = FileSlice(3, None, 10**6, 24_000)  # type: ignore[attr-defined]
    with entered(slots[0]):
        loading.load_file(store, path, lambda: weights)
    assert copied(store, weights["weight"], slots[0]) is None


def test_memory_that_is_read_is_kept_until_that_is_over(
    store: Store, path: str, slots: tuple[Slot, ...], stream: Stream, driver: Driver
) -> None:
    module = loaded(store, path, slots[0])
    copied(store, module.weight, slots[0])
    del module
    collect()
    store.drop_unused()
    assert driver.registered
    stream.synchronize()
    other = write(Path(path).with_name("b.safetensors"), weight=numbers(ROWS, 4), bias=numbers(ROWS))
    again = loaded(store, other, slots[0])
    copied(store, again.weight, slots[0])
    with entered(slots[0]):
        loading.between_jobs(was_freed=False)
    collect()
    store.drop_unused()
    assert len(store.files()) == 1
    assert sum(driver.registered.values()) == store.files()[0].pinned_bytes
    del again
    collect()
    with entered(slots[0]):
        loading.between_jobs(was_freed=True)
    assert driver.registered == {}


# What the host does without.


class Pinning:
    """Counts the host's own pinned copies."""

    def __init__(self) -> None:
        self.pinned: list[tuple[Any, str, Any]] = []

        def pin_memory(module: Any, subset: str = "weights", size: Any = None) -> bool:
            self.pinned.append((module, subset, size))
            return True

        def pin_memory_before_subsets(module: Any) -> bool:
            self.pinned.append((module, "weights", None))
            return True

        wrap = wrapper("comfy.pinned_memory:pin_memory")
        self.pin = wrap(pin_memory, read_slice=None)
        self.pin_without_subsets = wrap(pin_memory_before_subsets, read_slice=None)


def test_the_host_pins_no_copies_of_what_slots_share(store: Store, module: nn.Linear, slots: tuple[Slot, ...]) -> None:
    host = Pinning()
    with entered(slots[0]):
        assert not host.pin(module)
        assert not host.pin(module, subset="weights-loaded", size=9)
        assert not host.pin(SimpleNamespace(weight=SimpleNamespace(_qdata=module.weight), bias=None)), "quantised"
        assert host.pinned == []
        host.pin(module, subset="patches", size=4)
        assert host.pinned == [(module, "patches", 4)]


def test_hosts_before_0_23_pin_no_copies_of_what_slots_share_either(
    store: Store, module: nn.Linear, slots: tuple[Slot, ...]
) -> None:
    host, own = Pinning(), nn.Linear(4, ROWS)
    with entered(slots[0]):
        assert not host.pin_without_subsets(module)
        assert host.pinned == []
        assert host.pin_without_subsets(own)
        assert host.pinned == [(own, "weights", None)]


@pytest.mark.parametrize("budget", [0, GIB])
def test_the_host_pins_what_slots_cannot_share(
    monkeypatch: pytest.MonkeyPatch, path: str, slots: tuple[Slot, ...], budget: int
) -> None:
    store = slots_store(monkeypatch, Store("map", budget, pins=budget == 0))
    module, own, host = loaded(store, path, slots[0]), nn.Linear(4, ROWS), Pinning()
    nothing = SimpleNamespace(weight=None, bias=None)
    with entered(slots[0]):
        for part in (module, own, nothing):
            assert host.pin(part, "weights", 7)
        assert host.pinned == [(part, "weights", 7) for part in (module, own, nothing)]
        assert copied(store, module.weight, slots[0]) is None
    assert host.pin(module)


class OnGpu:
    """A tensor there, as far as the patch looks."""

    device = SimpleNamespace(type="cuda")


@pytest.mark.parametrize(
    ("destination", "destination2", "is_copied"),
    [(None, OnGpu(), True), (OnGpu(), None, True), (torch.zeros(1), OnGpu(), False), (torch.zeros(1), None, False)],
)
def test_what_goes_to_the_gpu_directly_is_copied_from_shared_memory(
    store: Store,
    slots: tuple[Slot, ...],
    monkeypatch: pytest.MonkeyPatch,
    destination: Any,
    destination2: Any,
    is_copied: bool,
) -> None:
    ours: list[Any] = []
    hosts: list[Any] = []

    def copy_in(store: Store, tensor: Any, target: Any, stream: Any) -> bool:
        ours.append((tensor, target, stream))
        return True

    def read_tensor_file_slice_into(
        tensor: Any, destination: Any, stream: Any = None, destination2: Any = None
    ) -> bool:
        hosts.append((tensor, destination, stream, destination2))
        return False

    monkeypatch.setattr(streaming, "copy_in", copy_in)
    wrapped = wrapper("comfy.memory_management:read_tensor_file_slice_into")(read_tensor_file_slice_into)
    with entered(slots[0]):
        assert wrapped("w", destination, stream="s", destination2=destination2) is is_copied
    assert (ours == [("w", destination2 or destination, "s")]) is is_copied
    assert hosts == ([] if is_copied else [("w", destination, "s", destination2)])
    monkeypatch.setattr(streaming, "copy_in", lambda *_: False)
    with entered(slots[0]):
        assert not wrapped("w", destination, stream="s", destination2=destination2)
    assert hosts[-1] == ("w", destination, "s", destination2)


@pytest.mark.parametrize(("destination", "is_copied"), [(OnGpu(), True), (torch.zeros(1), False)])
def test_hosts_before_0_23_copy_from_shared_memory_too(
    slots: tuple[Slot, ...], store: Store, monkeypatch: pytest.MonkeyPatch, destination: Any, is_copied: bool
) -> None:
    """They call with two arguments, within the stream that the copy is for."""
    ours: list[Any] = []
    hosts: list[Any] = []

    def read_tensor_file_slice_into(tensor: Any, destination: Any) -> bool:
        hosts.append((tensor, destination))
        return False

    monkeypatch.setattr(streaming, "copy_in", lambda *given: not ours.append(given))  # type: ignore[func-returns-value]
    wrapped = wrapper("comfy.memory_management:read_tensor_file_slice_into")(read_tensor_file_slice_into)
    with entered(slots[0]):
        assert wrapped("w", destination) is is_copied
    assert ours == ([(store, "w", destination, None)] if is_copied else [])
    assert hosts == ([] if is_copied else [("w", destination)])
