"""The workers that `gpu_config.json` names: shown, launched, stopped, their logs (`/parallel/workers`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from aiohttp import web

from comfy_parallel.core.gpu_config import Worker
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest
from comfy_parallel.fleet import local_workers
from comfy_parallel.fleet.local_workers import LocalWorkers
from comfy_parallel.http import replies
from comfy_parallel.http.bodies import Handler

MOST_LINES = 5000


class NoWorkers(BadRequest):
    """This server was told to know of no workers."""

    status = 404

    def __init__(self) -> None:
        how = "start it without COMFY_PARALLEL_GPU_CONFIG=off"
        super().__init__("no_workers", "this server knows of no workers", how)


def known() -> LocalWorkers:
    """The server's workers. Raises BadRequest where it is to have none."""
    workers = local_workers.current()
    if workers is None:
        raise NoWorkers
    return workers


def add_routes(routes: web.RouteTableDef) -> None:
    """Add them to the host's, before it builds its routing table."""

    @routes.get("/parallel/workers")
    @refusing
    async def workers(request: web.Request) -> web.Response:
        found = known()
        config = await asyncio.to_thread(found.read)
        listed = [worker_json(found, worker) for worker in config.workers]
        return web.json_response({"file": str(found.file.path), "workers": listed})

    for action in (launch, stop, restart):
        routes.post(f"/parallel/workers/{{id}}/{action.__name__}")(_acting(action))

    @routes.get("/parallel/workers/{id}/log")
    @refusing
    async def log(request: web.Request) -> web.Response:
        lines = lines_of(request)
        path, last = await asyncio.to_thread(known().log, request.match_info["id"], lines)
        return web.json_response({"file": path, "lines": last})


def worker_json(workers: LocalWorkers, worker: Worker) -> dict[str, Any]:
    """A worker as replies show it."""
    return {
        "id": worker.id,
        "name": worker.name,
        "type": worker.type,
        "url": worker.url,
        "cuda_device": worker.cuda_device,
        "enabled": worker.enabled,
        **workers.state(worker),
    }


def launch(workers: LocalWorkers, worker_id: str) -> Worker:
    """Have it run."""
    return workers.launch(worker_id)


def stop(workers: LocalWorkers, worker_id: str) -> Worker:
    """Have it not run."""
    return workers.stop(worker_id)


def restart(workers: LocalWorkers, worker_id: str) -> Worker:
    """Have it run anew."""
    workers.stop(worker_id)
    return workers.launch(worker_id)


def _acting(act: Callable[[LocalWorkers, str], Worker]) -> Handler:
    @refusing
    async def handler(request: web.Request) -> web.Response:
        workers = known()
        worker = await asyncio.to_thread(act, workers, request.match_info["id"])
        return web.json_response({"worker": worker_json(workers, worker)})

    return handler


def lines_of(request: web.Request) -> int:
    """How many lines of a log a request asks for. Raises BadRequest."""
    text = request.query.get("lines", "300")
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MOST_LINES:
        raise BadRequest("invalid_request", f"lines={shown(text)}", f"ask for 1 to {MOST_LINES} lines")
    return int(text)


def refusing(handler: Handler) -> Handler:
    """The handler, whose BadRequest is the reply."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadRequest as error:
            return replies.refusal(error)

    return answer
