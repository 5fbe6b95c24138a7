"""Which slots take part in jobs that are shared out: of all jobs by a route, of one by its `extra_data`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from comfy_parallel.core.fan_out import MOST_PARTICIPANTS
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest
from comfy_parallel.http import checks, replies
from comfy_parallel.http.targets import chosen_slots
from comfy_parallel.slots.slot import participating, slots

_FIELD = "participants"


def check(extra_data: dict[str, Any]) -> None:
    """Check what a job says of its participants: how many shares, or which slots.

    Raises:
        BadRequest: when it is neither.
    """
    asked = extra_data.get(_FIELD)
    if asked is None or (type(asked) is int and 1 <= asked <= MOST_PARTICIPANTS):
        return
    count = len(slots())
    if isinstance(asked, list) and asked and all(type(one) is int and 0 <= one < count for one in asked):
        return
    raise BadRequest(
        "invalid_request",
        f"extra_data.{_FIELD} is {shown(asked)}",
        f"send a number from 1 to {MOST_PARTICIPANTS}, or a list of slots from 0 to {count - 1}, or leave it out",
    )


def add_routes(routes: web.RouteTableDef) -> None:
    """`GET` and `POST /parallel/participants`."""

    @routes.get("/parallel/participants")
    async def told(request: web.Request) -> web.Response:
        return web.json_response({"gpu_ids": participating()})

    @routes.post("/parallel/participants")
    async def choose(request: web.Request) -> web.Response:
        try:
            body = await request.read()
            data = checks.parse_object(body, charset=request.charset or "utf-8", may_be_empty=True)
            chosen = chosen_slots(data, None)
        except BadRequest as error:
            return replies.refusal(error)
        for slot in slots():
            slot.takes_part = slot.index in chosen
        return web.json_response({"gpu_ids": participating()})
