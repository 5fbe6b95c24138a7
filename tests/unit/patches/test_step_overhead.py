"""What the host does in Python at every step, with less of it: the results are those of the originals."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from comfy_parallel.patches import step_overhead
from comfy_parallel.patching.patch_set import PatchSet
from comfy_parallel.slots.device import MemoryStats
from tests.unit.conftest import MakeModule

SAMPLERS = """
import collections

def get_area_and_mult(mult):
    cond_obj = collections.namedtuple("cond_obj", ["mult", "uuid"])
    return cond_obj(mult, 7)

def shapes():
    return collections.defaultdict(list)

def pair():
    return collections.namedtuple("pair", "x y", defaults=[1])
"""
MODEL_MANAGEMENT = """
import torch

is_other = False

def get_torch_device():
    return "cuda:1"

def get_free_memory(dev=None, torch_free_too=False):
    if dev is None:
        dev = get_torch_device()
    if is_other:
        return "other"
    stats = torch.cuda.memory_stats(dev)
    mem_free_torch = stats["reserved_bytes.all.current"] - stats["active_bytes.all.current"]
    mem_free_cuda, _ = torch.cuda.mem_get_info(dev)
    mem_free_total = mem_free_cuda + mem_free_torch
    return (mem_free_total, mem_free_torch) if torch_free_too else mem_free_total
"""


def kinds(*, current: int) -> dict[str, Any]:
    return {pool: {"current": current, "peak": 9} for pool in ("small_pool", "all")}


NESTED = {
    "reserved_bytes": kinds(current=500),
    "active_bytes": kinds(current=200),
    "oversize_segments": {"current": 0, "peak": 3},
    "num_ooms": 4,
}


@pytest.fixture
def patch_set() -> Iterator[PatchSet]:
    patch_set = PatchSet(step_overhead.PATCHES, lambda mismatch: pytest.fail(str(mismatch)))
    yield patch_set
    patch_set.revert()


# Conditionings.


@pytest.fixture
def samplers(make_module: MakeModule, patch_set: PatchSet) -> ModuleType:
    module = make_module("comfy.samplers", SAMPLERS, __name__="comfy.samplers")
    patch_set.install()
    return module


def test_conditionings_are_of_one_class_with_the_originals_name(samplers: ModuleType) -> None:
    first, second = samplers.get_area_and_mult(1), samplers.get_area_and_mult(2)
    assert (first, second) == ((1, 7), (2, 7))
    assert type(first) is type(second)
    assert first._fields == ("mult", "uuid")
    assert (type(first).__name__, type(first).__module__) == ("cond_obj", "comfy.samplers")


def test_other_fields_names_and_options_make_other_classes(samplers: ModuleType) -> None:
    make = samplers.collections.namedtuple
    assert len({make("a", ["x"]), make("a", ("x",)), make("b", ["x"]), make("a", ["x", "y"]), make("a", "x y")}) == 4
    assert samplers.pair() is not samplers.pair()
    assert samplers.pair()(0) == (0, 1)
    assert samplers.pair().__module__ == "comfy.samplers"
    with pytest.raises(ValueError, match="keyword"):
        make("a", ["class"])


def test_the_rest_of_collections_is_as_it_is(samplers: ModuleType) -> None:
    assert type(samplers.shapes()) is collections.defaultdict
    with pytest.raises(AttributeError):
        _ = samplers.collections.nonsense


def test_only_the_samplers_module_sees_it_and_it_comes_off(samplers: ModuleType, patch_set: PatchSet) -> None:
    assert samplers.collections is not collections
    assert collections.namedtuple("a", "x") is not collections.namedtuple("a", "x")
    patch_set.revert()
    assert samplers.collections is collections


# Free memory.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that torch was asked about."""
    devices: list[Any] = []

    def nested(device: Any = None) -> dict[str, Any]:
        devices.append(device)
        return NESTED

    for module in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(module, "memory_stats_as_nested_dict", nested)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    return devices


@pytest.fixture
def management(make_module: MakeModule, asked: list[Any]) -> ModuleType:
    return make_module("comfy.model_management", MODEL_MANAGEMENT, __name__="comfy.model_management")


def test_the_stats_are_those_of_torch(asked: list[Any]) -> None:
    stats, expected = MemoryStats(NESTED), torch.cuda.memory_stats("cuda:0")
    assert stats == expected
    assert list(stats.items()) == list(expected.items())
    assert [stats[name] for name in expected] == list(expected.values())


@pytest.mark.parametrize("name", ["nonsense", "active_bytes", "active_bytes.all", "num_ooms.all", "active_bytes.x"])
def test_a_name_that_torch_does_not_have_is_none_of_the_stats(name: str) -> None:
    assert name not in MemoryStats(NESTED)
    with pytest.raises(KeyError, match=name):
        MemoryStats(NESTED)[name]


def test_free_memory_is_the_hosts_without_a_flat_dictionary(
    management: ModuleType, patch_set: PatchSet, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = management.get_free_memory
    expected = original("cuda:0"), original(torch_free_too=True)
    patch_set.install()
    monkeypatch.setattr(collections, "OrderedDict", None)  # what torch flattens into
    assert (management.get_free_memory("cuda:0"), management.get_free_memory(torch_free_too=True)) == expected
    assert expected == (1300, (1300, 300))
    assert asked == ["cuda:0", "cuda:1"] * 2
    management.is_other = True
    assert management.get_free_memory() == "other"


def test_what_somebody_puts_in_the_stats_place_is_called(
    management: ModuleType, patch_set: PatchSet, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_set.install()
    stats = {"reserved_bytes.all.current": 70, "active_bytes.all.current": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert management.get_free_memory("cuda:0") == 1070
    assert asked == []


def test_free_memory_keeps_its_name_and_comes_off(management: ModuleType, patch_set: PatchSet) -> None:
    original = management.get_free_memory
    patch_set.install()
    patched = management.get_free_memory
    assert patched is not original
    assert patched.__code__ is original.__code__
    assert (patched.__name__, patched.__module__) == ("get_free_memory", "comfy.model_management")
    patch_set.revert()
    assert management.get_free_memory is original


def test_a_host_function_that_does_not_ask_torch_stays(make_module: MakeModule, patch_set: PatchSet) -> None:
    module = make_module("comfy.model_management", "def get_free_memory(dev=None):\n    return 5")
    original = module.get_free_memory
    patch_set.install()
    assert module.get_free_memory is original
