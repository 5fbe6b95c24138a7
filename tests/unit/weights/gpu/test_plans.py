"""What a load of a whole model copies, found once, with stand-ins for the driver and the GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import blocks, homes, plans, transfers
from tests.fakes import make_slots
from tests.unit.weights.device import stand_in_driver, stand_in_stream
from tests.unit.weights.samples import bits, let_go, numbers, read, torch_store, write

pytestmark = pytest.mark.timeout(30)

CPU = torch.device("cpu")
NAMES = ("0.weight", "0.bias", "1.0.weight", "1.1.weight", "1.1.bias")


@pytest.fixture
def slot() -> Slot:
    return make_slots("cuda:0")[0]


@pytest.fixture(params=[1 << 20, 100, 1], ids=["one-block", "blocks", "alone"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    stand_in_driver(monkeypatch)
    stand_in_stream(monkeypatch)
    monkeypatch.setattr(blocks, "_LARGEST", request.param)
    return torch_store(monkeypatch)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    shapes = {name: (4, 4) if name.endswith("weight") else (4,) for name in NAMES}
    return {name: numbers(*shape, start=100.0 * i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture
def model(store: Store, slot: Slot, tmp_path: Path, weights: dict[str, torch.Tensor]) -> Iterator[nn.Sequential]:
    """Loaded and unloaded once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.ReLU()))
    path = write(tmp_path / "a.safetensors", **weights)
    with entered(slot):
        model.load_state_dict(read(store, path))
        load(store, model)
        unload(model)
        yield model
    let_go(store, model)


def load(store: Store, model: nn.Module, *patched: str) -> tuple[plans.Plan, list[Any]]:
    """As if the CPU were the GPU that the model is loaded onto."""
    with transfers.complete():
        return plans.load_ahead(store, model, CPU, patched)


def unload(model: nn.Module) -> None:
    for parameter in model.parameters():
        homes.send_home(parameter)


def copied(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if homes.home_of(parameter) is not None]


def nothing_new(_parameter: Any) -> None:
    raise AssertionError("looked for again")


def test_all_weights_are_copied(store: Store, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    plan, modules = load(store, model)
    assert list(zip(plan.names, map(id, modules), strict=True)) == [(name, id(m)) for name, m in model.named_modules()]
    assert plan.done == {"0": 80, "1.0": 64, "1.1": 80, "1.2": 0}
    assert copied(model) == list(NAMES)
    assert {name: bits(parameter) for name, parameter in model.named_parameters()} == {
        name: bits(tensor) for name, tensor in weights.items()
    }


def test_what_is_unchanged_is_not_looked_for_again(
    store: Store, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(store, model)
    unload(model)
    monkeypatch.setattr(loading, "home_at", nothing_new)
    monkeypatch.setattr(loading, "named_modules_of", nothing_new)
    assert load(store, model) == first
    assert copied(model) == list(NAMES)


def test_patched_weights_are_left_out(store: Store, model: nn.Module) -> None:
    for patched, expected in ((("1.1.weight",), 1), (("1.1.weight",), 1), (("1.1.bias", "0.bias"), 2), ((), 0)):
        done = load(store, model, *patched)[0].done
        assert copied(model) == [name for name in NAMES if name not in patched]
        assert len(done) == 4 - expected
        unload(model)


def replace_a_module(model: Any) -> None:
    model[1][0] = nn.Linear(4, 4, bias=False)


def swap_modules(model: Any) -> None:
    model[1][0], model[1][1] = model[1][1], model[1][0]


def rename_a_module(model: Any) -> None:
    model[1].last = model[1].pop(2)


def remove_a_module(model: Any) -> None:
    del model[1][1]


def add_a_module(model: Any) -> None:
    model[1].append(nn.Linear(2, 2))


def change_a_class(model: Any) -> None:
    model[0].__class__ = type("Other", (nn.Linear,), {})


def replace_a_parameter(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.data, requires_grad=False)


def replace_its_numbers(model: Any) -> None:
    model[0].weight.data = torch.zeros(4, 4)


def take_a_view(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.t()


def add_a_parameter(model: Any) -> None:
    model[1][0].bias = nn.Parameter(torch.zeros(4))


def remove_a_parameter(model: Any) -> None:
    model[0].bias = None


def add_a_buffer(model: Any) -> None:
    model[0].register_buffer("mask", torch.zeros(4))


def add_a_gradient(model: Any) -> None:
    model[0].bias.grad = torch.zeros(4)


def hook_its_state(model: Any) -> None:
    model[0]._register_state_dict_hook(lambda *args: None)


def write_to_it(model: Any) -> None:
    loading.before_write(model[0].weight)


def move_a_parameter(model: Any) -> None:
    """To the module after its own."""
    model[1][2]._parameters["bias"] = model[1][1]._parameters.pop("bias")


def find_its_home_again(model: Any) -> None:
    homes.forget(model[0].weight)
    loading.home_at(model[0].weight)


def leave_it_where_it_is(model: Any) -> None:
    """On the device."""
    home = homes.home_at(model[0].weight, lambda _: None)
    assert home is not None
    model[0].weight.data = home.tensor.clone()
    homes.remember(model[0].weight, home, None)


@pytest.mark.parametrize(
    "change",
    [
        replace_a_module,
        swap_modules,
        rename_a_module,
        remove_a_module,
        add_a_module,
        change_a_class,
        replace_a_parameter,
        replace_its_numbers,
        take_a_view,
        add_a_parameter,
        remove_a_parameter,
        add_a_buffer,
        add_a_gradient,
        hook_its_state,
        write_to_it,
        move_a_parameter,
        find_its_home_again,
        leave_it_where_it_is,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_is_seen(store: Store, model: nn.Module, change: Callable[[Any], None]) -> None:
    change(model)
    before = {name: bits(parameter) for name, parameter in model.named_parameters()}
    was_at_home = [name for name, parameter in model.named_parameters() if loading.home_at(parameter) is not None]
    assert plans._plans[model].found(()) is None
    plan, modules = load(store, model)
    assert list(zip(plan.names, map(id, modules), strict=True)) == [(name, id(m)) for name, m in model.named_modules()]
    assert {name: bits(parameter) for name, parameter in model.named_parameters()} == before
    homed = set(copied(model))
    assert homed >= {name for name in was_at_home if change is not add_a_gradient or name != "0.bias"}
    for name, size in plan.done.items():
        own = {f"{name}.{key}": p.nbytes for key, p in model.get_submodule(name).named_parameters()}
        assert own.keys() <= homed
        assert size == sum(own.values())


def test_all_bytes_are_counted(store: Store, model: nn.Module, slot: Slot) -> None:
    before = transfers.bytes_from(slot)["pinned"]
    load(store, model)
    assert transfers.bytes_from(slot) == {"pinned": before + 224, "staged": 0, "peer": 0}


def test_taken_apart_each_weight_has_memory_of_its_own(
    store: Store, model: Any, weights: dict[str, torch.Tensor]
) -> None:
    load(store, model)
    loading.take_apart(model)
    assert not any(blocks.is_in_one(parameter) for parameter in model.parameters())
    assert copied(model) == list(NAMES)
    assert {name: bits(parameter) for name, parameter in model.named_parameters()} == {
        name: bits(tensor) for name, tensor in weights.items()
    }
    before = [parameter.data_ptr() for parameter in model.parameters()]
    loading.take_apart(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_weights_stay_in_their_block_where_there_is_no_room(
    store: Store, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(store, model)
    before = [parameter.data_ptr() for parameter in model.parameters()]

    def no_memory(_tensor: Any) -> Any:
        raise torch.OutOfMemoryError("all in use")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", no_memory)
        loading.take_apart(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert copied(model) == list(NAMES)


def test_it_keeps_nothing_alive(store: Store, slot: Slot) -> None:
    """Not even a model that one of its modules knows of."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].__dict__["root"] = model
    with entered(slot):
        load(store, model)
    gone = ref(model)
    assert model in plans._plans
    del model
    gc.collect()
    assert gone() is None
