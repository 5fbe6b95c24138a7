"""`/parallel/questions/{prompt_id}`: what a job here asks of the server that sent it, which answers."""

from __future__ import annotations

from aiohttp import web

from comfy_parallel.errors import BadRequest
from comfy_parallel.fleet.remote import asking
from comfy_parallel.http import replies

_CHUNK = 1 << 20
_MOST = 8 << 30  # bytes of an answer


def add_routes(routes: web.RouteTableDef) -> None:
    """Add them."""

    @routes.get("/parallel/questions/{prompt_id}")
    async def question(request: web.Request) -> web.Response:
        waiting = asking.question(request.match_info["prompt_id"])
        return web.Response(body=waiting, content_type="application/octet-stream")

    @routes.put("/parallel/questions/{prompt_id}")
    async def answer(request: web.Request) -> web.Response:
        try:
            number = int(request.query.get("number", ""))
        except ValueError:
            details = "send the number of the question that is answered"
            return replies.refusal(BadRequest("invalid_request", "number is missing", details))
        value = bytearray()
        async for chunk in request.content.iter_chunked(_CHUNK):  # The host's limit is for uploads.
            value += chunk
            if len(value) > _MOST:
                return replies.refusal(
                    BadRequest("too_large", "the answer is too large", f"send at most {_MOST} bytes")
                )
        is_taken = asking.answer(request.match_info["prompt_id"], number, bytes(value))
        return web.json_response({"is_taken": is_taken})
