"""The routes that we add to the host's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from comfy_parallel.errors import BadRequest
from comfy_parallel.host import facts
from comfy_parallel.http import (
    checks,
    dashboard,
    distributed,
    jobs,
    preload,
    probes,
    questions,
    replies,
    status,
    templates,
    workers,
)
from comfy_parallel.http.targets import chosen_slots, header_target
from comfy_parallel.weights import report


def add_routes(server: Any, front: Any, models_of: status.ModelsOf, submit: distributed.Submit) -> None:
    """Add them to the host's server, before it builds its routing table. `submit` answers `POST /prompt`."""
    routes = server.routes
    _add_status(routes, front, models_of)
    _add_preload(routes, front)
    _add_metrics(routes, front)
    _add_probes(routes, front)
    _add_closing(routes, front)
    dashboard.add_routes(server, front, models_of, lambda: report.weights_json(facts.weight_name))
    workers.add_routes(routes)
    questions.add_routes(routes)
    templates.add_routes(routes)
    distributed.add_routes(server, front, submit)
    jobs.add_route(routes, front)


def _add_status(routes: web.RouteTableDef, front: Any, models_of: status.ModelsOf) -> None:
    @routes.get("/queue/all")
    async def queue_all(request: web.Request) -> web.Response:
        return web.Response(text=status.queue_all_json(front, models_of), content_type="application/json")

    @routes.get("/debug/queues")
    async def debug_queues(request: web.Request) -> web.Response:
        return web.json_response(status.debug_queues(front))

    @routes.get("/parallel/weights")
    async def weights(request: web.Request) -> web.Response:
        told = report.weights_json(facts.weight_name)
        return web.json_response(told | await asyncio.to_thread(report.processes_json))


def _add_preload(routes: web.RouteTableDef, front: Any) -> None:
    @routes.post("/parallel/preload")
    async def preload_files(request: web.Request) -> web.Response:
        try:
            data = checks.parse_object(await request.read(), charset=request.charset or "utf-8")
            files, gpu_ids = preload.check_request(data, header_target(request))
            prompt = preload.make_prompt(files, facts.weight_files)
            jobs = preload.submit(front.server, front, prompt, gpu_ids)
        except BadRequest as error:
            return replies.refusal(error)
        return web.json_response({"jobs": jobs})


def _add_metrics(routes: web.RouteTableDef, front: Any) -> None:
    @routes.get("/metrics")
    async def prometheus(request: web.Request) -> web.Response:
        try:
            from comfy_parallel.http import metrics
        except ModuleNotFoundError as error:
            return web.Response(status=501, text=f"{error}; run: pip install prometheus-client\n")
        return web.Response(body=metrics.exposition(front), headers={"Content-Type": metrics.CONTENT_TYPE})


def _add_probes(routes: web.RouteTableDef, front: Any) -> None:
    @routes.get("/health")
    async def health(request: web.Request) -> web.Response:
        await front.ledger.tried()
        return web.json_response({"slots": probes.slots_health(front), "queue": probes.queue_health(front)})

    @routes.get("/ready")
    async def ready(request: web.Request) -> web.Response:
        await front.ledger.tried()
        reason = probes.why_not_ready(front)
        if reason is None:
            return web.json_response({"ready": True, "reason": None, **probes.degraded(front)})
        headers = {"Retry-After": str(probes.RETRY_AFTER_S)}
        return web.json_response({"ready": False, "reason": reason}, status=503, headers=headers)


def _add_closing(routes: web.RouteTableDef, front: Any) -> None:
    for action in (front.closing.pause, front.closing.resume, front.closing.drain):
        routes.post(f"/parallel/{action.__name__}")(_on_slots(front, action))


def _on_slots(front: Any, act: Callable[[list[int]], None]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler that does this to the slots which the request names, and replies how they are then."""

    async def handler(request: web.Request) -> web.Response:
        try:
            body = await request.read()
            data = checks.parse_object(body, charset=request.charset or "utf-8", may_be_empty=True)
            gpu_ids = chosen_slots(data, header_target(request))
            act(gpu_ids)
        except BadRequest as error:
            return replies.refusal(error)
        return web.json_response({"slots": [probes.slot_state(front, gpu_id) for gpu_id in gpu_ids]})

    return handler
