"""When a server is ready for jobs, and what it tells of its slots."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.states import SlotEvent
from comfy_parallel.http import probes
from comfy_parallel.slots import device
from tests.fakes import make_front


@pytest.fixture
def front() -> Any:
    made = make_front("cpu", "cpu")
    made.start(made)
    return made


def test_a_server_is_ready_once_its_workers_have_been_started() -> None:
    front = make_front("cpu", "cpu")
    assert "not been started" in str(probes.why_not_ready(front))
    front.start(front)
    assert probes.why_not_ready(front) is None


def test_one_open_slot_is_enough(front: Any) -> None:
    front.closing.drain([0])
    assert probes.why_not_ready(front) is None
    front.closing.pause([1])
    assert "no slot can take jobs" in str(probes.why_not_ready(front))
    front.closing.resume([1])
    assert probes.why_not_ready(front) is None


def test_a_draining_server_is_not_ready(front: Any) -> None:
    front.closing.drain([0, 1])
    assert probes.why_not_ready(front) == "the server is draining"


def test_failed_slots_and_lost_devices_take_no_jobs(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front.slot_queues[0].slot.change(SlotEvent.FAIL)
    assert probes.why_not_ready(front) is None

    def lost(name: str) -> str:
        raise RuntimeError("lost")

    monkeypatch.setattr(device, "name", lost)
    assert "no slot can take jobs" in str(probes.why_not_ready(front))
    assert {one["health"] for one in probes.slots_health(front)} == {"broken"}


def test_what_is_told_of_each_slot(front: Any) -> None:
    front.closing.drain([1])
    told = {"device": "cpu", "health": "ok", "error": None}
    assert probes.slots_health(front) == [
        {"gpu_id": 0, "state": "starting", "refuses_jobs": False, **told},
        {"gpu_id": 1, "state": "paused", "refuses_jobs": True, **told},
    ]
