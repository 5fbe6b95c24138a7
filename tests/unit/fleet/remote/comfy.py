"""The part of ComfyUI's protocol that a remote slot speaks, as a server that does what a test wants."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from typing import Any

from aiohttp import web


class Comfy:
    """Serves on a free port until `close`. `jobs`: what was sent to `/prompt`; a job ends when `end` is called."""

    def __init__(self, port: int = 0, token: str | None = None) -> None:
        self.token = token
        self.info: dict[str, Any] = {"Out": {"input": {"required": {"name": [["a", "b"], {}]}}}}
        self.jobs: list[dict[str, Any]] = []
        self.running: list[str] = []
        self.pending: list[str] = []
        self.history: dict[str, Any] = {}
        self.files: dict[tuple[str, str, str], bytes] = {("output", "", "x_00001_.png"): b"picture"}
        self.refusal: tuple[int, Any] | None = None
        self.node_errors: dict[str, Any] = {}
        self.all_queues: Any = None  # of a host with our package
        self.freed: list[Any] = []
        self.interrupted: list[str] = []
        self.says_features = True
        self.knows: set[str] = set()  # the clients of which is known what they can take
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(port), self._loop).result(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def tell(self, event: str, **data: Any) -> None:
        """Send an event of the first running job to its client."""
        message = json.dumps({"type": event, "data": {"prompt_id": self.running[0], **data}})
        self._send(lambda socket: socket.send_str(message))

    def show(self, kind: int, body: bytes) -> None:
        self._send(lambda socket: socket.send_bytes(struct.pack(">I", kind) + body))

    def end(self, outputs: Any = None, messages: Any = (), *, quietly: bool = False) -> None:
        """The running job ends; `quietly`: without telling its client."""
        job_id = self.running[0]
        status = {"status_str": "success", "completed": True, "messages": list(messages)}
        self.history[job_id] = {"outputs": outputs or {}, "status": status, "meta": {}}
        if not quietly:
            self.tell("executing", node=None)
        self.running.remove(job_id)

    def cut(self) -> None:
        """Close the connections of all clients."""
        self._do(self._cut())

    def close(self) -> None:
        """End it; once is enough."""
        if not self._thread.is_alive():
            return
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _send(self, send: Any) -> None:
        client = next(job["client_id"] for job in self.jobs if job["prompt_id"] == self.running[0])
        self._do(send(self._sockets[client]))

    async def _cut(self) -> None:
        for socket in list(self._sockets.values()):
            await socket.close()

    async def _start(self, port: int) -> int:
        app = web.Application(middlewares=[self._guard], client_max_size=1 << 26)
        app.add_routes(
            [
                web.get("/ws", self._ws),
                web.get("/object_info", self._of(lambda: self.info)),
                web.get(
                    "/system_stats", self._of(lambda: {"devices": [{"name": "card", "vram_total": 8, "vram_free": 4}]})
                ),
                web.get("/queue/all", self._queue_all),
                web.get("/queue", self._of(self._queue)),
                web.get("/history/{id}", self._entry),
                web.get("/view", self._view),
                web.get("/moved", self._moved),
                web.post("/prompt", self._prompt),
                web.post("/queue", self._delete),
                web.post("/interrupt", self._interrupt),
                web.post("/history", self._forget),
                web.post("/free", self._free),
                web.post("/upload/image", self._upload),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        bound: int = self._runner.addresses[0][1]
        return bound

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    @staticmethod
    def _of(value: Any) -> Any:
        async def handler(request: web.Request) -> web.Response:
            return web.json_response(value())

        return handler

    def _queue(self) -> Any:
        running, pending = ([[0, one, {}, {}, []] for one in ids] for ids in (self.running, self.pending))
        return {"queue_running": running, "queue_pending": pending}

    async def _ws(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._sockets[request.query["clientId"]] = socket
        await socket.send_json({"type": "status", "data": {"sid": request.query["clientId"]}})
        async for message in socket:
            if self.says_features and "feature_flags" in str(message.data):
                await asyncio.sleep(0.05)
                self.knows.add(request.query["clientId"])
                await socket.send_json({"type": "feature_flags", "data": {}})
        return socket

    async def _queue_all(self, request: web.Request) -> web.Response:
        return web.json_response(self.all_queues, status=404 if self.all_queues is None else 200)

    async def _entry(self, request: web.Request) -> web.Response:
        job_id = request.match_info["id"]
        return web.json_response({job_id: self.history[job_id]} if job_id in self.history else {})

    async def _view(self, request: web.Request) -> web.Response:
        place = request.query["type"], request.query["subfolder"], request.query["filename"]
        if place not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[place], headers={"ETag": f'"{hash(self.files[place])}"'})

    async def _moved(self, request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "http://elsewhere.invalid/"})

    async def _prompt(self, request: web.Request) -> web.Response:
        if self.refusal is not None:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        job = {**await request.json(), "headers": dict(request.headers)}
        job["knew_features"] = job["client_id"] in self.knows
        self.jobs.append(job)
        (self.pending if self.running else self.running).append(job["prompt_id"])
        return web.json_response({"prompt_id": job["prompt_id"], "number": 1, "node_errors": self.node_errors})

    async def _delete(self, request: web.Request) -> web.Response:
        for job_id in (await request.json())["delete"]:
            self.pending.remove(job_id)
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        self.interrupted.append((await request.json())["prompt_id"])
        return web.Response()

    async def _forget(self, request: web.Request) -> web.Response:
        for job_id in (await request.json())["delete"]:
            self.history.pop(job_id, None)
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        self.freed.append(await request.json())
        return web.Response()

    async def _upload(self, request: web.Request) -> web.Response:
        post = await request.post()
        image: Any = post["image"]
        place = str(post["type"]), str(post["subfolder"]), image.filename
        data = image.file.read()
        if self.files.get(place, data) != data:
            place = (*place[:2], f"other {image.filename}")
        self.files[place] = data
        return web.json_response({"name": place[2], "subfolder": place[1], "type": place[0]})
