"""The replies of `GET /queue/all` and `GET /debug/queues`."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.fleet import questions
from comfy_parallel.graphs import per_slot
from comfy_parallel.graphs.stepper import StepStats
from comfy_parallel.http import status
from comfy_parallel.slots import items
from comfy_parallel.slots.slot import Slot
from tests.fakes import host_item, run_next, take

MEMORY = {"total_bytes": 80, "free_bytes": 30}
KEYS = [
    "gpu_id",
    "device",
    "device_name",
    "state",
    "why_suspended",
    "is_stalled",
    "kind",
    "worker",
    "health",
    "error",
    "running",
    "pending",
    "cannot_run",
    "queue_running",
    "queue_pending",
    "running_count",
    "pending_count",
    "metrics",
    "vram",
    "models",
    "graphs",
]

REASON = "switched off: COMFY_PARALLEL_GRAPHS is off; set it to auto"
OFF = {"on": False, "reason": REASON, "captures": 0, "replays": 0, "eager": {}, "size_bytes": 0}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comfy_parallel.slots.device.name", lambda device: f'Card "{device}"')
    monkeypatch.setattr("comfy_parallel.slots.device.memory", lambda device: MEMORY)


@pytest.fixture
def busy(front: Any) -> Any:
    """Slot 1 has run one job and runs another; one job is pinned to it, two wait for any slot."""
    queue = front.slot_queues[1]
    queue.put(host_item("done"))
    run_next(queue)
    queue.put(host_item("running"))
    take(queue)
    queue.put(host_item('pinned "ü"', target_gpu=1))
    front.put(host_item("second", 2))
    front.put(host_item("first", 1))
    return front


def models_of(slot: Slot) -> list[dict[str, Any]]:
    return [{"name": "SD15", "loaded_bytes": 7}] if slot.index == 1 else []


def reply(front: Any) -> Any:
    return json.loads(status.queue_all_json(front, models_of))


def test_the_whole_reply(busy: Any) -> None:
    seen = busy.snapshot()
    metrics = [status.slot_metrics(queue.slot) for queue in busy.slot_queues]
    parts = {
        "mode": "multi-gpu",
        "num_gpus": 2,
        "queues": [
            {
                "gpu_id": 0,
                "device": "cuda:0",
                "device_name": 'Card "cuda:0"',
                "state": "starting",
                "why_suspended": None,
                "is_stalled": False,
                "kind": "thread",
                "worker": None,
                "health": "ok",
                "error": None,
                "running": [],
                "pending": [],
                "cannot_run": {},
                "queue_running": [],
                "queue_pending": [],
                "running_count": 0,
                "pending_count": 0,
                "metrics": metrics[0],
                "vram": MEMORY,
                "models": [],
                "graphs": OFF,
            },
            {
                "gpu_id": 1,
                "device": "cuda:1",
                "device_name": 'Card "cuda:1"',
                "state": "running",
                "why_suspended": None,
                "is_stalled": False,
                "kind": "thread",
                "worker": None,
                "health": "ok",
                "error": None,
                "running": ["running"],
                "pending": ['pinned "ü"'],
                "cannot_run": {},
                "queue_running": [item[:5] for item in seen.running[1]],
                "queue_pending": [item[:5] for item in seen.pending[1]],
                "running_count": 1,
                "pending_count": 1,
                "metrics": metrics[1],
                "vram": MEMORY,
                "models": [{"name": "SD15", "loaded_bytes": 7}],
                "graphs": OFF,
            },
        ],
        "unassigned": [item[:5] for item in seen.unassigned],
        "waiting_to_run_alone": [],
        "takes_shares": questions.is_known("shares"),
        "kinds": None,
        "total_running": 1,
        "total_pending": 3,
    }
    assert status.queue_all_json(busy, models_of) == json.dumps(parts)


def test_an_idle_server(front: Any) -> None:
    shown = reply(front)
    assert [list(queue) for queue in shown["queues"]] == [KEYS, KEYS]
    assert (shown["total_running"], shown["total_pending"], shown["unassigned"]) == (0, 0, [])


def test_jobs_are_shown_in_order_in_the_hosts_shape_and_without_secrets(busy: Any) -> None:
    shown = reply(busy)
    assert [item[1] for item in shown["unassigned"]] == ["first", "second"]
    assert all(len(item) == 5 for item in shown["unassigned"])
    assert shown["queues"][1]["queue_pending"][0][:2] == [0, 'pinned "ü"']
    assert "secret" not in status.queue_all_json(busy, models_of)


def test_a_waiting_job_is_encoded_once(busy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = status.queue_all_json(busy, models_of)
    monkeypatch.setattr(items.json, "dumps", refuse_items)
    assert status.queue_all_json(busy, models_of) == first


def refuse_items(value: Any, dumps: Any = json.dumps) -> str:
    assert not isinstance(value, items.QueueItem)
    assert not (isinstance(value, tuple) and value[1] in ("first", "second", 'pinned "ü"'))
    text: str = dumps(value)
    return text


def test_the_cached_text_does_not_outlive_the_wait(busy: Any) -> None:
    assert reply(busy)["unassigned"][0][3] == {"gpu_id": None}
    assert take(busy.slot_queues[0]) == "first"
    shown = reply(busy)["queues"][0]
    assert shown["queue_running"][0][3] == {"gpu_id": 0}
    assert (shown["running"], shown["state"]) == (["first"], "running")


def test_a_plain_tuple_that_a_node_pushed_is_shown_too(front: Any) -> None:
    front.queue.append(host_item("pushed"))
    assert [item[1] for item in reply(front)["unassigned"]] == ["pushed"]


def test_averages_exist_once_a_job_has_ended(front: Any) -> None:
    slot = front.slot_queues[0].slot
    assert status.slot_metrics(slot)["average_busy_seconds"] is None
    slot.stats.succeeded, slot.stats.failed, slot.stats.interrupted = 2, 1, 1
    slot.stats.runs.add(6.0)
    slot.stats.waits.add(2.0)
    metrics = status.slot_metrics(slot)
    assert (metrics["average_busy_seconds"], metrics["average_wait_seconds"]) == (1.5, 0.5)


def test_a_slots_graph_stepping(front: Any) -> None:
    stats = StepStats(captures=1, replays=3, eager=Counter({"first of its kind": 1}))
    front.slot_queues[0].slot.values[per_slot._steppers] = SimpleNamespace(stats=stats, size_bytes=9)
    expected = {**OFF, "captures": 1, "replays": 3, "eager": {"first of its kind": 1}, "size_bytes": 9}
    assert [queue["graphs"] for queue in reply(front)["queues"]] == [expected, OFF]


def test_the_short_form_holds_counts(busy: Any) -> None:
    assert status.debug_queues(busy) == {
        "queues": [{"gpu_id": 0, "queued": 0, "running": 0}, {"gpu_id": 1, "queued": 1, "running": 1}],
        "unassigned": 2,
    }
