"""Which placements are refused, and what of a model may move. Images: tests/host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfy_parallel.errors import AllocationError
from comfy_parallel.host import dynamic_vram, facts
from comfy_parallel.nodes import virtual_vram
from comfy_parallel.nodes.placed import placement_of
from comfy_parallel.slots import device
from comfy_parallel.slots.slot import set_slots
from tests.fakes import make_slots

GB = 1 << 30
DEVICES = ["cpu", "cuda:0", "cuda:1"]


class HostPatcher:
    """What of the host's class of loaded models a placement uses: ten modules of 100 bytes."""

    size = 100
    parameters = ("weight",)

    def __init__(self) -> None:
        self.model = SimpleNamespace(current_weight_patches_uuid=None)
        self.load_device = torch.device("cuda:0")
        self.cast = SimpleNamespace(comfy_cast_weights=True)

    def _load_list(self) -> list[Any]:
        return [(self.size, self.size, f"m{number}", self.cast, self.parameters) for number in range(10)]

    def model_size(self) -> int:
        return 10 * self.size

    def partially_load(self) -> None: ...


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    free = {"cpu": 64 * GB, "cuda:0": 20 * GB, "cuda:1": 250}
    monkeypatch.setattr(device, "memory", lambda name: {"total_bytes": 24 * GB, "free_bytes": free[name]})
    monkeypatch.setattr(facts, "vram", lambda name: {"free_bytes": free[name]})
    monkeypatch.setattr(facts, "least_to_compute", lambda: 1000)
    return free


def spread(patcher: Any, expert: str) -> list[str]:
    asked: dict[str, Any] = {"gigabytes": 0.0, "donors": "cpu", "devices": DEVICES}
    return virtual_vram.spread(patcher, expert=expert, eject=False, exact=True, **asked)


def test_the_host_makes_room_for_what_stays_only() -> None:
    patcher = HostPatcher()
    spread(patcher, "cpu,300b;cuda:0,*")
    assert patcher.model_size() == 700


def test_a_donor_gpu_without_room_refuses_with_the_numbers(free: dict[str, int]) -> None:
    with pytest.raises(AllocationError, match="cuda:1 can lend 250 bytes .* not the 300 of this model"):
        spread(HostPatcher(), "cuda:1,300b;cuda:0,*")
    free["cuda:1"] = 300
    assert spread(HostPatcher(), "cuda:1,300b;cuda:0,*")[-2] == "300 of 1000 bytes leave cuda:0"


def test_a_donor_that_is_a_slots_keeps_what_that_needs_to_compute(free: dict[str, int]) -> None:
    set_slots(make_slots("cuda:0", "cuda:1"))
    free["cuda:1"] = 1299
    with pytest.raises(AllocationError, match="cuda:1 can lend 299 bytes"):
        spread(HostPatcher(), "cuda:1,300b;cuda:0,*")
    free["cuda:1"] = 1300
    spread(HostPatcher(), "cuda:1,300b;cuda:0,*")


@pytest.mark.parametrize(
    ("size", "parameters", "moves"),
    [(16 << 10, ("weight",), 0), (17 << 10, ("weight", "bias"), 10), (17 << 10, ("weight", "scale"), 0)],
)
def test_under_dynamic_vram_what_the_host_loads_whole_stays(
    monkeypatch: pytest.MonkeyPatch, size: int, parameters: tuple[str, ...], moves: int
) -> None:
    monkeypatch.setattr(HostPatcher, "is_dynamic", lambda self: True, raising=False)
    patcher = HostPatcher()
    patcher.size, patcher.parameters = size, parameters
    spread(patcher, "cpu,*")
    placement = placement_of(patcher)
    assert placement is not None
    assert len(placement.away) == moves


def test_a_model_that_dynamic_vram_cannot_leave_out_is_the_hosts_copy_without(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = HostPatcher()
    dynamic: Any = HostPatcher()
    dynamic.is_dynamic, dynamic.get_non_dynamic_delegate = (lambda: True), (lambda: plain)
    asked: dict[str, Any] = {"gigabytes": 0.0, "donors": "cpu", "devices": DEVICES, "expert": "cpu,300b;cuda:0,*"}
    monkeypatch.setattr(dynamic_vram, "can_do_without_pages", lambda model, place: False)
    (made,), _ = virtual_vram.spread_result((dynamic,), eject=False, exact=True, **asked)
    assert made is plain
    monkeypatch.setattr(dynamic_vram, "can_do_without_pages", lambda model, place: True)
    (made,), _ = virtual_vram.spread_result((dynamic,), eject=False, exact=True, **asked)
    assert made is dynamic


def test_what_is_no_model_is_told() -> None:
    with pytest.raises(AllocationError, match="str is no model"):
        virtual_vram.spread_result(("text",), gigabytes=1.0)
