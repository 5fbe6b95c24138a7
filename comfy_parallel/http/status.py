"""What the server tells about its slots: the replies of `GET /queue/all` and `GET /debug/queues`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from comfy_parallel.fleet import questions
from comfy_parallel.http.health import Answers
from comfy_parallel.slots.items import SENSITIVE, QueueItem, view_of
from comfy_parallel.slots.slot import Slot
from comfy_parallel.slots.snapshot import Snapshot

ModelsOf = Callable[[Slot], list[dict[str, Any]]]
Pieces = Iterable[str]  # of a JSON text
_MOST_REASONS = 200  # waiting jobs that are looked at for each slot


def queue_all_json(front: Any, models_of: ModelsOf) -> str:
    """The reply of `GET /queue/all`, as text: a waiting job's part is encoded once, not per request."""
    seen: Snapshot = front.snapshot()
    queues = [
        _slot_json(Answers(queue.slot, models_of), running, pending, seen.unassigned)
        for queue, running, pending in zip(front.slot_queues, seen.running, seen.pending, strict=True)
    ]
    reply = _object(
        mode=_json("multi-gpu"),
        num_gpus=_json(len(queues)),
        queues=_array(queues),
        unassigned=_array(map(_item_json, seen.unassigned)),
        waiting_to_run_alone=_json(seen.waiting_to_run_alone),
        takes_shares=_json(questions.is_known("shares")),
        kinds=_json(front._dispatcher.kinds and front._dispatcher.kinds.json),
        total_running=_json(sum(map(len, seen.running))),
        total_pending=_json(sum(map(len, seen.pending)) + len(seen.unassigned)),
    )
    return "".join(reply)  # once, for it may be long


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


def _slot_json(
    answers: Answers, running: list[QueueItem], pending: list[QueueItem], unassigned: list[QueueItem]
) -> Pieces:
    slot = answers.slot
    return _object(
        gpu_id=_json(slot.index),
        device=_json(slot.place),
        device_name=_json(answers.device_name),
        state=_json(slot.state.shown),
        why_suspended=_json(slot.why_suspended),
        is_stalled=_json((run := slot.run) is not None and run.stalls > 0),
        kind=_json(slot.kind),
        worker=_json(_worker(slot)),
        health=_json(answers.health),
        error=_json(answers.error),
        running=_json([item[1] for item in running]),
        pending=_json([item[1] for item in pending]),
        cannot_run=_json(_cannot_run(slot, [*pending, *unassigned])),
        queue_running=_array(_json(item[:SENSITIVE]) for item in running),
        queue_pending=_array(map(_item_json, pending)),
        running_count=_json(len(running)),
        pending_count=_json(len(pending)),
        metrics=_json(slot_metrics(slot)),
        vram=_json(answers.memory),
        models=_json(answers.models),
        graphs=_json(answers.graphs),
    )


def _cannot_run(slot: Slot, waiting: list[QueueItem]) -> dict[str, str]:
    """Of the waiting jobs that the slot could be given, those that it cannot run, and why; not of endlessly many."""
    reasons = ((item[1], view_of(item).barred.get(slot.index)) for item in waiting[:_MOST_REASONS])
    return {prompt_id: reason for prompt_id, reason in reasons if reason is not None}


def _worker(slot: Slot) -> dict[str, Any] | None:
    """The process that runs the slot's jobs; None for a slot of the front's own."""
    process = slot.process
    if process is None:
        return None
    return {
        "pid": process.pid,
        "address": process.address,
        "state": process.state,
        "restarts": process.restarts,
        "last_end": process.last_end,
    }


def slot_metrics(slot: Slot) -> dict[str, float | None]:
    """Counters of a slot; averages in seconds, None before the first job."""
    stats = slot.stats
    done = stats.succeeded + stats.failed + stats.interrupted
    return {
        "jobs_succeeded": stats.succeeded,
        "jobs_failed": stats.failed,
        "jobs_interrupted": stats.interrupted,
        "jobs_out_of_memory": stats.out_of_memory,
        "jobs_run_again": stats.memory_retries,
        "worker_restarts": stats.worker_restarts,
        "suspensions": stats.suspensions,
        "shares": stats.shares,
        "busy_seconds": stats.busy_seconds,
        "wait_seconds": stats.wait_seconds,
        "average_busy_seconds": stats.runs.sum_s / done if done else None,
        "average_wait_seconds": stats.wait_seconds / done if done else None,
    }


def _json(value: Any) -> Pieces:
    return (json.dumps(value),)


def _item_json(item: QueueItem) -> Pieces:
    return (item.json,) if isinstance(item, QueueItem) else _json(item[:SENSITIVE])


def _array(parts: Iterable[Pieces]) -> Pieces:
    yield "["
    for number, part in enumerate(parts):
        if number:
            yield ", "
        yield from part
    yield "]"


def _object(**parts: Pieces) -> Pieces:
    yield "{"
    for number, (name, part) in enumerate(parts.items()):
        yield f', "{name}": ' if number else f'"{name}": '
        yield from part
    yield "}"
