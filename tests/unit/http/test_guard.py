"""A ComfyUI with a secret answers only who knows it."""

from __future__ import annotations

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from comfy_parallel.http.guard import only_with


async def hello(request: web.Request) -> web.Response:
    return web.Response(text="hello")


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Bearer other"}, 401), ({"Authorization": "secret"}, 401),
     ({"Authorization": "Bearer secret"}, 200)],
)  # fmt: skip
async def test_a_request_needs_the_secret(headers: dict[str, str], status: int) -> None:
    app = web.Application(middlewares=[only_with("secret")])
    app.router.add_get("/", hello)
    async with TestClient(TestServer(app)) as client:
        assert (await client.get("/", headers=headers)).status == status
        assert (await client.get("/none", headers=headers)).status == (401 if status == 401 else 404)
