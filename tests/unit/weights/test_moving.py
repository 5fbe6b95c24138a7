"""Modules that share their weights and move: to a device and back, or to another type."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.patches import weights as patches
from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import is_shared
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import homes, loads
from comfy_parallel.weights.gpu.homes import Home
from tests.fakes import make_slots
from tests.unit.weights.samples import bits, collect, numbers, read, torch_store, write

pytestmark = pytest.mark.timeout(120)

CPU, GPU = torch.device("cpu"), torch.device("meta")  # meta: torch refuses to copy out of it


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return torch_store(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6))


class OnDevice:
    """A parameter as torch has it on a GPU, whose `data` may be set to that of any device."""

    def __init__(self, data: Any, address: int = 0) -> None:
        self.data = data
        self.address = address

    def data_ptr(self) -> int:
        return self.address or int(self.data.data_ptr())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)


def shared_linear(store: Store, path: str, slot: Slot) -> nn.Linear:
    module = nn.Linear(4, 6)
    with entered(slot):
        module.load_state_dict(read(store, path))
    assert is_shared(module.weight)
    return module


def gone(store: Store, path: str, slot: Slot) -> tuple[OnDevice, Any]:
    """A weight that went to the device, and the shared tensor that it left."""
    module = shared_linear(store, path, slot)
    with entered(slot):
        leaving = loading.before_move(store, list(module.parameters()), GPU, None)
    _, home = leaving[0]
    parameter = OnDevice(home.tensor.to(GPU), 4096)
    loading.after_move([(parameter, home)])
    return parameter, home.tensor


# To a device and back.


def test_what_leaves_for_a_device_is_told_with_what_it_leaves(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    addresses = [module.weight.data_ptr(), module.bias.data_ptr()]
    with entered(slots[0]):
        leaving = loading.before_move(store, list(module.parameters()), GPU, None)
    assert [parameter for parameter, _ in leaving] == [module.weight, module.bias]
    assert [home.tensor.data_ptr() for _, home in leaving] == addresses
    assert is_shared(module.weight)


def test_what_shares_nothing_leaves_nothing(store: Store, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        assert loading.before_move(store, list(nn.Linear(4, 6).parameters()), GPU, None) == []


def test_the_way_back_is_no_copy(
    store: Store, slots: tuple[Slot, ...], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "unchanged", lambda store, pairs: pairs)  # On "meta" there are no numbers.
    parameter, tensor = gone(store, path, slots[0])
    with pytest.raises(NotImplementedError):
        parameter.data.to(CPU)
    with entered(slots[0]):
        assert loading.before_move(store, [parameter], CPU, None) == []
    assert parameter.data is tensor
    assert bits(parameter.data) == bits(numbers(6, 4))


@pytest.mark.parametrize(("device", "dtype"), [(None, torch.float16), (GPU, None), (None, None), (CPU, torch.float16)])
def test_only_the_way_back_leads_home(
    store: Store, slots: tuple[Slot, ...], path: str, device: Any, dtype: Any
) -> None:
    parameter, _ = gone(store, path, slots[0])
    with entered(slots[0]):
        loading.before_move(store, [parameter], device, dtype)
    assert parameter.data.is_meta


def test_a_parameter_that_was_replaced_has_no_home(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    parameter, tensor = gone(store, path, slots[0])
    assert homes.home_of(parameter).tensor is tensor  # type: ignore[union-attr]
    parameter.address = 8192
    assert homes.home_of(parameter) is None


@pytest.mark.parametrize("data", [torch.empty(6, 4, dtype=torch.float16), torch.empty(4, 6), torch.empty(24)])
def test_a_parameter_of_another_type_or_shape_has_no_home(
    store: Store, slots: tuple[Slot, ...], path: str, data: Any
) -> None:
    parameter, _ = gone(store, path, slots[0])
    parameter.data = data.to(GPU)
    assert homes.home_of(parameter) is None


def test_a_torch_parameter_whose_data_was_replaced_has_no_home(
    store: Store, slots: tuple[Slot, ...], path: str
) -> None:
    home = Home(shared_linear(store, path, slots[0]).bias.data)
    parameter = nn.Parameter(torch.zeros(6))
    homes.remember(parameter, home, None)
    assert homes.home_of(parameter) is home
    parameter.data = torch.zeros(6)
    assert homes.home_of(parameter) is None


def test_an_alias_that_was_replaced_is_at_no_home(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    home = loading.home_at(module.weight)
    assert home is not None
    assert loading.home_at(module.weight) is home
    for other in (home.tensor.view(torch.int32), home.tensor.view(4, 6), home.tensor.as_strided((6, 4), (1, 6))):
        module.weight.data = other if other.is_floating_point() else torch.zeros(6, 4)
        found = loading.home_at(module.weight)
        assert found is not home
        assert found is None or found.is_like(module.weight)
        assert found is None or found.tensor.stride() == module.weight.stride()
    module.weight.data = home.tensor * 2
    assert loading.home_at(module.weight) is None


def test_a_parameter_with_a_home_can_be_pickled(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    assert loading.home_at(module.weight) is not None
    content = io.BytesIO()
    torch.save(module, content)
    content.seek(0)
    read_back = torch.load(content, weights_only=False)
    assert bits(read_back.weight) == bits(module.weight)
    assert loading.home_at(read_back.weight) is None


def test_what_arrived_as_another_type_has_no_home(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    parameter = OnDevice(module.weight.data.to(GPU, torch.float16), 4096)
    loading.after_move([(parameter, Home(module.weight.data))])
    assert homes.home_of(parameter) is None


def test_what_did_not_leave_has_no_home(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    loading.after_move([(module.weight, Home(module.weight.data))])
    assert homes.home_of(module.weight) is None


def test_who_writes_gets_memory_of_its_own(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    loading.before_write(module.weight)
    assert not is_shared(module.weight)
    module.weight.data.mul_(2)
    assert bits(module.weight) == bits(numbers(6, 4) * 2)
    assert bits(shared_linear(store, path, slots[1]).weight) == bits(numbers(6, 4))
    assert is_shared(module.bias)


def test_who_writes_on_the_device_forgets_its_home(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    parameter, _ = gone(store, path, slots[0])
    loading.before_write(parameter)
    assert homes.home_of(parameter) is None
    loading.before_write(parameter)


def test_a_home_keeps_the_file_in_use(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    parameter, tensor = gone(store, path, slots[0])
    del tensor
    collect()
    assert store.find(path).slots == [0]
    loading.before_write(parameter)
    collect()
    assert store.find(path).slots == []


def test_a_module_really_goes_to_the_device(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    with entered(slots[0]):
        assert module.to(GPU) is module
    assert module.weight.is_meta
    assert module.bias.is_meta


# To another type.


@pytest.mark.parametrize("arguments", [(torch.float16,), (CPU, torch.bfloat16), ("cpu", torch.float64)], ids=str)
def test_another_type_is_made_once_for_two_slots(
    store: Store, slots: tuple[Slot, ...], path: str, arguments: tuple[Any, ...]
) -> None:
    modules = [shared_linear(store, path, slot) for slot in slots]
    for slot, module in zip(slots, modules, strict=True):
        with entered(slot):
            assert module.to(*arguments) is module
    first, second = modules
    assert first.weight.dtype == arguments[-1]
    assert bits(first.weight) == bits(numbers(6, 4).to(arguments[-1]))
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert is_shared(first.bias)
    assert store.find(path).slots == [0, 1]


def test_there_and_back_is_what_torch_gives(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    modules = [shared_linear(store, path, slot) for slot in slots]
    for slot, module in zip(slots, modules, strict=True):
        with entered(slot):
            module.to(torch.float16).to(torch.float32)
    assert bits(modules[0].weight) == bits(numbers(6, 4).half().float())
    assert modules[0].weight.data_ptr() == modules[1].weight.data_ptr()


@pytest.mark.parametrize("arguments", [(), (CPU,), (torch.float32,), (torch.zeros(1),)], ids=str)
def test_a_move_that_changes_nothing_leaves_the_parameters_shared(
    store: Store, slots: tuple[Slot, ...], path: str, arguments: tuple[Any, ...]
) -> None:
    module = shared_linear(store, path, slots[0])
    address = module.weight.data_ptr()
    with entered(slots[0]):
        module.to(*arguments) if arguments else module.to(dtype=None)
    assert module.weight.data_ptr() == address
    assert store.find(path).converted_bytes == 0


def test_only_floating_point_takes_another_type(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    module = nn.Module()
    module.steps = nn.Parameter(torch.zeros(9, dtype=torch.int64), requires_grad=False)
    path = write(tmp_path / "b.safetensors", steps=torch.arange(9))
    with entered(slots[0]):
        module.load_state_dict(read(store, path))
        assert is_shared(module.steps)
        module.to(torch.float16)
    assert is_shared(module.steps)
    assert module.steps.tolist() == list(range(9))
    assert module.steps.dtype == torch.int64


def test_what_shares_nothing_is_converted_by_torch(store: Store, slots: tuple[Slot, ...]) -> None:
    module = nn.Linear(4, 6)
    expected = module.weight.half()
    with entered(slots[0]):
        module.to(torch.float16)
    assert bits(module.weight) == bits(expected)
    assert not is_shared(module.weight)
    assert store.files() == []


def test_outside_slots_modules_move_as_ever(store: Store, slots: tuple[Slot, ...], path: str) -> None:
    module = shared_linear(store, path, slots[0])
    module.to(torch.float16)
    assert not is_shared(module.weight)
    assert bits(module.weight) == bits(numbers(6, 4).half())


@pytest.mark.parametrize("arguments", [("no device",), ([],), (torch.float32, CPU)])
def test_bad_arguments_are_refused_as_torch_does(
    store: Store, slots: tuple[Slot, ...], path: str, arguments: tuple[Any, ...]
) -> None:
    module = shared_linear(store, path, slots[0])
    with pytest.raises((RuntimeError, TypeError)) as expected:
        nn.Linear(4, 6).to(*arguments)
    with entered(slots[0]), pytest.raises(expected.type) as found:
        module.to(*arguments)
    assert str(found.value) == str(expected.value)
    assert is_shared(module.weight)


class WithScale(nn.Module):
    """Has a parameter that its file lacks, as the host's text encoders do, and others in a module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(1))


def test_what_is_on_the_gpu_keeps_its_home_when_its_module_follows(
    store: Store, path: str, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "_apply", patches._apply(nn.Module._apply))
    home = loading.home_at(shared_linear(store, path, slots[0]).weight)
    module = WithScale(nn.Linear(4, 6, bias=False, device=GPU))
    setattr(module.inner.weight, homes.HOME, home)
    with entered(slots[0]):
        module.to(GPU)
    assert module.scale.device == GPU
    assert getattr(module.inner.weight, homes.HOME, None) is home
