"""Loads under dynamic VRAM: small weights stay where they are, and a load that would set what is set is left out."""

from __future__ import annotations

import gc
import uuid
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.graphs import loads
from comfy_parallel.graphs.loads import Loads

CPU = torch.device("cpu")
META = torch.device("meta")


class Layer(torch.nn.Module):
    """A small layer, whose weights a load copies to the device, or a large one, which it gives a place."""

    def __init__(self, is_small: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(4), requires_grad=False)
        self.is_small = is_small
        self.comfy_cast_weights = False


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(is_small) for is_small in (True, False, True))
        self.register_buffer("schedule", torch.rand(5))
        self.current_weight_patches_uuid: Any = None
        self.model_loaded_weight_memory = 0
        self.device: Any = None
        self.dynamic_pins: dict[Any, Any] = {CPU: {"failed": False, "active": False}}


class Range:
    """Of a model's pages."""

    def __init__(self) -> None:
        self.prioritized = 0

    def prioritize(self) -> None:
        self.prioritized += 1


class Patcher:
    """Loads as a host does: the weights of the file are copied anew to the device, under new names in the modules."""

    def __init__(self, model: Model) -> None:
        self.model, self.load_device = model, CPU
        self.patches: dict[str, Any] = {}
        self.weight_wrapper_patches: dict[str, Any] = {}
        self.injections: dict[str, Any] = {}
        self.is_injected = False
        self.forced_hooks = self.current_hooks = None
        self.patches_uuid = uuid.uuid4()
        self.callbacks: list[Any] = []
        self.backup: dict[str, Any] = {}
        self.backup_buffers: dict[str, Any] = {}
        self.vbar = Range()
        self.loads = self.hooks_applied = 0

    def _vbar_get(self) -> Any:
        return self.vbar

    def get_all_callbacks(self, _name: str) -> list[Any]:
        return self.callbacks

    def apply_hooks(self, _hooks: Any, force_apply: bool = False) -> None:
        self.hooks_applied += force_apply

    def restore_loaded_backups(self) -> None:
        for key, backup in self.backup.items():
            self._set(key, torch.nn.Parameter(backup.weight, requires_grad=False))
        for key, buffer in self.backup_buffers.items():
            self._set(key, buffer)
        self.backup.clear()
        self.backup_buffers.clear()

    def load(self, device: Any) -> None:
        self.loads += 1
        self.restore_loaded_backups()
        for name, layer in self.model.named_modules():
            if not isinstance(layer, Layer):
                continue
            layer.comfy_cast_weights = True
            layer.weight_function = []  # type: ignore[assignment]
            for param in ("weight", "bias") if layer.is_small else ():
                source = getattr(layer, param)
                self.backup[f"{name}.{param}"] = SimpleNamespace(weight=source)
                self._set(f"{name}.{param}", torch.nn.Parameter(source.to(device, copy=True), requires_grad=False))
        for key, buffer in list(self.model.named_buffers()):
            self.backup_buffers[key] = buffer
            self._set(key, buffer.clone())
        self.model.device = device
        self.model.current_weight_patches_uuid = self.patches_uuid

    def _set(self, key: str, tensor: Any) -> None:
        prefix, _, name = key.rpartition(".")
        setattr(self.model.get_submodule(prefix), name, tensor)


def run(known: Loads, patcher: Patcher) -> bool:
    """Whether the load was left out."""
    with torch.inference_mode():
        if known.repeat(patcher, CPU):
            return True
        patcher.load(CPU)
        known.note(patcher, CPU)
    return False


@pytest.fixture
def known() -> Loads:
    return Loads(Patcher, "on_load", renews=True)


def addresses(model: Model) -> list[int]:
    return [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]]


def test_the_second_load_is_left_out_but_for_what_each_load_does(known: Loads) -> None:
    patcher = Patcher(Model())
    assert [run(known, patcher) for _ in range(3)] == [False, True, True]
    assert (patcher.loads, patcher.vbar.prioritized, patcher.hooks_applied) == (1, 2, 2)
    pins = patcher.model.dynamic_pins[CPU]
    pins.update(failed=True, active=False)
    assert run(known, patcher)
    assert pins == {"failed": False, "active": True}


def test_the_numbers_are_those_of_the_file_after_each_load(known: Loads) -> None:
    patcher = Patcher(Model())
    expected = [tensor.clone() for tensor in [*patcher.model.parameters(), *patcher.model.buffers()]]
    for _ in range(3):
        run(known, patcher)
        found = [*patcher.model.parameters(), *patcher.model.buffers()]
        assert all(map(torch.equal, found, expected))
        assert [tensor.stride() for tensor in found] == [tensor.stride() for tensor in expected]
        with torch.inference_mode():
            patcher.model.layers[0].weight.add_(1)
            patcher.model.schedule.zero_()


def test_a_host_whose_load_keeps_what_is_on_the_device_is_followed_in_that() -> None:
    known, patcher = Loads(Patcher, "on_load", renews=False), Patcher(Model())
    run(known, patcher)
    with torch.inference_mode():
        patcher.model.schedule.fill_(7)
    assert run(known, patcher)
    assert patcher.model.schedule.eq(7).all()


def test_small_weights_stay_where_they_are_over_loads_that_are_done(known: Loads) -> None:
    patcher = Patcher(Model())
    run(known, patcher)
    before = addresses(patcher.model)
    for callbacks in ([len], []):
        patcher.callbacks = callbacks
        assert [run(known, patcher) for _ in range(2)] == [False, not callbacks]
        assert addresses(patcher.model) == before


def test_a_load_with_the_same_patches_is_left_out(known: Loads) -> None:
    patcher, patch = Patcher(Model()), (1.0, "LoRA")
    patcher.patches["layers.1.weight"] = [patch]
    assert [run(known, patcher) for _ in range(2)] == [False, True]
    patcher.patches = {key: list(patches) for key, patches in patcher.patches.items()}  # as in a clone
    assert run(known, patcher)
    patcher.patches["layers.1.weight"] = [(0.5, "LoRA")]
    assert not run(known, patcher)
    patcher.patches["layers.1.weight"].append(patch)
    assert not run(known, patcher)


def test_schedules_that_take_turns_keep_their_numbers(known: Loads) -> None:
    """A node reads a model's schedule whenever it likes, also while another one is in its place."""
    patcher, others = Patcher(Model()), [Layer(True), Layer(True)]
    expected = [layer.weight.clone() for layer in others]
    places = []
    for turn in (0, 1, 0, 1):
        patcher.restore_loaded_backups()
        patcher.model.layers[0] = others[turn]
        assert not run(known, patcher)
        assert [torch.equal(layer.weight, weight) for layer, weight in zip(others, expected, strict=True)] == [True] * 2
        places.append(others[turn].weight.data_ptr())
    assert places[:2] == places[2:]


def test_a_tensor_that_somebody_keeps_has_its_own_numbers(known: Loads) -> None:
    patcher = Patcher(Model())
    run(known, patcher)
    kept = patcher.model.layers[0].weight
    before = kept.clone()
    patcher.restore_loaded_backups()
    with torch.inference_mode():
        patcher.model.layers[0].weight.data.add_(1)
    run(known, patcher)
    assert torch.equal(kept, before)
    assert torch.equal(patcher.model.layers[0].weight, before + 1)


def test_weights_of_another_layout_get_another_place(known: Loads) -> None:
    patcher = Patcher(Model())
    run(known, patcher)
    patcher.restore_loaded_backups()
    patcher.model.layers[0].weight = torch.nn.Parameter(torch.ones(9, 3), requires_grad=False)
    assert not run(known, patcher)
    assert torch.equal(patcher.model.layers[0].weight, torch.ones(9, 3))
    assert run(known, patcher)


class Other(Patcher):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.patches.update(key=[1]),
        lambda p: p.weight_wrapper_patches.update(key=[1]),
        lambda p: p.injections.update(key=[1]),
        lambda p: p.callbacks.append(len),
        lambda p: setattr(p, "is_injected", True),
        lambda p: setattr(p, "forced_hooks", object()),
        lambda p: setattr(p, "current_hooks", object()),
        lambda p: setattr(p, "patches_uuid", uuid.uuid4()),
        lambda p: setattr(p, "load_device", META),
        lambda p: setattr(p, "vbar", Range()),
        lambda p: setattr(p, "__class__", Other),
        lambda p: p.restore_loaded_backups(),
        lambda p: p.backup.popitem(),
        lambda p: setattr(p.model, "device", None),
        lambda p: setattr(p.model, "model_loaded_weight_memory", 1),
        lambda p: setattr(p.model, "current_weight_patches_uuid", None),
        lambda p: setattr(p.model, "schedule", p.model.schedule.clone()),
        lambda p: p.model.register_buffer("more", torch.ones(1)),
        lambda p: p.model.layers.append(Layer(True)),
        lambda p: p.model.layers.__setitem__(0, Layer(True)),
        lambda p: setattr(p.model.layers[1], "weight", torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)),
        lambda p: setattr(p.model.layers[1], "bias", None),
        lambda p: setattr(p.model.layers[1], "comfy_cast_weights", False),
        lambda p: p.model.layers[1].weight_function.append(len),
        lambda p: vars(p.model.layers[1]).pop("weight_function"),
    ],
)
def test_a_load_that_sets_anything_is_done(known: Loads, change: Callable[[Patcher], Any]) -> None:
    patcher = Patcher(Model())
    assert [run(known, patcher) for _ in range(2)] == [False, True]
    change(patcher)
    with torch.inference_mode():
        assert not known.repeat(patcher, CPU)


def test_an_unloaded_model_is_forgotten(known: Loads) -> None:
    patcher = Patcher(Model())
    run(known, patcher)
    known.forget(patcher.model)
    with torch.inference_mode():
        assert not known.repeat(patcher, CPU)


def test_a_model_is_not_kept(known: Loads) -> None:
    patcher = Patcher(Model())
    run(known, patcher)
    model = weakref.ref(patcher.model)
    patcher.model.current_patcher = patcher  # type: ignore[assignment]
    del patcher
    gc.collect()
    assert model() is None


def test_a_load_that_does_more_than_we_know_is_not_left_out() -> None:
    def load(self: Any, device: Any) -> None:
        self.restore_loaded_backups()

        def inner() -> None:
            self.something_new(device)

        inner()

    def plain(self: Any) -> None:
        self.restore_loaded_backups()

    assert not loads.is_known(load)
    assert loads.is_known(plain)
    assert loads.starts_anew(plain)
    assert not loads.starts_anew(lambda self: self.model)
