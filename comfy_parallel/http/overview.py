"""What the dashboard shows of the server, in parts that change on their own."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from comfy_parallel.core.series import merged
from comfy_parallel.core.shown import clipped
from comfy_parallel.http.health import Answers
from comfy_parallel.http.probes import slot_state
from comfy_parallel.http.status import ModelsOf, slot_metrics
from comfy_parallel.slots.items import order_of, view_of
from comfy_parallel.slots.slot import Ended, Slot
from comfy_parallel.slots.snapshot import Snapshot

WAITING_SHOWN = 100
RECENT_SHOWN = 30
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif")
_MOST = 300  # characters of a text
_GRAIN = 16 << 20  # bytes: a little memory that comes and goes is no news

Parts = dict[str, Any]
Weights = Callable[[], dict[str, Any]]


def overview(front: Any, models_of: ModelsOf, weights: Weights) -> Parts:
    """All parts. Times are of the monotonic clock, which each message to the dashboard tells as well."""
    seen: Snapshot = front.snapshot()
    parts: Parts = {"server": _server(front, seen)}
    rows = zip(front.slot_queues, seen.running, seen.pending, strict=True)
    for queue, running, pending in rows:
        parts[f"slot/{queue.slot.index}"] = _slot(front, Answers(queue.slot, models_of), running, len(pending))
    parts["waiting"] = _waiting(seen)
    parts["recent"] = _recent(front)
    parts["charts"] = _charts(front)
    parts["weights"] = weights()
    return parts


def _server(front: Any, seen: Snapshot) -> Parts:
    return {
        "slots": len(front.slot_queues),
        "running": sum(map(len, seen.running)),
        "waiting": sum(map(len, seen.pending)) + len(seen.unassigned),
        "refuses_jobs": front.closing.refuses(None),
    }


def _slot(front: Any, answers: Answers, running: list[Any], pending: int) -> Parts:
    slot, graphs = answers.slot, answers.graphs or {}
    return {
        **slot_state(front, slot.index),
        "device": slot.place,
        "device_name": answers.device_name,
        "kind": slot.kind,
        "worker": None if slot.process is None else slot.process.state,
        "health": answers.health,
        "error": answers.error,
        "vram": None if answers.memory is None else {kind: _coarse(size) for kind, size in answers.memory.items()},
        "models": answers.models,
        "graphs": {name: graphs.get(name) for name in ("on", "reason", "captures", "replays")},
        "metrics": slot_metrics(slot),
        "pending": pending,
        "takes_part": slot.takes_part,
        "job": _running(slot, running),
    }


def _coarse(size: int) -> int:
    return size // _GRAIN * _GRAIN


def _running(slot: Slot, running: list[Any]) -> Parts | None:
    run = slot.run
    if run is None:
        return None
    prompt = next((item[2] for item in running if item[1] == run.prompt_id), None)
    prompt = prompt if isinstance(prompt, dict) else {}
    sight = run.sight
    step, node = sight.step, sight.node
    return {
        "prompt_id": run.prompt_id if run.share is None else run.share.prompt_id,  # To interrupt it is to end the job.
        "started_at": run.started_at,
        "waited_s": round(run.waited_s, 3),
        "interrupted": run.interrupted,
        "share": None if run.share is None else asdict(run.share),
        "node": _title(prompt, node),
        "value": None if step is None else step[0],
        "max": None if step is None else step[1],
        "nodes_done": min(sight.nodes_done, len(prompt)),
        "nodes": len(prompt),
        "preview": sight.number or None,
    }


def _title(prompt: dict[str, Any], node: Any) -> str | None:
    """What people call a node: the title that they gave it, else its class."""
    known = prompt.get(node) if isinstance(node, str) else None
    if not isinstance(known, dict):
        return clipped(node, _MOST) if isinstance(node, str) else None
    meta = known.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return clipped(str(title or known.get("class_type") or node), _MOST)


def _waiting(seen: Snapshot) -> Parts:
    """The jobs that wait, in the order in which they will be taken, and how many more there are."""
    each = [item for items in (*seen.pending, seen.unassigned) for item in items]
    first = heapq.nsmallest(WAITING_SHOWN, each, key=order_of)
    jobs = [
        {
            "prompt_id": item[1],
            "gpu_id": (view := view_of(item)).target,
            "priority": view.priority,
            "queued_at": getattr(item, "queued_at", 0.0) or None,
            "nodes": len(item[2]) if isinstance(item[2], dict) else None,
            "alone": bool(view.is_alone),
        }
        for item in first
    ]
    return {"total": len(each), "jobs": jobs}


def _recent(front: Any) -> list[Parts]:
    """The jobs that ended last, the latest first."""
    ended = [(one, queue.slot.index) for queue in front.slot_queues for one in tuple(queue.slot.stats.last)]
    last = heapq.nlargest(RECENT_SHOWN, ended, key=lambda row: row[0].ended_at)
    return [_ended(one, gpu_id, front.history.get(one.prompt_id)) for one, gpu_id in last]


def _ended(one: Ended, gpu_id: int, entry: Any) -> Parts:
    entry = entry if isinstance(entry, dict) else {}
    return {
        "prompt_id": one.prompt_id,
        "gpu_id": gpu_id,
        "outcome": one.outcome,
        "waited_s": round(one.waited_s, 3),
        "ran_s": round(one.ran_s, 3),
        "ended_at": one.ended_at,
        "image": _picture(entry.get("outputs")),
        "error": _error(entry.get("status")) if one.outcome == "failed" else None,
    }


def _picture(outputs: Any) -> Parts | None:
    """A picture that a job has made, as `GET /view` is asked for it; rather one that was saved."""
    results = [one for output in _values(outputs) for one in _list(_get(output, "images"))]
    pictures = [one for one in results if str(_get(one, "filename")).lower().endswith(_PICTURES)]
    pictures.sort(key=lambda one: one.get("type") != "output")
    return {key: str(pictures[0].get(key) or "") for key in ("filename", "subfolder", "type")} if pictures else None


def _error(status: Any) -> str | None:
    for message in _list(_get(status, "messages")):
        if isinstance(message, list | tuple) and len(message) == 2 and message[0] == "execution_error":
            text = _get(message[1], "exception_message")
            return clipped(str(text).strip(), _MOST) if text else None
    return None


def _get(value: Any, name: str) -> Any:
    """What nodes put into a history entry may have any shape."""
    return value.get(name) if isinstance(value, dict) else None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _charts(front: Any) -> list[list[float]]:
    """Of each stretch of the last hour: begin, jobs, seconds that they waited and ran."""
    now = time.monotonic()
    points = merged([queue.slot.stats.series.points(now) for queue in front.slot_queues])
    return [[begin, jobs, round(waited_s, 3), round(ran_s, 3)] for begin, jobs, waited_s, ran_s in points]
