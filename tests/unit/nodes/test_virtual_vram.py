"""What a placed model tells the host about memory, and which placements are refused. Images: tests/host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import virtual_vram
from comfy_parallel.slots import device

GB = 1 << 30
DEVICES = ["cpu", "cuda:0", "cuda:1"]


class HostPatcher:
    """What of the host's class of loaded models a placement uses: ten modules of 100 bytes."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(current_weight_patches_uuid=None)
        self.load_device = torch.device("cuda:0")
        self.cast = SimpleNamespace(comfy_cast_weights=True)

    def _load_list(self) -> list[Any]:
        return [(100, 100, f"m{number}", self.cast, ["weight"]) for number in range(10)]

    def model_size(self) -> int:
        return 1000

    def partially_load(self) -> None: ...


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    free = {"cpu": 64 * GB, "cuda:0": 20 * GB, "cuda:1": 250}
    monkeypatch.setattr(device, "memory", lambda name: {"total_bytes": 24 * GB, "free_bytes": free[name]})
    return free


def spread(patcher: HostPatcher, expert: str, *, eject: bool = False) -> list[str]:
    asked = {"gigabytes": 0.0, "donors": "cpu", "devices": DEVICES}
    return virtual_vram.spread(patcher, expert=expert, eject=eject, exact=True, **asked)  # type: ignore[arg-type]


def test_the_host_makes_room_for_what_stays_only() -> None:
    patcher = HostPatcher()
    spread(patcher, "cpu,300b;cuda:0,*")
    assert patcher.model_size() == 700


def test_ejecting_asks_the_host_for_the_whole_device_until_the_model_is_loaded() -> None:
    patcher = HostPatcher()
    spread(patcher, "cpu,300b;cuda:0,*", eject=True)
    assert patcher.model_size() == 24 * GB
    patcher.model.current_weight_patches_uuid = object()
    assert patcher.model_size() == 700


def test_a_donor_gpu_without_room_refuses_with_the_numbers(memory: dict[str, int]) -> None:
    with pytest.raises(AllocationError, match="cuda:1 has 250 bytes free and cannot take 300"):
        spread(HostPatcher(), "cuda:1,300b;cuda:0,*")
    memory["cuda:1"] = 300
    assert spread(HostPatcher(), "cuda:1,300b;cuda:0,*")[-2] == "300 of 1000 bytes leave cuda:0"


def test_each_load_sees_its_part_of_the_model() -> None:
    patcher: Any = HostPatcher()
    spread(patcher, "slot,70%;cpu,30%")
    parts = {}
    for part in (virtual_vram._AWAY, virtual_vram._HERE, None):
        patcher._part = part
        parts[part] = [entry[-3] for entry in patcher._load_list()]
    assert parts[virtual_vram._AWAY] == ["m7", "m8", "m9"]
    assert sorted(parts[virtual_vram._AWAY] + parts[virtual_vram._HERE]) == parts[None]


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(AllocationError, match="str is no model"):
        virtual_vram.spread_result(("text",), gigabytes=1.0)
