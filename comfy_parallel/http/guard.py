"""Answers only who knows the secret that this ComfyUI was started with."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web

from comfy_parallel.http.bodies import Handler


def only_with(secret: str) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """A middleware that refuses requests without `Authorization: Bearer` and the secret."""
    expected = f"Bearer {secret}".encode()

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, expected):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return guarded
