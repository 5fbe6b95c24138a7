"""Loading a module in a slot: its parameters alias the file, and everything else is as torch leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import ALIGNMENT, is_shared, origin_of
from comfy_parallel.weights.files.store import Store
from tests.fakes import make_slots
from tests.unit.weights.samples import bits, collect, numbers, read, torch_store, write

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that torch's modules are loaded through."""
    return torch_store(monkeypatch)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.blocks = nn.ModuleList([nn.Linear(4, 6), nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))])
        self.head = nn.Linear(6, 4, bias=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "convolution": lambda: nn.Conv2d(2, 3, 3),
    "embedding": lambda: nn.Embedding(10, 4),
    "half": lambda: nn.Linear(4, 6).half(),
    "bfloat16": lambda: nn.Conv2d(2, 3, 3, bias=False).bfloat16(),
    "double": lambda: nn.Linear(4, 6).double(),
    "recurrent": lambda: nn.LSTM(3, 5, num_layers=2),
    "without gradients": lambda: nn.Linear(4, 6).requires_grad_(False),
    "nested": Nested,
    "tied": Tied,
}


def weights_of(module: nn.Module) -> dict[str, Any]:
    """Other numbers for all that a module's state holds, in 32 bits where it is floating point."""
    state = module.state_dict()
    return {
        name: numbers(*value.shape, start=index / 3, dtype=torch.float32 if value.is_floating_point() else value.dtype)
        for index, (name, value) in enumerate(state.items())
    }


def outcome(module: nn.Module, weights: dict[str, Any], *, strict: bool) -> tuple[Any, ...]:
    """What loading says, and every bit that the module then holds."""
    try:
        said: Any = tuple(map(tuple, module.load_state_dict(weights, strict=strict)))
    except RuntimeError as error:
        said = str(error)
    return said, {name: (value.dtype, bits(value)) for name, value in module.state_dict().items()}


def load(slot: Slot | None, module: nn.Module, weights: dict[str, Any]) -> nn.Module:
    with entered(slot):
        module.load_state_dict(weights)
    return module


def shared_names(module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if is_shared(value)}


# What torch would do.


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_loaded_with_the_numbers_that_torch_gives_it(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path, name: str
) -> None:
    weights = weights_of(MODULES[name]())
    path = write(tmp_path / "a.safetensors", **{key: value.clone() for key, value in weights.items()})
    expected = outcome(MODULES[name](), weights, strict=True)
    module = MODULES[name]()
    before = dict(module.named_parameters(remove_duplicate=False))
    with entered(slots[0]):
        assert outcome(module, read(store, path), strict=True) == expected
    after = dict(module.named_parameters(remove_duplicate=False))
    assert shared_names(module) == set(after)
    assert all(after[key] is parameter for key, parameter in before.items())
    assert all(type(parameter) is nn.Parameter for parameter in after.values())


def widened(weights: dict[str, Any]) -> dict[str, Any]:
    return {**weights, "head.weight": numbers(4, 7)}


def without_one(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name != "blocks.0.bias"}


def with_more(weights: dict[str, Any]) -> dict[str, Any]:
    return {**weights, "head.bias": numbers(4), "tail.weight": numbers(2), "blocks.0.weight.lora": numbers(1)}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", [widened, without_one, with_more, lambda weights: {}])
def test_what_does_not_fit_is_reported_as_torch_does(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path, change: Any, strict: bool
) -> None:
    torch.manual_seed(0)
    alone, module = Nested(), Nested()
    module.load_state_dict(alone.state_dict())
    weights = change(weights_of(alone))
    expected = outcome(alone, weights, strict=strict)
    path = write(tmp_path / "a.safetensors", **weights)
    with entered(slots[0]):
        assert outcome(module, read(store, path), strict=strict) == expected


def test_one_number_in_brackets_is_left_to_torch(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    weights = {**weights_of(Nested()), "scale": torch.tensor([3.0])}
    module = load(slots[0], Nested(), read(store, write(tmp_path / "a.safetensors", **weights)))
    assert module.scale.item() == 3
    assert module.scale.shape == ()


def test_a_value_that_is_no_tensor_is_reported_as_torch_does(store: Store, slots: tuple[Slot, ...]) -> None:
    weights: dict[str, Any] = {"weight": "numbers", "bias": None}
    torch.manual_seed(0)
    alone = nn.Linear(4, 6)
    torch.manual_seed(0)
    with entered(slots[0]):
        assert outcome(nn.Linear(4, 6), weights, strict=True) == outcome(alone, weights, strict=True)


def test_tensors_may_be_assigned_instead(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    weights = weights_of(nn.Linear(4, 6))
    views = read(store, write(tmp_path / "a.safetensors", **weights))
    module = nn.Linear(4, 6)
    with entered(slots[0]):
        module.load_state_dict(views, assign=True)
    assert module.weight.data_ptr() == views["weight"].data_ptr()
    assert shared_names(module) == set()


def test_hooks_see_what_they_would_see(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    weights = weights_of(nn.Linear(4, 6))
    module = nn.Linear(4, 6)
    module.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *others: state.__setitem__(prefix + "weight", state[prefix + "weight"] * 2)
    )
    load(slots[0], module, read(store, write(tmp_path / "a.safetensors", **weights)))
    assert bits(module.weight) == bits(weights["weight"] * 2)
    assert bits(module.bias) == bits(weights["bias"])


def test_the_callers_state_dict_is_left_alone(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    views = read(store, write(tmp_path / "a.safetensors", **weights_of(nn.Linear(4, 6))))
    before = dict(views)
    load(slots[0], nn.Linear(4, 6), views)
    assert views.keys() == before.keys()
    assert all(views[name] is before[name] for name in views)


# What is shared.


def test_the_models_of_two_slots_alias_the_same_bytes(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", **weights_of(Nested()))
    first, second = (load(slot, Nested(), read(store, path)) for slot in slots)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    assert store.find(path).slots == [0, 1]
    assert store.find(path).converted_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_conversion_is_what_torch_gives_and_shared(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weights = {"weight": torch.randn(300, 50) * 100, "bias": torch.randn(300)}
    path = write(tmp_path / "a.safetensors", **weights)
    alone = load(None, nn.Linear(50, 300).to(dtype), weights)
    first, second = (load(slot, nn.Linear(50, 300).to(dtype), read(store, path)) for slot in slots)
    assert first.weight.dtype == dtype
    assert bits(first.weight) == bits(alone.weight)
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert first.bias.data_ptr() == second.bias.data_ptr()


@pytest.mark.parametrize("take", [lambda t: t.t(), lambda t: t[:, ::2][:6], lambda t: t[3:9, :4]])
def test_a_piece_that_is_not_contiguous_is_shared_as_one_that_is(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path, take: Any
) -> None:
    whole = numbers(12, 12)
    path = write(tmp_path / "a.safetensors", whole=whole)
    rows, columns = take(whole).shape
    modules = [
        load(slot, nn.Linear(columns, rows, bias=False), {"weight": take(read(store, path)["whole"])}) for slot in slots
    ]
    assert modules[0].weight.is_contiguous()
    assert bits(modules[0].weight) == bits(take(whole))
    assert modules[0].weight.data_ptr() == modules[1].weight.data_ptr()


def test_tied_parameters_stay_tied(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", **{"embedding.weight": numbers(10, 4), "head.weight": numbers(10, 4)})
    module: Any = load(slots[0], Tied(), read(store, path))
    assert module.head.weight is module.embedding.weight
    assert is_shared(module.head.weight)
    assert bits(module.embedding.weight) == bits(numbers(10, 4))


def test_buffers_are_the_modules_own(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    weights = weights_of(nn.BatchNorm1d(5))
    module = load(slots[0], nn.BatchNorm1d(5), read(store, write(tmp_path / "a.safetensors", **weights)))
    assert shared_names(module) == {"weight", "bias"}
    assert bits(module.running_mean) == bits(weights["running_mean"])
    module(torch.randn(8, 5))


def test_a_tensor_that_was_written_is_loaded_as_it_was_written(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path
) -> None:
    weights = {"weight": numbers(100, 100), "bias": numbers(100)}
    path = write(tmp_path / "a.safetensors", **weights)
    views = read(store, path)
    views["weight"].mul_(2)
    module = load(slots[0], nn.Linear(100, 100), views)
    assert bits(module.weight) == bits(weights["weight"] * 2)
    assert not is_shared(module.weight)
    views["weight"].zero_()
    assert bits(module.weight) == bits(weights["weight"] * 2)
    assert bits(load(slots[1], nn.Linear(100, 100), read(store, path)).weight) == bits(weights["weight"])


def test_a_state_dict_that_is_written_later_changes_no_model(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path
) -> None:
    views = read(store, write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6)))
    module = load(slots[0], nn.Linear(4, 6), views)
    views["weight"].zero_()
    assert bits(module.weight) == bits(numbers(6, 4))


def test_other_files_may_be_loaded_into_a_module_that_shares(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path
) -> None:
    first = write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6))
    second = write(tmp_path / "b.safetensors", weight=numbers(6, 4, start=9), bias=numbers(6, start=9))
    module = load(slots[0], nn.Linear(4, 6), read(store, first))
    load(slots[0], module, read(store, second))
    collect()
    assert bits(module.weight) == bits(numbers(6, 4, start=9))
    assert store.find(first).slots == []
    assert store.find(second).slots == [0]


def test_only_what_the_cpu_computes_with_is_copied_to_align_it(store: Store, tmp_path: Path) -> None:
    weights = {"weight": numbers(6, 4), "bias": numbers(6, start=5)}
    header = b'{"bias":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},'
    header += b'"weight":{"dtype":"F32","shape":[6,4],"data_offsets":[24,120]}}'
    header += b" " * (-len(header) % 8)
    path = tmp_path / "a.sft"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bits(weights["bias"]) + bits(weights["weight"]))
    on_gpu, on_cpu = (load(slot, nn.Linear(4, 6), read(store, str(path))) for slot in make_slots("cuda:0", "cpu"))
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in on_cpu.parameters())
    assert any(parameter.data_ptr() % ALIGNMENT for parameter in on_gpu.parameters())
    assert bits(on_cpu.weight) == bits(on_gpu.weight) == bits(weights["weight"])


@pytest.mark.parametrize("is_slot", [True, False])
def test_only_slots_share(store: Store, slots: tuple[Slot, ...], tmp_path: Path, is_slot: bool) -> None:
    views = read(store, write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6)))
    module = load(slots[0] if is_slot else None, nn.Linear(4, 6), views)
    assert shared_names(module) == ({"weight", "bias"} if is_slot else set())
    assert bits(module.weight) == bits(numbers(6, 4))


def test_with_sharing_off_slots_load_as_torch_does(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = read(store, write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6)))
    monkeypatch.setattr(loading, "_store", None)
    assert shared_names(load(slots[0], nn.Linear(4, 6), views)) == set()


class OwnParameter(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "parameter",
    [
        OwnParameter(torch.zeros(6, 4)),
        nn.Parameter(torch.zeros(4, 6).t()),
        nn.Parameter(torch.zeros(12, 4)[::2]),
    ],
    ids=["a class of its own", "transposed", "with gaps"],
)
def test_parameters_of_other_kinds_keep_their_memory(
    store: Store, slots: tuple[Slot, ...], tmp_path: Path, parameter: nn.Parameter
) -> None:
    module = nn.Linear(4, 6)
    module.weight = parameter
    address = parameter.data_ptr()
    load(slots[0], module, read(store, write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6))))
    assert shared_names(module) == {"bias"}
    assert module.weight.data_ptr() == address
    assert bits(module.weight) == bits(numbers(6, 4))


def test_a_module_without_memory_yet_is_left_to_torch(store: Store, slots: tuple[Slot, ...], tmp_path: Path) -> None:
    views = read(store, write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6)))
    module = nn.Linear(4, 6, device="meta")
    with pytest.warns(UserWarning, match="no-op"):
        load(slots[0], module, views)
    assert module.weight.is_meta


def test_what_the_host_changed_while_it_read_is_left_as_the_host_gave_it(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", a=numbers(6, 4), b=numbers(6), c=numbers(2, start=3))
    changed = {"a": numbers(4, 6) * 2, "b": numbers(6).half(), "d": numbers(5)}
    weights = loading.load_file(store, path, lambda: {**changed, "c": numbers(2, start=3)})
    assert weights.keys() == {"a", "b", "c", "d"}
    assert all(weights[name] is tensor for name, tensor in changed.items())
    assert origin_of(weights["c"]) is not None
