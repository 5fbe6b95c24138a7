"""What was copied to a device: who may copy from there, and what comes of what somebody wrote to it.

The CPU is the GPU here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import is_shared
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import blocks, copies, homes, loads
from tests.fakes import make_slots
from tests.unit.weights.device import stand_in_driver, stand_in_stream
from tests.unit.weights.samples import bits, collect, model_of, numbers, read, slots_store, write

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
COUNT = 5
SIZE = COUNT * 100 * 4


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    stand_in_driver(monkeypatch)
    stand_in_stream(monkeypatch)
    store = slots_store(monkeypatch)
    yield store
    collect()
    store.drop_unused()


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture(autouse=True)
def peers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each copy from one GPU to another."""
    copied = []

    def copy(pairs: Any, event: Any) -> None:
        copied.append(pairs[0][0].nbytes)
        with torch.inference_mode():
            for source, target in pairs:
                target.copy_(source)

    monkeypatch.setattr(copies, "_copy_peer", copy)
    return copied


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", **{f"{n}": numbers(100, start=n) for n in range(COUNT)})


def expected() -> list[bytes]:
    return [bits(numbers(100, start=n)) for n in range(COUNT)]


def model_in(store: Store, path: str, slot: Slot, *, is_inference: bool = False) -> nn.Module:
    with entered(slot), torch.inference_mode(is_inference):
        return model_of(store, read(store, path), slot.index)


def pairs_at_home(model: nn.Module) -> list[tuple[Any, homes.Home]]:
    found = [(parameter, loading.home_at(parameter)) for parameter in model.parameters()]
    return [(parameter, home) for parameter, home in found if home is not None]


def pairs_away(model: nn.Module) -> list[tuple[Any, homes.Home]]:
    found = [(parameter, homes.home_of(parameter)) for parameter in model.parameters()]
    return [(parameter, home) for parameter, home in found if home is not None]


def load(store: Store, model: nn.Module, slot: Slot, *, is_whole: bool = True) -> nn.Module:
    with entered(slot), copies.complete():
        way = loads.load_whole if is_whole else loads.load_apart
        way(store, pairs_at_home(model), CPU)
    assert not any(is_shared(parameter) for parameter in model.parameters())
    return model


def contents(model: nn.Module) -> list[bytes]:
    return [bits(parameter.data) for parameter in model.parameters()]


def send_home(store: Store, model: nn.Module, slot: Slot) -> None:
    with entered(slot):
        loading.send_home(store, pairs_away(model))


# Writing to what lies on a GPU.


def through_data(weight: Any) -> None:
    weight.data.add_(1)


def in_place(weight: Any) -> None:
    with torch.no_grad():
        weight.add_(1)


def through_a_view(weight: Any) -> None:
    with torch.no_grad():
        weight.view(10, 10)[3].mul_(2)


def through_detached(weight: Any) -> None:
    weight.detach().copy_(torch.zeros(100))


def in_inference_mode(weight: Any) -> None:
    with torch.inference_mode():
        weight.add_(1)


def in_inference_mode_through_data(weight: Any) -> None:
    with torch.inference_mode():
        weight.data[7] = -1


def behind_torchs_back(weight: Any) -> None:
    ctypes.memset(weight.data_ptr() + 11, 0x55, 1)


WRITES = (
    through_data,
    in_place,
    through_a_view,
    through_detached,
    in_inference_mode,
    in_inference_mode_through_data,
    behind_torchs_back,
)


def writes(*, is_inference: bool) -> list[Callable[[Any], None]]:
    """Outside of inference mode, torch lets nobody write to a tensor that was made in it, but for its `data`."""
    refused = (in_place, through_a_view, through_detached, through_data)
    return [write for write in WRITES if not (is_inference and write in refused)]


CASES = [(write, mode) for mode in (False, True) for write in writes(is_inference=mode)]


@pytest.mark.parametrize("is_whole", [True, False], ids=["block", "apart"])
@pytest.mark.parametrize(("change", "is_inference"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_a_weight_that_was_written_to_on_the_gpu_does_not_go_home(
    store: Store, path: str, slots: tuple[Slot, ...], change: Any, is_inference: bool, is_whole: bool
) -> None:
    model = load(store, model_in(store, path, slots[0], is_inference=is_inference), slots[0], is_whole=is_whole)
    parameters = list(model.parameters())
    change(parameters[2])
    written = bits(parameters[2].data)
    assert written != expected()[2]
    send_home(store, model, slots[0])
    assert [is_shared(parameter) for parameter in parameters] == [True, True, False, True, True]
    assert contents(model) == [*expected()[:2], written, *expected()[3:]]
    assert homes.home_of(parameters[2]) is None


@pytest.mark.parametrize("is_whole", [True, False], ids=["block", "apart"])
def test_weights_that_nobody_wrote_to_go_home(store: Store, path: str, slots: tuple[Slot, ...], is_whole: bool) -> None:
    model = load(store, model_in(store, path, slots[0]), slots[0], is_whole=is_whole)
    send_home(store, model, slots[0])
    assert all(is_shared(parameter) for parameter in model.parameters())
    assert contents(model) == expected()


def test_what_is_no_number_is_equal_to_itself(store: Store, tmp_path: Path, slots: tuple[Slot, ...]) -> None:
    path = write(tmp_path / "nan.safetensors", **{"0": torch.full((7,), float("nan"))})
    model = load(store, model_in(store, path, slots[0]), slots[0], is_whole=False)
    send_home(store, model, slots[0])
    assert all(is_shared(parameter) for parameter in model.parameters())


def test_weights_that_are_taken_apart_keep_what_was_written(store: Store, path: str, slots: tuple[Slot, ...]) -> None:
    model = load(store, model_in(store, path, slots[0]), slots[0])
    parameters = list(model.parameters())
    through_data(parameters[0])
    content = contents(model)
    with entered(slots[0]):
        loads.take_apart(store, pairs_away(model))
    assert not any(map(blocks.is_in_one, parameters))
    assert contents(model) == content
    send_home(store, model, slots[0])
    assert [is_shared(parameter) for parameter in parameters] == [False, True, True, True, True]
    assert contents(model) == content


# Copying from another slot.


def test_a_block_is_copied_from_the_slot_that_has_it(
    store: Store, path: str, slots: tuple[Slot, ...], peers: list[int]
) -> None:
    kept = load(store, model_in(store, path, slots[0]), slots[0])
    other = load(store, model_in(store, path, slots[1]), slots[1])
    assert copies.bytes_from(slots[1]) == {"pinned": 0, "staged": 0, "peer": SIZE}
    assert contents(kept) == contents(other) == expected()
    assert len(peers) == 1


@pytest.mark.parametrize("change", WRITES, ids=lambda change: change.__name__)
def test_what_was_written_to_is_never_lent(store: Store, path: str, slots: tuple[Slot, ...], change: Any) -> None:
    kept = load(store, model_in(store, path, slots[0]), slots[0])
    change(list(kept.parameters())[3])
    written = contents(kept)
    other = load(store, model_in(store, path, slots[1]), slots[1])
    assert contents(other) == expected()
    assert contents(kept) == written
    assert copies.bytes_from(slots[1])["peer"] == 0
    send_home(store, other, slots[1])
    assert all(is_shared(parameter) for parameter in other.parameters())


def test_what_is_written_to_while_it_is_copied_is_read_again(
    store: Store, path: str, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load(store, model_in(store, path, slots[0]), slots[0])
    copy = copies._copy_peer

    def write_and_copy(pairs: Any, event: Any) -> None:
        through_data(list(kept.parameters())[1])
        copy(pairs, event)

    monkeypatch.setattr(copies, "_copy_peer", write_and_copy)
    assert contents(load(store, model_in(store, path, slots[1]), slots[1])) == expected()


def gone(model: nn.Module) -> None:
    for name in list(model._parameters):
        delattr(model, name)


def replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data + 1


def forgotten(model: nn.Module) -> None:
    loading.forget_homes(model)


@pytest.mark.parametrize("happens", [gone, replaced, forgotten], ids=lambda happens: happens.__name__)
def test_nobody_copies_from_what_is_there_no_more(
    store: Store, path: str, slots: tuple[Slot, ...], peers: list[int], happens: Any
) -> None:
    kept = load(store, model_in(store, path, slots[0]), slots[0])
    happens(kept)
    assert contents(load(store, model_in(store, path, slots[1]), slots[1])) == expected()
    assert peers == []


def test_nobody_copies_from_what_went_home(store: Store, path: str, slots: tuple[Slot, ...], peers: list[int]) -> None:
    kept = load(store, model_in(store, path, slots[0]), slots[0])
    send_home(store, kept, slots[0])
    assert contents(load(store, model_in(store, path, slots[1]), slots[1])) == expected()
    assert peers == []


def test_only_where_it_is_fast(
    store: Store, path: str, slots: tuple[Slot, ...], peers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "is_fast", lambda source, target: False)
    kept = load(store, model_in(store, path, slots[0]), slots[0])
    load(store, model_in(store, path, slots[1]), slots[1])
    assert contents(kept) == expected()
    assert peers == []


def test_loads_at_once_leave_to_others_what_those_read(
    store: Store, path: str, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second load begins while the first reads its first block, and takes that one last."""
    monkeypatch.setattr(blocks, "_LARGEST", 400)
    first, second = (pairs_at_home(model_in(store, path, slot)) for slot in slots)
    with loads._in_order(blocks.blocks(first), CPU) as one:
        taken = [next(one).homes[0].place[1].offset]
        with loads._in_order(blocks.blocks(second), CPU) as other:
            order = [block.homes[0].place[1].offset for block in other]
        taken += [block.homes[0].place[1].offset for block in one]
    assert sorted(order) == sorted(taken)
    assert order[-1] == taken[0]
    assert not loads._claimed
