"""What a client hears of a job, without what differs between any two runs of it."""

from __future__ import annotations

from typing import Any

SKIPPED = ("current_outputs", "timestamp", "prompt", "traceback", "filename", "sid")


def is_status(one: Any) -> bool:
    return isinstance(one, dict) and one["type"] == "status"


def comparable(value: Any, job_id: str, slot: int) -> Any:
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if name not in SKIPPED and (name, part) != ("gpu_id", slot)}
        return {name: comparable(part, job_id, slot) for name, part in kept.items()}
    if isinstance(value, list):
        return [comparable(part, job_id, slot) for part in value]
    if isinstance(value, bytes):
        return value.replace(job_id.encode(), b"the job")
    return "the job" if value == job_id else value
