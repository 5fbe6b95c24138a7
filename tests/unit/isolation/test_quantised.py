"""Each model that a slot builds has its own settings of quantised layers."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.patches import model_management
from comfy_parallel.patching.patch_set import PatchSet
from comfy_parallel.slots.slot import entered
from tests.fakes import in_thread, make_slots
from tests.unit.conftest import MakeModule

SHARED = '''
import torch

class disable_weight_init:
    class Conv(torch.nn.Module):
        pass

class MixedPrecisionOps(disable_weight_init):
    """As in the host: settings of the model that is built, as attributes of the one class."""
    _layer_quant_config = {}
    _compute_dtype = torch.bfloat16

    class Linear(torch.nn.Module):
        def __init__(self, size, device=None):
            super().__init__()
            self.factory = {"device": device, "dtype": MixedPrecisionOps._compute_dtype}

        def read(self, name):
            return MixedPrecisionOps._layer_quant_config.get(name), MixedPrecisionOps._compute_dtype

        def forward(self, x):
            return x

def pick_operations(weight_dtype, compute_dtype, model_config=None):
    """Picks."""
    if model_config and model_config.layer_quant_config:
        MixedPrecisionOps._layer_quant_config = model_config.layer_quant_config
        MixedPrecisionOps._compute_dtype = compute_dtype
        return MixedPrecisionOps
    return disable_weight_init
'''
PER_MODEL = "def pick_operations(weight_dtype, compute_dtype): return 'picked'"


def config(name: str) -> Any:
    return SimpleNamespace(layer_quant_config={name: {"format": name}})


@pytest.fixture
def patch_set() -> Any:
    chosen = tuple(patch for patch in model_management.PATCHES if patch.target == "comfy.ops:pick_operations")
    made = PatchSet(chosen, lambda reason: pytest.fail(str(reason)))
    yield made
    made.revert()


@pytest.fixture
def ops(make_module: MakeModule, patch_set: PatchSet) -> ModuleType:
    module = make_module("comfy.ops", SHARED)
    patch_set.install()
    return module


def test_slots_that_build_at_once_read_their_own_settings(ops: ModuleType) -> None:
    first, second = make_slots("cpu", "cpu")
    with entered(first):
        mine = ops.pick_operations(None, torch.float16, model_config=config("a"))
        layer = mine.Linear(1)

    def build_other() -> Any:
        with entered(second):
            return ops.pick_operations(None, torch.float32, config("b")).Linear(1)

    others = in_thread(build_other).result(5)
    with entered(first):  # goes on to load, after the other has begun
        assert layer.read("a") == ({"format": "a"}, torch.float16)
        assert mine.Linear(1).factory["dtype"] == torch.float16
    assert others.read("b") == ({"format": "b"}, torch.float32)
    assert others.read("a") == (None, torch.float32)
    assert (ops.MixedPrecisionOps._layer_quant_config, ops.MixedPrecisionOps._compute_dtype) == ({}, torch.bfloat16)


def test_two_models_of_one_slot_have_their_own_settings_too(ops: ModuleType) -> None:
    (slot,) = make_slots("cpu")
    with entered(slot):
        models = [ops.pick_operations(None, torch.float16, config(name)).Linear(1) for name in "ab"]
    assert [model.read("a")[0] for model in models] == [{"format": "a"}, None]


def test_the_layers_are_the_hosts_in_every_other_way(ops: ModuleType) -> None:
    (slot,) = make_slots("cpu")
    with entered(slot):
        own = ops.pick_operations(None, torch.float16, config("a"))
        assert ops.pick_operations(None, None) is ops.disable_weight_init
    assert issubclass(own, ops.MixedPrecisionOps)
    assert isinstance(own.Linear(1), ops.MixedPrecisionOps.Linear)
    assert own.Conv is ops.disable_weight_init.Conv
    assert own.Linear.forward is ops.MixedPrecisionOps.Linear.forward
    for ours, hosts in ((own, ops.MixedPrecisionOps), (own.Linear, ops.MixedPrecisionOps.Linear)):
        assert (ours.__name__, ours.__qualname__, ours.__module__) == (
            hosts.__name__,
            hosts.__qualname__,
            hosts.__module__,
        )


def test_outside_slots_the_host_does_as_it_always_did(ops: ModuleType) -> None:
    assert ops.pick_operations(None, torch.float16, config("a")) is ops.MixedPrecisionOps
    assert ops.MixedPrecisionOps._compute_dtype == torch.float16


def test_hosts_that_make_a_class_per_model_are_left_as_they_are(make_module: MakeModule, patch_set: PatchSet) -> None:
    module = make_module("comfy.ops", PER_MODEL)
    original = module.pick_operations
    patch_set.install()
    assert module.pick_operations is original
