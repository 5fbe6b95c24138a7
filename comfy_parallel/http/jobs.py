"""Changing a job that waits: where it goes, and how urgent it is."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from comfy_parallel.config import MOST_PRIORITY
from comfy_parallel.core.scope import parse_target
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest, NotWaiting
from comfy_parallel.http import checks, replies
from comfy_parallel.slots.items import view_of
from comfy_parallel.slots.slot import slots

_FIELDS = {"slot", "priority"}


def add_route(routes: web.RouteTableDef, front: Any) -> None:
    """`POST /parallel/jobs/{prompt_id}`."""

    @routes.post("/parallel/jobs/{prompt_id}")
    async def change_job(request: web.Request) -> web.Response:
        try:
            data = checks.parse_object(await request.read(), charset=request.charset or "utf-8")
            return web.json_response(_changed(front, request.match_info["prompt_id"], data))
        except BadRequest as error:
            return replies.refusal(error)


def _changed(front: Any, prompt_id: str, data: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(data.keys() - _FIELDS):
        raise _bad(f"{shown(unknown[0])} is no property of a job", "send slot, priority, or both")
    if not data:
        raise _bad("the body names nothing to change", "send slot, priority, or both")
    target = None if data.get("slot") is None else parse_target(data["slot"], len(slots()), "slot")
    priority = data.get("priority")
    if priority is not None:
        check_priority(priority, "priority")
    changed = front.change_waiting(prompt_id, target, priority)
    if not changed:
        raise _not_waiting(front, prompt_id)
    job = changed[0]
    told = {"prompt_id": prompt_id, "gpu_id": job.target, "priority": job.priority}
    reason = None if job.target is None else job.barred.get(job.target)
    return told if reason is None else {**told, "cannot_run": reason}


def check_priority(value: Any, where: str) -> None:
    """Refuse what is no priority.

    Raises:
        BadRequest: saying what to send.
    """
    if type(value) is not int or abs(value) > MOST_PRIORITY:
        raise _bad(
            f"{where} is {shown(value)}",
            f"send a whole number from {-MOST_PRIORITY} to {MOST_PRIORITY} (larger runs first)",
        )


def _not_waiting(front: Any, prompt_id: str) -> NotWaiting:
    running, _ = front.get_current_queue_volatile()
    if any(view_of(item).prompt_id == prompt_id for item in running):
        return NotWaiting(409, "already runs", "interrupt it and submit it again to have it run elsewhere")
    if prompt_id in front.history:
        return NotWaiting(409, "has ended", "submit it again")
    return NotWaiting(404, "is not known", "look for its prompt_id in GET /queue/all")


def _bad(message: str, details: str) -> BadRequest:
    return BadRequest("invalid_request", message, details)
