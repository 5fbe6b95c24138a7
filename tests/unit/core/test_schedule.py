"""Which idle slot takes a job that any slot may take."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.schedule import choose_slot
from tests.fakes import make_slots


@pytest.mark.parametrize(
    ("client_id", "last_clients", "idle", "chosen"),
    [
        ("a", {}, [0, 1, 2], 0),
        ("a", {}, [2, 1], 1),
        ("a", {2: "a"}, [0, 1, 2], 2),
        ("a", {1: "a", 2: "a"}, [2, 0, 1], 1),
        ("a", {2: "a"}, [0, 1], 0),
        ("a", {0: "b"}, [0, 1], 0),
        (None, {}, [1, 0], 0),
        (None, {1: None}, [0, 1], 1),
        (None, {0: "a"}, [0], 0),
    ],
)
def test_choice(client_id: Any, last_clients: dict[int, Any], idle: list[int], chosen: int) -> None:
    slots = make_slots("cuda:0", "cuda:1", "cuda:2")
    for index, last in last_clients.items():
        slots[index].last_client_id = last
    assert choose_slot(client_id, [slots[index] for index in idle]).index == chosen
