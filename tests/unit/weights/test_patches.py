"""What is put around the host's and torch's functions that load, move and write weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from comfy_parallel import patches
from comfy_parallel.patching.engine import Patch
from comfy_parallel.patching.patch_set import PatchSet
from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import is_shared, origin_of
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import blocks, homes
from tests.fakes import make_slots
from tests.unit.conftest import MakeModule
from tests.unit.weights.device import stand_in_stream
from tests.unit.weights.samples import bits, collect, numbers, read, slots_store, wrapper, write

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
UTILS = "comfy.utils"
PATCHER = "comfy.model_patcher:ModelPatcher"


@pytest.fixture
def slot() -> Slot:
    return make_slots("cuda:0")[0]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return slots_store(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6))


def shared_linear(store: Store, path: str, slot: Slot) -> nn.Linear:
    module = nn.Linear(4, 6)
    weights = read(store, path)
    with entered(slot):
        module.load_state_dict({**weights, **loading.share_parameters(store, module, weights, "")})
    assert is_shared(module.weight)
    return module


# Reading a file.


class Loader:
    """The host's function that reads a weight file, with what it was asked for."""

    def __init__(self, *, metadata: Any = None) -> None:
        self.metadata = metadata
        self.calls: list[dict[str, Any]] = []

    def __call__(self, ckpt: str, **options: Any) -> Any:
        self.calls.append(options)
        weights = load_file(ckpt) if ckpt.endswith("s") else torch.load(ckpt, weights_only=True)
        return (weights, self.metadata) if options["return_metadata"] else weights


def wrapped_loader(loader: Loader) -> Callable[..., Any]:
    def load_torch_file(ckpt: str, safe_load: bool = False, device: Any = None, return_metadata: bool = False) -> Any:
        return loader(ckpt, safe_load=safe_load, device=device, return_metadata=return_metadata)

    wrapped: Callable[..., Any] = wrapper(f"{UTILS}:load_torch_file")(load_torch_file)
    assert wrapped.__name__ == "load_torch_file"
    return wrapped


@pytest.mark.parametrize("device", [None, CPU])
def test_a_slot_gets_views_that_remember_their_file(store: Store, slot: Slot, path: str, device: Any) -> None:
    loader = Loader()
    with entered(slot):
        weights = wrapped_loader(loader)(path, safe_load=True, device=device)
    assert loader.calls == [{"safe_load": True, "device": device, "return_metadata": False}]
    assert bits(weights["weight"]) == bits(numbers(6, 4))
    origin = origin_of(weights["weight"])
    assert origin is not None
    assert origin.region.file is store.find(path)


@pytest.mark.parametrize(
    ("is_slot", "device"), [(False, None), (False, CPU), (True, SimpleNamespace(type="cuda")), (True, "meta")]
)
def test_others_get_what_the_host_loads(store: Store, slot: Slot, path: str, is_slot: bool, device: Any) -> None:
    loader = Loader()
    device = torch.device(device) if isinstance(device, str) else device
    with entered(slot if is_slot else None):
        weights = wrapped_loader(loader)(path, device=device)
    assert loader.calls == [{"safe_load": False, "device": device, "return_metadata": False}]
    assert origin_of(weights["weight"]) is None
    assert store.files() == []


def test_with_sharing_off_a_slot_gets_what_the_host_loads(
    slot: Slot, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_store", None)
    with entered(slot):
        assert origin_of(wrapped_loader(Loader())(path)["weight"]) is None


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("is_slot", [True, False])
def test_the_metadata_comes_along_when_asked_for(
    store: Store, slot: Slot, path: str, metadata: Any, is_slot: bool
) -> None:
    load = wrapped_loader(Loader(metadata=metadata))
    for _ in range(2):
        with entered(slot if is_slot else None):
            weights, found = load(path, return_metadata=True)
        assert found == metadata
        assert bits(weights["bias"]) == bits(numbers(6))
        assert (origin_of(weights["bias"]) is not None) is is_slot


def test_a_pickled_file_is_read_once_with_and_without_metadata(store: Store, slot: Slot, tmp_path: Path) -> None:
    torch.save({"a": numbers(3)}, tmp_path / "a.ckpt")
    loader = Loader()
    load = wrapped_loader(loader)
    with entered(slot):
        first, metadata = load(str(tmp_path / "a.ckpt"), return_metadata=True)
        second = load(str(tmp_path / "a.ckpt"))
    assert metadata is None
    assert len(loader.calls) == 1
    assert bits(first["a"]) == bits(second["a"]) == bits(numbers(3))


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_slot_has_a_file_while_it_keeps_what_it_read(store: Store, slot: Slot, path: str, ending: str) -> None:
    """As of a LoRA, whose tensors no model takes."""
    file = Path(path).with_suffix(f".{ending}")
    torch.save({"a": numbers(3)}, file.with_suffix(".ckpt"))
    with entered(slot):
        weights = wrapped_loader(Loader())(str(file))
    assert store.find(str(file)).slots == [slot.index]
    del weights
    collect()
    assert store.find(str(file)).slots == []


def test_options_of_later_hosts_are_passed_on(store: Store, slot: Slot, path: str) -> None:
    seen: dict[str, Any] = {}

    def load_torch_file(ckpt: str, **options: Any) -> Any:
        seen.update(options)
        return load_file(ckpt)

    with entered(slot):
        wrapper(f"{UTILS}:load_torch_file")(load_torch_file)(path, mmap=True)
    assert seen["mmap"] is True


def failing(error: Exception) -> Callable[..., Any]:
    def load_torch_file(ckpt: str, **options: Any) -> Any:
        raise error

    wrapped: Callable[..., Any] = wrapper(f"{UTILS}:load_torch_file")(load_torch_file)
    return wrapped


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamReader failed"), EOFError("Ran out of input")])
def test_a_pickled_file_that_is_broken_is_named(store: Store, slot: Slot, tmp_path: Path, error: Exception) -> None:
    path = str(tmp_path / "a.ckpt")
    Path(path).write_bytes(b"broken")
    with entered(slot), pytest.raises(RuntimeError, match="corrupt or incomplete") as found:
        failing(error)(path)
    assert str(error) in str(found.value)
    assert path in str(found.value)
    assert found.value.__cause__ is error


@pytest.mark.parametrize("name", ["named.safetensors", "named.ckpt", "other.safetensors", "other.ckpt"])
def test_other_errors_are_the_hosts_own(store: Store, slot: Slot, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    Path(path).write_bytes(b"broken")
    error = KeyError("a") if name.startswith("other") else RuntimeError(f"broken: {path}")
    with entered(slot), pytest.raises(type(error)) as found:
        failing(error)(path)
    assert found.value is error


def test_outside_slots_an_error_is_the_hosts_own(store: Store, tmp_path: Path) -> None:
    error = RuntimeError("broken")
    with pytest.raises(RuntimeError) as found:
        failing(error)(str(tmp_path / "a.ckpt"))
    assert found.value is error


def test_a_file_that_is_not_there_is_named(store: Store, slot: Slot, tmp_path: Path) -> None:
    with entered(slot), pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        wrapped_loader(Loader())(str(tmp_path / "none.safetensors"))


# Writing a file.


@pytest.mark.parametrize("is_slot", [True, False])
def test_a_file_that_safetensors_saves_is_let_go_first(store: Store, slot: Slot, path: str, is_slot: bool) -> None:
    """Whoever saves it: a node's thread or another one."""
    views = read(store, path)
    file = store.find(path)
    outdated = []

    def save(tensors: Any, filename: Any, metadata: Any = None) -> None:
        outdated.append(file.is_outdated)
        save_file(tensors, filename, metadata=metadata)

    with entered(slot if is_slot else None):
        wrapper("safetensors.torch:save_file")(save)({"a": numbers(2)}, Path(path), metadata={"b": "c"})
    assert outdated == [True]
    assert bits(load_file(path)["a"]) == bits(numbers(2))
    assert bits(views["weight"]) == bits(numbers(6, 4))


def test_a_file_that_torch_saves_is_let_go_first(store: Store, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "torch.serialization:_open_zipfile_writer_file.__init__"
    writer = torch.serialization._open_zipfile_writer_file
    views, file = read(store, path), store.find(path)
    os.utime(path)  # It is the same file still.
    outdated = []
    original = writer.__init__

    def init(self: Any, name: Any) -> None:
        outdated.append(file.is_outdated)
        original(self, name)

    monkeypatch.setattr(writer, "__init__", wrapper(target)(init))
    torch.save({"x": numbers(3)}, path)
    assert outdated == [True]
    assert bits(torch.load(path)["x"]) == bits(numbers(3))
    assert bits(views["weight"]) == bits(numbers(6, 4))


def test_what_cannot_be_saved_is_said_by_who_saves(store: Store, tmp_path: Path) -> None:
    for target in (tmp_path / "none" / "a.safetensors", tmp_path):
        with pytest.raises(Exception, match=r"No such file|Is a directory|I/O error"):
            wrapper("safetensors.torch:save_file")(save_file)({"a": numbers(2)}, target)


# Loading and moving modules, with the patches really applied.


@pytest.fixture
def applied(store: Store) -> Any:
    """torch with our patches; as before when the test ends."""
    before = dict(vars(nn.Module))
    chosen = tuple(patch for patch in patches.ALL if patch.target.startswith("torch.nn.") and isinstance(patch, Patch))
    patch_set = PatchSet(chosen, lambda problem: pytest.fail(str(problem)))
    patch_set.install()
    assert {name for name in before if vars(nn.Module)[name] is not before[name]} == {
        "_apply",
        "_load_from_state_dict",
        "to",
    }
    yield
    patch_set.revert()
    assert dict(vars(nn.Module)) == before


def test_torch_shares_while_patched(applied: None, store: Store, slot: Slot, path: str) -> None:
    module = nn.Linear(4, 6)
    with entered(slot):
        module.load_state_dict(read(store, path))
        module.to(torch.float16)
    assert is_shared(module.weight)
    assert bits(module.weight) == bits(numbers(6, 4).half())


def test_outside_slots_patched_torch_does_as_ever(applied: None, store: Store, path: str) -> None:
    module = nn.Linear(4, 6)
    module.load_state_dict(read(store, path))
    assert module.to(dtype=torch.float16) is module
    assert not is_shared(module.weight)
    assert bits(module.weight) == bits(numbers(6, 4).half())


# Writing to weights.

HOST_UTILS = """
def get_attr(obj, attr):
    for name in attr.split("."):
        obj = getattr(obj, name)
    return obj

def copy_to_param(obj, attr, value):
    get_attr(obj, attr).data.copy_(value)
"""

HOST_PATCHER = """
class ModelPatcher:
    def __init__(self, model, *patched, weight_inplace_update=False):
        self.model, self.patches = model, dict.fromkeys(patched)
        self.weight_inplace_update = weight_inplace_update
        self.seen = []

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False):
        self.seen.append((comfy.utils.get_attr(self.model, key).data, device_to, inplace_update, return_weight))

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        self.seen.append((comfy.utils.get_attr(self.model, key).data, hooks, original_weights, memory_counter))
"""


@pytest.fixture
def host(make_module: MakeModule) -> Any:
    """The host's functions that write to weights, with our patches around them."""
    utils = make_module("utils_stand_in", HOST_UTILS)
    patcher = make_module("patcher_stand_in", HOST_PATCHER, comfy=SimpleNamespace(utils=utils)).ModelPatcher
    for name in ("patch_weight_to_device", "patch_hook_weight_to_device"):
        setattr(patcher, name, wrapper(f"{PATCHER}.{name}")(vars(patcher)[name], vars(utils)["get_attr"]))
    return SimpleNamespace(
        copy_to_param=wrapper(f"{UTILS}:copy_to_param")(vars(utils)["copy_to_param"], vars(utils)["get_attr"]),
        ModelPatcher=patcher,
    )


@pytest.mark.parametrize("is_slot", [True, False])
def test_a_shared_weight_is_written_in_memory_of_its_own(
    host: Any, store: Store, slot: Slot, path: str, is_slot: bool
) -> None:
    model = nn.Sequential(shared_linear(store, path, slot))
    parameter = model[0].weight
    with entered(slot if is_slot else None):
        host.copy_to_param(model, "0.weight", torch.ones(6, 4))
    assert model[0].weight is parameter
    assert parameter.eq(1).all()
    assert not is_shared(parameter)
    assert is_shared(model[0].bias)


def test_a_buffer_is_written_in_place(host: Any) -> None:
    model = nn.BatchNorm1d(3)
    address = model.running_mean.data_ptr()
    host.copy_to_param(model, "running_mean", torch.ones(3))
    assert model.running_mean.tolist() == [1, 1, 1]
    assert model.running_mean.data_ptr() == address


@pytest.mark.parametrize("where", ["argument", "patcher"])
def test_a_weight_that_is_patched_in_place_gets_memory_of_its_own(
    host: Any, store: Store, slot: Slot, path: str, where: str
) -> None:
    model = shared_linear(store, path, slot)
    patcher = host.ModelPatcher(model, "weight", weight_inplace_update=where == "patcher")
    with entered(slot):
        patcher.patch_weight_to_device("weight", device_to=CPU, inplace_update=where == "argument")
    ((seen, *others),) = patcher.seen
    assert not is_shared(seen)
    assert bits(seen) == bits(numbers(6, 4))
    assert others == [CPU, where == "argument", False]


@pytest.mark.parametrize(("key", "is_slot"), [("bias", True), ("weight", False)])
def test_a_weight_that_needs_no_copy_stays_shared(
    host: Any, store: Store, slot: Slot, path: str, key: str, is_slot: bool
) -> None:
    patcher = host.ModelPatcher(shared_linear(store, path, slot), "weight", weight_inplace_update=True)
    with entered(slot if is_slot else None):
        patcher.patch_weight_to_device(key)
    assert is_shared(patcher.seen[0][0])


@pytest.mark.parametrize("is_written", [False, True])
def test_a_weight_on_a_device_is_backed_up_from_home_where_nobody_wrote_to_it(
    host: Any, store: Store, slot: Slot, path: str, is_written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.budget_bytes = 0  # Nothing is pinned.
    stand_in_stream(monkeypatch)
    linear = shared_linear(store, path, slot)
    home = linear.weight.data
    model = SimpleNamespace(weight=nn.Parameter(numbers(6, 4)))  # where it was copied to
    homes.remember(model.weight, homes.Home(home), None)
    patcher = host.ModelPatcher(model, "weight")
    patcher.patch_weight_to_device("weight")
    assert not is_shared(patcher.seen[0][0])
    model.weight.data[3] += is_written
    with entered(slot):
        patcher.patch_weight_to_device("weight")
    assert (patcher.seen[1][0].data_ptr() == home.data_ptr()) != is_written


@pytest.mark.parametrize(("is_slot", "expected"), [(True, [True, False]), (False, [True, True])])
def test_before_a_part_is_unloaded_each_weight_has_memory_of_its_own(
    store: Store, slot: Slot, path: str, is_slot: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.budget_bytes = 0  # Nothing is pinned.
    stand_in_stream(monkeypatch)
    linear, found = shared_linear(store, path, slot), []
    memory = torch.zeros(30)
    for parameter, start in ((linear.weight, 0), (linear.bias, 24)):
        home = homes.Home(parameter.data)
        parameter.data = memory[start : start + parameter.numel()].view(parameter.shape)
        homes.remember(parameter, home, None)

    def partially_unload(self: Any, device_to: Any, memory_to_free: int = 0) -> int:
        found.append(blocks.is_in_one(linear.weight))
        return memory_to_free

    found.append(blocks.is_in_one(linear.weight))
    with entered(slot if is_slot else None):
        assert wrapper(f"{PATCHER}.partially_unload")(partially_unload)(SimpleNamespace(model=linear), CPU, 7) == 7
    assert found == expected


@pytest.mark.parametrize(
    ("key", "is_slot", "stays"), [("weight", True, False), ("bias", True, True), ("weight", False, True)]
)
def test_a_weight_that_hooks_change_gets_memory_of_its_own(
    host: Any, store: Store, slot: Slot, path: str, key: str, is_slot: bool, stays: bool
) -> None:
    patcher = host.ModelPatcher(shared_linear(store, path, slot))
    with entered(slot if is_slot else None):
        patcher.patch_hook_weight_to_device("hooks", {"weight": []}, key, "originals", "counter")
    ((seen, *others),) = patcher.seen
    assert is_shared(seen) is stays
    assert others == ["hooks", "originals", "counter"]


# Where models are made, and pinned.


@pytest.mark.parametrize("name", ["unet_inital_load_device", "text_encoder_initial_device"])
def test_slots_make_their_models_on_the_cpu(store: Store, slot: Slot, name: str) -> None:
    gpu = torch.device("cuda:0")
    initial_device = wrapper(f"comfy.model_management:{name}")(lambda device, *, model_size=0: device)
    with entered(slot):
        assert initial_device(CPU, model_size=3) == CPU
        made_on = initial_device(gpu, model_size=3)
        assert torch.empty(1, device=made_on).device == CPU
        assert made_on != CPU, "the host loads a model at once that it did not make on the CPU"
    assert initial_device(gpu) == gpu
    loading.use(None)
    with entered(slot):
        assert initial_device(gpu) == gpu


def test_shared_memory_is_not_pinned(store: Store, slot: Slot, path: str) -> None:
    module = shared_linear(store, path, slot)
    pinned: list[Any] = []
    pin_memory = wrapper("comfy.model_management:pin_memory")(lambda tensor: not pinned.append(tensor))
    assert pin_memory(module.weight) is False
    assert pinned == []
    own = torch.ones(3)
    assert pin_memory(own) is True
    assert pinned == [own]
