"""Which slot a request names, by header or in its body: the one place where HTTP reads targets."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from comfy_parallel.core.scope import HEADER, SETTLED_FIELD, body_target, current_scope, note_target, parse_target
from comfy_parallel.errors import BadRequest
from comfy_parallel.slots.slot import slots


def header_target(request: web.Request) -> int | str | None:
    """The slot's number or `auto` in the header; None without one.

    Raises:
        BadRequest: when it names no slot, or several.
    """
    if HEADER not in request.headers:
        return None
    values = set(request.headers.getall(HEADER))
    if len(values) > 1:
        raise BadRequest("invalid_target_gpu", f"{HEADER} is given {len(values)} times", f"send {HEADER} once")
    return parse_target(values.pop(), len(slots()), HEADER)


def chosen_slots(data: dict[str, Any], target: int | str | None) -> list[int]:
    """The slots that a body's `gpu_ids` name, else the one in the header, else all.

    Raises:
        BadRequest: when `gpu_ids` is no list of slots.
    """
    gpu_ids, count = data.get("gpu_ids"), len(slots())
    if gpu_ids is None:
        return [target] if isinstance(target, int) else list(range(count))
    if (
        not isinstance(gpu_ids, list)
        or not gpu_ids
        or not all(type(one) is int and 0 <= one < count for one in gpu_ids)
    ):
        raise BadRequest(
            "invalid_target_gpu", "gpu_ids is no list of slots", f"send numbers from 0 to {count - 1}, or leave it out"
        )
    return sorted(set(gpu_ids))


def settle_target(data: dict[str, Any]) -> None:
    """Write into a job's `extra_data` which slot it is for, so that whoever keeps it for a while keeps that too.

    The header wins over what the body names.

    Raises:
        BadRequest: when the body names a slot that is not there.
    """
    target, extra_data = current_scope().target, data.get("extra_data", {})
    extra_data.pop(SETTLED_FIELD, None)
    if target is None:
        body_target(extra_data, len(slots()))
    else:
        data["extra_data"] = {**extra_data, SETTLED_FIELD: target}
        note_target(None)  # Other jobs that this request may bring into the queue go their own ways.
