"""Loses a slot's device: what is asked of it fails from then on, as of a GPU that is gone."""

from __future__ import annotations

from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.post("/test/lose/{slot}")
async def lose(request: web.Request) -> web.Response:
    """Rename the slot's device to one that this machine has not, so that torch's own calls fail."""
    from comfy_parallel.slots.slot import slots

    slots()[int(request.match_info["slot"])].device = "cuda:99"
    return web.Response()
