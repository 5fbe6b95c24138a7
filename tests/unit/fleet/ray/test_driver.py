"""What the process that speaks with Ray says where it cannot."""

from __future__ import annotations

import sys

import pytest

from comfy_parallel.fleet.ray import driver
from tests.ports import free_port


def test_a_ray_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'comfy-parallel[ray]'" in (driver._connect("auto") or "")


def test_an_address_that_does_not_answer_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert f"nothing answers at {address}" in (driver._connect(address) or "")


def test_gpus_and_declared_slots_of_living_machines_count() -> None:
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"GPU": 8.0, "CPU": 64.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"comfy_slot": 2.0}},
        {"NodeID": "c", "Alive": False, "Resources": {"GPU": 8.0}},
    ]
    assert driver._units(nodes, None) == (8, 2)
    assert driver._units(nodes, "a") == (0, 2)
