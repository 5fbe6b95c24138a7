"""What the server tells about its slots: the replies of `GET /queue/all` and `GET /debug/queues`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from comfy_parallel import device
from comfy_parallel.graphs import steppers
from comfy_parallel.items import SENSITIVE, QueueItem
from comfy_parallel.queues import Snapshot
from comfy_parallel.slot import Slot

ModelsOf = Callable[[Slot], list[dict[str, Any]]]


def queue_all_json(front: Any, models_of: ModelsOf) -> str:
    """The reply of `GET /queue/all`, as text: a waiting job's part is encoded once, not per request."""
    seen: Snapshot = front.snapshot()
    queues = [
        _slot_json(queue.slot, running, pending, models_of(queue.slot))
        for queue, running, pending in zip(front.slot_queues, seen.running, seen.pending, strict=True)
    ]
    return _object(
        mode=json.dumps("multi-gpu"),
        num_gpus=json.dumps(len(queues)),
        queues=_array(queues),
        unassigned=_array(_items_json(seen.unassigned)),
        total_running=json.dumps(sum(map(len, seen.running))),
        total_pending=json.dumps(sum(map(len, seen.pending)) + len(seen.unassigned)),
    )


def debug_queues(front: Any) -> dict[str, Any]:
    """The reply of `GET /debug/queues`: counts only."""
    seen: Snapshot = front.snapshot()
    rows = zip(front.slot_queues, seen.running, seen.pending, strict=True)
    return {
        "queues": [
            {"gpu_id": queue.slot.index, "queued": len(pending), "running": len(running)}
            for queue, running, pending in rows
        ],
        "unassigned": len(seen.unassigned),
    }


def _slot_json(slot: Slot, running: list[QueueItem], pending: list[QueueItem], models: list[dict[str, Any]]) -> str:
    return _object(
        gpu_id=json.dumps(slot.index),
        device=json.dumps(slot.device),
        device_name=json.dumps(device.name(slot.device)),
        state=json.dumps(slot.state),
        running=json.dumps([item[1] for item in running]),
        pending=json.dumps([item[1] for item in pending]),
        queue_running=_array(json.dumps(item[:SENSITIVE]) for item in running),
        queue_pending=_array(_items_json(pending)),
        running_count=json.dumps(len(running)),
        pending_count=json.dumps(len(pending)),
        metrics=json.dumps(slot_metrics(slot)),
        vram=json.dumps(device.memory(slot.device)),
        models=json.dumps(models),
        graphs=json.dumps(steppers.report(slot)),
    )


def slot_metrics(slot: Slot) -> dict[str, float | None]:
    """Counters of a slot; averages in seconds, None before the first job."""
    stats = slot.stats
    done = stats.succeeded + stats.failed + stats.interrupted
    return {
        "jobs_succeeded": stats.succeeded,
        "jobs_failed": stats.failed,
        "jobs_interrupted": stats.interrupted,
        "jobs_out_of_memory": stats.out_of_memory,
        "worker_restarts": stats.worker_restarts,
        "busy_seconds": stats.busy_seconds,
        "wait_seconds": stats.wait_seconds,
        "average_busy_seconds": stats.busy_seconds / done if done else None,
        "average_wait_seconds": stats.wait_seconds / done if done else None,
    }


def _items_json(items: list[QueueItem]) -> Iterable[str]:
    return (item.json if isinstance(item, QueueItem) else json.dumps(item[:SENSITIVE]) for item in items)


def _array(parts: Iterable[str]) -> str:
    return "[" + ", ".join(parts) + "]"


def _object(**parts: str) -> str:
    return "{" + ", ".join(f'"{name}": {part}' for name, part in parts.items()) + "}"
