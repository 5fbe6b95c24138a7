"""The parts of which the dashboard's data is made."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.http import overview as module
from comfy_parallel.http.overview import WAITING_SHOWN, overview
from comfy_parallel.slots.slot import Slot
from tests.fakes import failed, host_item, run_next, take

MEMORY = {"total_bytes": 100 << 20, "free_bytes": (48 << 20) + 5}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfy_parallel.slots.device.name", lambda device: f"Card {device}")
    monkeypatch.setattr("comfy_parallel.slots.device.memory", lambda device: MEMORY)


def models_of(slot: Slot) -> list[dict[str, Any]]:
    return [{"name": "SDXL", "loaded_bytes": 7}]


def parts_of(front: Any) -> Any:
    parts = overview(front, models_of, lambda: {"files": []})
    assert json.loads(json.dumps(parts, allow_nan=False)) is not None
    return parts


def test_an_idle_server(front: Any) -> None:
    parts = parts_of(front)
    assert list(parts) == ["server", "slot/0", "slot/1", "waiting", "recent", "charts", "weights"]
    assert parts["server"] == {"slots": 2, "running": 0, "waiting": 0, "refuses_jobs": False}
    slot = parts["slot/1"]
    assert (slot["device_name"], slot["job"], slot["pending"]) == ("Card cuda:1", None, 0)
    assert slot["models"] == [{"name": "SDXL", "loaded_bytes": 7}]
    assert (parts["waiting"], parts["recent"], parts["charts"]) == ({"total": 0, "jobs": []}, [], [])


def test_memory_that_hardly_changes_is_no_news(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts_of(front)
    monkeypatch.setitem(MEMORY, "free_bytes", (48 << 20) + 6)
    assert parts_of(front) == before
    assert before["slot/0"]["vram"]["free_bytes"] == 48 << 20


def test_a_running_job_with_its_progress(front: Any) -> None:
    queue = front.slot_queues[1]
    item = host_item("running")
    item[2]["2"] = {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "My sampler"}}
    queue.put(item)
    take(queue)
    run = queue.slot.run
    run.sight.note("progress_state", {"nodes": {"1": {"state": "finished"}, "2": {"state": "running"}}})
    run.sight.note("progress", {"value": 3, "max": 20, "node": "2"})
    run.sight.note(2, ("JPEG", SimpleNamespace(save=None), 512))
    job = parts_of(front)["slot/1"]["job"]
    assert job["prompt_id"] == "running"
    assert (job["node"], job["value"], job["max"]) == ("My sampler", 3, 20)
    assert (job["nodes_done"], job["nodes"], job["preview"]) == (1, 2, 1)
    assert job["started_at"] == run.started_at


def test_waiting_jobs_in_the_order_in_which_they_will_be_taken(front: Any) -> None:
    front.put(host_item("second", 2))
    front.put(host_item("first", 1))
    front.slot_queues[1].put(host_item("urgent", 3, priority=5))
    for queue in front.slot_queues:
        queue.front.closing.pause([queue.slot.index])
    waiting = parts_of(front)["waiting"]
    assert [(job["prompt_id"], job["gpu_id"], job["priority"]) for job in waiting["jobs"]] == [
        ("urgent", 1, 5),
        ("first", None, 0),
        ("second", None, 0),
    ]
    assert all(job["queued_at"] > 0 and job["nodes"] == 1 for job in waiting["jobs"])


def test_of_many_waiting_jobs_only_the_first_are_shown(front: Any) -> None:
    for number in range(WAITING_SHOWN + 20):
        front.put(host_item(f"job {number}", number))
    waiting = parts_of(front)["waiting"]
    assert (waiting["total"], len(waiting["jobs"])) == (WAITING_SHOWN + 20, WAITING_SHOWN)
    assert waiting["jobs"][0]["prompt_id"] == "job 0"


def test_ended_jobs_with_their_picture_or_their_error(front: Any) -> None:
    first, second = front.slot_queues
    first.put(host_item("good"))
    run_next(first)
    front.history["good"]["outputs"] = {
        "3": {"images": [{"filename": "seen.png", "subfolder": "", "type": "temp"}]},
        "4": {"images": [{"filename": "kept.png", "subfolder": "a", "type": "output"}, "no picture"]},
    }
    second.put(host_item("bad"))
    run_next(second, failed(("execution_error", {"exception_message": "out of luck\n"})))
    bad, good = parts_of(front)["recent"]
    assert (good["prompt_id"], good["gpu_id"], good["outcome"], good["error"]) == ("good", 0, "succeeded", None)
    assert good["image"] == {"filename": "kept.png", "subfolder": "a", "type": "output"}
    assert (bad["outcome"], bad["image"], bad["error"]) == ("failed", None, "out of luck")
    [[_, jobs, *_]] = parts_of(front)["charts"]
    assert jobs == 2


@pytest.mark.parametrize(
    "outputs",
    [None, 3, {"1": None}, {"1": {"images": 3}}, {"1": {"images": [None, {"filename": 7}, {"filename": "a.mp4"}]}}],
)
def test_outputs_of_any_shape_are_no_picture(outputs: Any) -> None:
    assert module._picture(outputs) is None


def test_what_cannot_be_asked_of_a_device_is_told(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: str) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr("comfy_parallel.slots.device.memory", lost)
    slot = parts_of(front)["slot/0"]
    assert (slot["vram"], slot["health"], slot["error"]) == (None, "broken", "RuntimeError: device lost")
