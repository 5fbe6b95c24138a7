"""The dashboard's own routes before a queue of any slots, without a host: for states that are hard to make there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from aiohttp import web

from comfy_parallel.http import dashboard, overview
from tests import fakes
from tests.ports import free_port

Parts = dict[str, Any]
NO_WEIGHTS = {"mode": "auto", "files": []}


class DashboardServer:
    """Shows slots on these devices; `change` may change what the page is told of them, `refuse` has all be refused."""

    def __init__(self, *devices: str) -> None:
        self.port = free_port()
        self.change: Callable[[Parts], Parts] = lambda parts: parts
        self.asked: list[str] = []
        self._refusal: tuple[int, Any] | None = None
        self._start(devices)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def refuse(self, status: int, error: Any = None) -> None:
        """Answer everything so, and end what is being answered; 200: as before."""
        self._refusal = None if status == 200 else (status, error)
        if self._refusal:
            self.restart(*self._devices)

    def restart(self, *devices: str) -> None:
        """End, and come back with these slots on the same port."""
        self.stop()
        self._start(devices)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(60)

    def _start(self, devices: tuple[str, ...]) -> None:
        self._devices, self._loop, self._ended = devices, asyncio.new_event_loop(), asyncio.Event()
        is_ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(is_ready)))
        self._thread.start()
        assert is_ready.wait(60)

    async def _serve(self, is_ready: threading.Event) -> None:
        front = fakes.make_front(*self._devices)
        server = SimpleNamespace(app=web.Application(middlewares=[self._answer]), routes=web.RouteTableDef())
        dashboard.add_routes(server, front, lambda slot: [], lambda: NO_WEIGHTS)
        server.app.add_routes(server.routes)
        runner = web.AppRunner(server.app, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        is_ready.set()
        await self._ended.wait()
        await runner.cleanup()

    def overview(self, *arguments: Any) -> Parts:
        """In the place of `dashboard.overview`."""
        return self.change(overview.overview(*arguments))

    @web.middleware
    async def _answer(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(request.path)
        if self._refusal is None:
            answer: web.StreamResponse = await handler(request)
            return answer
        status, error = self._refusal
        return web.json_response({"error": error}, status=status)
