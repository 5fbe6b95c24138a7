"""Which slot a request names, by header or in its body: the one place where HTTP reads targets."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from comfy_parallel.core.scope import BODY_FIELD, HEADER, parse_target
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


def check_body_target(data: dict[str, Any]) -> None:
    """Refuse a job whose `extra_data` names a slot that is not there.

    Raises:
        BadRequest: saying which slots there are.
    """
    target = data.get("extra_data", {}).get(BODY_FIELD)
    if target is not None:
        parse_target(target, len(slots()), f"extra_data.{BODY_FIELD}")
