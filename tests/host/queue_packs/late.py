"""As `on_object`, but only once a request asks for it."""

from aiohttp import web

from .seen import NODE_CLASS_MAPPINGS, SERVER, wrap_object

__all__ = ["NODE_CLASS_MAPPINGS"]


@SERVER.routes.post("/pack/wrap")
async def wrap_now(request: web.Request) -> web.Response:
    wrap_object(SERVER.prompt_queue)
    return web.json_response({})
