"""Weights that the host offloads are fetched from pinned memory, and what is no plain copy is left to the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import streaming
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import copies
from tests.fakes import make_slots
from tests.unit.weights.device import Driver, stand_in_driver, stand_in_stream
from tests.unit.weights.samples import bits, collect, numbers, read, slots_store, wrapper, write

ROWS = 1500  # of 4 numbers each
GPU = SimpleNamespace(type="cuda")


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    stand_in_stream(monkeypatch)
    yield stand_in_driver(monkeypatch)
    collect()  # what it has registered


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return slots_store(monkeypatch)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def module(store: Store, tmp_path: Path, slots: tuple[Slot, ...]) -> nn.Linear:
    """Its parameters are aliases of the file's mapping, as the host's loaders leave them in a slot."""
    path = write(tmp_path / "a.safetensors", weight=numbers(ROWS, 4), bias=numbers(ROWS))
    with torch.device("meta"):
        module = nn.Linear(4, ROWS)
    module.to_empty(device="cpu")
    load = wrapper("torch.nn.modules.module:Module._load_from_state_dict")(nn.Module._load_from_state_dict)
    with entered(slots[0]):
        load(module, read(store, path), "", {}, True, [], [], [])
    return module


class Host:
    """ComfyUI's `cast_to`, of newer hosts, as far as it is called."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cast_to = wrapper("comfy.model_management:cast_to")(self._cast_to_function())

    def _cast_to_function(self) -> Any:
        def cast_to(
            weight: Any,
            dtype: Any = None,
            device: Any = None,
            non_blocking: bool = False,
            copy: bool = False,
            stream: Any = None,
            r: Any = None,
        ) -> str:
            self.asked.append((weight, dtype, device, non_blocking, copy, stream, r))
            return "the host's"

        return cast_to


def test_a_copy_in_new_memory_has_the_files_bytes(store: Store, module: nn.Linear, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        for parameter, expected in ((module.weight, numbers(ROWS, 4)), (module.bias, numbers(ROWS))):
            found = streaming.fetched(store, parameter, torch.device("cpu"), None)
            assert bits(found) == bits(expected)
            assert found.data_ptr() != parameter.data_ptr()
    assert copies.bytes_from(slots[0]) == {"pinned": ROWS * 20, "staged": 0, "peer": 0}


def test_a_copy_goes_where_the_host_says(store: Store, module: nn.Linear, slots: tuple[Slot, ...]) -> None:
    target = torch.zeros(ROWS, 4)
    with entered(slots[0]):
        assert streaming.fetched(store, module.weight, torch.device("cpu"), None, target) is target
    assert bits(target) == bits(numbers(ROWS, 4))


def test_what_is_not_shared_or_not_registered_is_left_to_the_host(
    store: Store, module: nn.Linear, slots: tuple[Slot, ...], driver: Driver
) -> None:
    with entered(slots[0]):
        assert streaming.fetched(store, numbers(ROWS, 4), torch.device("cpu"), None) is None, "of its own"
        driver.refused = set(range(20))
        assert streaming.fetched(store, module.weight, torch.device("cpu"), None) is None, "refused"


def test_the_hosts_casts_of_offloaded_weights_are_such_copies(
    module: nn.Linear, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(streaming, "fetched", lambda *given: asked.append(given[1:]) or "ours")
    host = Host()
    weight, half = module.weight, torch.float16
    with entered(slots[0]):
        assert host.cast_to(weight, None, GPU, non_blocking=True, copy=True, stream="s", r="r") == "ours"
        assert host.cast_to(weight, weight.dtype, GPU, True) == "ours"
        assert asked == [(weight, GPU, "s", "r"), (weight, GPU, None, None)]
        for others in (
            {"device": GPU, "dtype": half, "non_blocking": True},
            {"device": GPU},  # waits
            {"device": torch.device("cpu"), "non_blocking": True},
            {},
        ):
            assert host.cast_to(weight, **others) == "the host's", others
    assert host.cast_to(weight, None, GPU, non_blocking=True) == "the host's", "outside of slots"
    assert len(host.asked) == 5


def test_what_cannot_be_fetched_is_the_hosts_to_cast(
    module: nn.Linear, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "fetched", lambda *given: None)
    host = Host()
    with entered(slots[0]):
        assert host.cast_to(module.weight, None, GPU, non_blocking=True, stream="s") == "the host's"
    assert host.asked == [(module.weight, None, GPU, True, False, "s", None)]


def test_what_lives_on_another_gpu_makes_no_detour_by_ram() -> None:
    there, here = SimpleNamespace(device=GPU), SimpleNamespace(device=SimpleNamespace(type="cpu"))
    assert streaming.are_on_gpus([there, None])
    assert not streaming.are_on_gpus([there, here])
    assert not streaming.are_on_gpus([None, None])
