"""Which devices slots get, and what a slot may do to devices that are not its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.config import Config
from comfy_parallel.errors import ComfyParallelError, ConfigError, DeviceError
from comfy_parallel.slots import device
from comfy_parallel.slots.slot import Run, entered
from tests.fakes import make_slots

TOTAL, FREE, RESERVED, ALLOCATED = 80 << 30, 30 << 30, 20 << 30, 10 << 30


class FakeModule:
    """What is asked of `torch.cuda` and its like."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.current: list[Any] = []

    def device_count(self) -> int:
        return len(self.names)

    def get_device_name(self, name: str) -> str:
        return self.names[int(name.partition(":")[2])]

    def set_device(self, chosen: Any) -> None:
        self.current.append(str(chosen))

    def mem_get_info(self, name: str) -> tuple[int, int]:
        return FREE, TOTAL

    def memory_reserved(self, name: str) -> int:
        return RESERVED

    def memory_allocated(self, name: str) -> int:
        return ALLOCATED


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """Two unlike GPUs."""
    module = FakeModule(["Fast GPU", "Slow GPU"])
    monkeypatch.setattr(torch, "cuda", module)
    return module


@pytest.mark.parametrize(
    ("options", "host_device", "expected"),
    [
        ({}, "cuda", ("cuda:0", "cuda:1")),
        ({"num_gpus": 1}, "cuda", ("cuda:0",)),
        ({"num_gpus": 2, "default_slot": 1}, "cuda", ("cuda:0", "cuda:1")),
        ({"slots_per_gpu": 2}, "cuda", ("cuda:0", "cuda:0", "cuda:1", "cuda:1")),
        ({"devices": ("cuda:1",)}, "cuda", ("cuda:1",)),
        ({"devices": ("cuda:1", "cuda:0"), "num_gpus": 1}, "cuda", ("cuda:1", "cuda:0")),
        ({"devices": ("cuda:1",), "slots_per_gpu": 2, "default_slot": 1}, "cuda", ("cuda:1", "cuda:1")),
        ({}, "cpu", ("cpu",)),
        ({"num_gpus": 3}, "cpu", ("cpu", "cpu", "cpu")),
        ({"devices": ("cpu", "cpu")}, "cpu", ("cpu", "cpu")),
    ],
)
def test_the_devices_of_the_slots(
    gpus: FakeModule, options: dict[str, Any], host_device: str, expected: tuple[str, ...]
) -> None:
    assert device.choose_devices(Config(enabled=True, **options), host_device) == expected


@pytest.mark.parametrize(
    ("options", "host_device", "kind", "named"),
    [
        ({"num_gpus": 3}, "cuda", DeviceError, ["COMFY_NUM_GPUS=3", "2 visible", "at most 2"]),
        ({"devices": ("cuda:0", "cuda:2")}, "cuda", DeviceError, ["COMFY_PARALLEL_DEVICES=cuda:0,cuda:2", "cuda:2 "]),
        ({"devices": ("cuda:0",)}, "cpu", ConfigError, ["COMFY_PARALLEL_DEVICES=cuda:0", "without --cpu"]),
        ({"devices": ("cpu",)}, "cuda", ConfigError, ["COMFY_PARALLEL_DEVICES=cpu", "with --cpu"]),
        ({"default_slot": 2}, "cuda", ConfigError, ["COMFY_PARALLEL_DEFAULT_GPU=2", "2 slots", "from 0 to 1"]),
    ],
)
def test_devices_that_are_not_there_are_refused(
    gpus: FakeModule, options: dict[str, Any], host_device: str, kind: type[ComfyParallelError], named: list[str]
) -> None:
    with pytest.raises(kind) as refusal:
        device.choose_devices(Config(enabled=True, **options), host_device)
    assert [text for text in named if text not in str(refusal.value)] == []


def test_the_refusal_says_what_cuda_shows(gpus: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES=4,5"):
        device.choose_devices(Config(enabled=True, num_gpus=9), "cuda")


def test_a_device_that_works() -> None:
    device.check("cpu")


def test_a_device_that_cannot_be_initialised_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(DeviceError, match=r"^cuda:1 cannot be initialised: CUDA error: out of memory\. Leave it out"):
        device.check("cuda:1")


@pytest.mark.parametrize(
    ("name", "num_slots", "cores", "expected"),
    [("cpu", 2, 8, 4), ("cpu", 4, 2, 1), ("cuda:0", 4, 64, 4), ("cuda:0", 4, 8, 2), ("cuda:0", 8, 2, 1)],
)
def test_intra_op_threads(name: str, num_slots: int, cores: int, expected: int) -> None:
    assert device.intra_op_threads(name, num_slots, cores) == expected


def test_binding_makes_the_device_current(
    gpus: FakeModule, monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    device.bind("cuda:1", 2)
    assert gpus.current == ["cuda:1"]
    assert threads == [3]


def test_binding_leaves_the_users_number_of_threads(
    gpus: FakeModule, monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    device.bind("cpu", 2)
    assert gpus.current == []
    assert threads == []


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of intra-op threads that were asked for."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    return asked


def test_unequal_devices_are_warned_of(gpus: FakeModule, caplog: pytest.LogCaptureFixture) -> None:
    device.warn_if_unequal(("cuda:0", "cuda:0"))
    assert caplog.messages == []
    device.warn_if_unequal(("cuda:0", "cuda:1"))
    assert caplog.messages == ["The devices differ (Fast GPU, Slow GPU): ComfyUI takes its limits from the first"]


def test_names(gpus: FakeModule) -> None:
    assert [device.name(name) for name in ("cpu", "cuda:0", "cuda:1")] == ["cpu", "Fast GPU", "Slow GPU"]


def test_memory(gpus: FakeModule) -> None:
    assert device.memory("cuda:1") == {
        "total_bytes": TOTAL,
        "free_bytes": FREE,
        "torch_reserved_bytes": RESERVED,
        "torch_allocated_bytes": ALLOCATED,
    }
    ram = device.memory("cpu")
    assert 0 < ram["free_bytes"] < ram["total_bytes"]


def test_a_cpu_slot_has_no_current_device() -> None:
    with device.current("cpu"):
        pass


# Emptying caches.


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was emptied: `all`, or the index of a device."""
    done: list[Any] = []
    monkeypatch.setattr(device, "_trim_pool", done.append)
    return done


def empty_cache(emptied: list[Any]) -> Callable[[], None]:
    return device.empty_own_cache(lambda: emptied.append("all"))


@pytest.mark.parametrize(("backend", "expected"), [("native", []), ("cudaMallocAsync", [1])])
def test_in_a_slot_only_the_own_devices_cache_is_emptied(
    monkeypatch: pytest.MonkeyPatch, emptied: list[Any], backend: str, expected: list[Any]
) -> None:
    monkeypatch.setattr(device, "_allocator_backend", lambda: backend)
    first, second = make_slots("cuda:0", "cuda:1")
    first.run = Run("job")
    with entered(second):
        empty_cache(emptied)()
    assert emptied == expected


@pytest.mark.parametrize("running", [[], [0], [0, 1]])
def test_all_caches_are_emptied_while_no_other_device_computes(emptied: list[Any], running: list[int]) -> None:
    all_slots = make_slots("cuda:0", "cuda:0", "cuda:1")
    for index in running:
        all_slots[index].run = Run(f"job {index}")
    with entered(all_slots[0]):
        empty_cache(emptied)()
    assert emptied == ["all"]


@pytest.mark.parametrize("others_run", [True, False])
@pytest.mark.parametrize("is_after_node", [True, False])
@pytest.mark.parametrize("free", [10, 80])
def test_under_dynamic_vram_a_cache_is_kept_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, emptied: list[Any], others_run: bool, is_after_node: bool, free: int
) -> None:
    monkeypatch.setitem(sys.modules, "comfy.memory_management", SimpleNamespace(aimdo_enabled=True))
    monkeypatch.setattr(device, "_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 100))
    first, second = make_slots("cuda:0", "cuda:1")
    if others_run:
        first.run = Run("job")
    with entered(second), device.after_node() if is_after_node else nullcontext():
        empty_cache(emptied)()
    assert emptied == ([] if free == 80 and (others_run or is_after_node) else ["all"])


def test_outside_slots_all_caches_are_emptied(emptied: list[Any]) -> None:
    (slot,) = make_slots("cuda:0")
    slot.run = Run("job")
    empty_cache(emptied)()
    assert emptied == ["all"]


class FakeDriver:
    """Two functions of libcuda."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.trimmed: list[tuple[int, int]] = []

    def cuDeviceGetDefaultMemPool(self, pool: Any, index: Any) -> int:  # noqa: N802
        pool._obj.value = 1000 + index.value
        return self.code

    def cuMemPoolTrimTo(self, pool: Any, size: Any) -> int:  # noqa: N802
        self.trimmed.append((pool.value, size.value))
        return self.code


@pytest.mark.parametrize("code", [0, 201])
def test_trimming_a_pool(
    gpus: FakeModule, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    driver, synchronized = FakeDriver(code), []
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(gpus, "synchronize", synchronized.append, raising=False)
    with caplog.at_level(logging.WARNING):
        device._trim_pool(1)
    assert synchronized == [1]
    assert driver.trimmed == [(1001, 0)]
    assert [f"driver codes [{code}, {code}]" in message for message in caplog.messages] == ([True] if code else [])


# The newer hosts' allocator, comfy_aimdo.


def test_watermarks_are_reset_for_the_own_device_only() -> None:
    done: list[Any] = []
    library = SimpleNamespace(vbars_reset_watermark_limits=lambda context: done.append(context))

    def original() -> None:
        done.append("all")

    reset = device.reset_own_watermarks(original, library, lambda index: f"context of {index}")
    (slot,) = make_slots("cuda:1")
    with entered(slot):
        reset()
    reset()
    assert done == ["context of 1", "all"]
