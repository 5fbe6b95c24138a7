"""What a module that shares its weights must still allow: other numbers, other devices, training, ties."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from comfy_parallel.patches import weights as patches
from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.regions import is_shared
from comfy_parallel.weights.files.store import Store
from comfy_parallel.weights.gpu import homes, loads
from tests.unit.weights.samples import GIB, bits, numbers, read, run_python, torch_store, write

SLOT = Slot(0, "cuda:0")
LOAD_AGAIN = """
import torch
from torch import nn
from comfy_parallel.patches import weights as patches
from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.files.store import Store
from tests.unit.weights.samples import read
store = Store("map", 1 << 30)
loading.use(store)
nn.Module._load_from_state_dict = patches._load_from_state_dict(nn.Module._load_from_state_dict)
module = nn.Linear(4, 6)
slot = Slot(0, "cuda:0")
with entered(slot):
    module.load_state_dict(read(store, {path!r}))
other = {"weight": torch.ones(6, 4), "bias": torch.ones(6)}
with entered(slot if {where!r} == "in" else None):
    module.load_state_dict(other)
print("loaded", module.weight.sum().item())
"""
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return torch_store(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.safetensors", weight=numbers(6, 4), bias=numbers(6))


def shared_linear(store: Store, path: str) -> nn.Linear:
    module = nn.Linear(4, 6)
    with entered(SLOT):
        module.load_state_dict(read(store, path))
    assert is_shared(module.weight)
    return module


def test_hook_patching_takes_the_hosts_arguments() -> None:
    class ModelPatcher:
        def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
            return "ok"

    wrapped = patches._patch_hook_weight_to_device(ModelPatcher.patch_hook_weight_to_device, getattr)
    assert (
        wrapped(ModelPatcher(), hooks=None, combined_patches={}, key="k", original_weights={}, memory_counter=None)
        == "ok"
    )


@pytest.mark.parametrize("where", ["in", "out"])
def test_other_numbers_may_be_loaded_into_a_module_that_shares(path: str, where: str) -> None:
    result = run_python(LOAD_AGAIN.replace("{path!r}", repr(path)).replace("{where!r}", repr(where)))
    assert (result.returncode, result.stdout) == (0, "loaded 24.0\n"), result.stderr[-300:]  # -11: SIGSEGV


class OnDevice:
    def __init__(self, data, address):
        self.data, self.address = data, address

    def data_ptr(self):
        return self.address if self.data.is_meta else self.data.data_ptr()

    def __getattr__(self, name):
        return getattr(self.data, name)


def test_a_home_is_forgotten_when_the_parameter_is_back(
    store: Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "unchanged", lambda store, pairs: pairs)  # On "meta" there are no numbers.
    tensor = shared_linear(store, path).weight.data
    parameter = OnDevice(tensor.to(META), 4096)
    loading.after_move([(parameter, homes.Home(tensor))])
    with entered(SLOT):
        loading.before_move(store, [parameter], CPU, None)
        assert parameter.data is tensor
        parameter.data = parameter.data * 2  # a custom node; or .half().float(), or .cpu()
        leaving = loading.before_move(store, [parameter], META, None)
        assert leaving == []
        parameter.data = parameter.data.to(META)  # the allocator gives the same address again
        loading.after_move(leaving)
    assert homes.home_of(parameter) is None  # else the way back brings the numbers before `* 2`


def test_a_type_that_torch_refuses_changes_nothing(store: Store, path: str) -> None:
    module = shared_linear(store, path).requires_grad_(False)
    with entered(SLOT), pytest.raises(TypeError, match="floating point"):
        module.to(torch.int8)
    assert module.weight.dtype == torch.float32


def test_with_gradients_the_error_is_torchs(store: Store, path: str) -> None:
    module = shared_linear(store, path)
    with entered(SLOT), pytest.raises(TypeError, match="floating point"):
        module.to(torch.int8)


def test_the_metadata_of_a_state_dict_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(nn.BatchNorm1d(3).state_dict(), path)
    expected = torch.load(path, weights_only=True)._metadata
    weights = loading.load_file(Store("map", GIB), str(path), lambda: torch.load(path, weights_only=True))
    assert getattr(weights, "_metadata", None) == expected


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": nn.Parameter(torch.ones(3))}, path)
    weights = loading.load_file(Store("map", GIB), str(path), lambda: torch.load(path, weights_only=True))
    assert type(weights["a"]) is nn.Parameter


def test_conjugate_views_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    value = torch.tensor([1 + 2j, 3 - 4j]).conj()
    torch.save({"a": value}, path)
    weights = loading.load_file(Store("map", GIB), str(path), lambda: torch.load(path, weights_only=True))
    assert torch.equal(weights["a"].resolve_conj(), value.resolve_conj())


def test_asking_for_a_patched_weight_leaves_the_model_where_it_is(store: Store, path: str) -> None:
    home = shared_linear(store, path).weight.data

    class ModelPatcher:
        weight_inplace_update = False
        patches = {"weight": []}
        model = SimpleNamespace(weight=nn.Parameter(numbers(6, 4)))  # stands for the copy on the device

        def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False):
            return self.model.weight.data

    homes.remember(ModelPatcher.model.weight, homes.Home(home), None)
    address = ModelPatcher.model.weight.data_ptr()
    wrapped = patches._patch_weight_to_device(ModelPatcher.patch_weight_to_device, getattr)
    with entered(SLOT):
        wrapped(ModelPatcher(), "weight", return_weight=True)
    assert ModelPatcher.model.weight.data_ptr() == address


def test_a_module_that_is_loaded_in_inference_mode_can_be_trained(store: Store, path: str) -> None:
    module = nn.Linear(4, 6)
    with entered(SLOT), torch.inference_mode():
        module.load_state_dict(read(store, path))
    (module(torch.ones(2, 4)) * module.weight.sum()).sum().backward()
    assert module.weight.grad is not None


def test_a_device_may_be_a_name(store: Store, tmp_path: Path) -> None:
    path = str(tmp_path / "a.pt")
    torch.save({"a": torch.ones(3)}, path)
    load = patches._load_torch_file(
        lambda ckpt, safe_load=False, device=None, return_metadata=False: torch.load(ckpt, map_location=device)
    )
    assert load(path, device="cpu")["a"].sum() == 3
    with entered(SLOT):
        assert load(path, device="cpu")["a"].sum() == 3


def test_parameters_that_share_storage_still_do(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", **{"0.weight": numbers(4, 4)})
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight.data = module[0].weight.data
    with entered(SLOT):
        module.load_state_dict(read(store, path), strict=False)
    assert bits(module[1].weight) == bits(numbers(4, 4))
