"""The routes of ComfyUI-Distributed, and of its first version (`/multigpu/`), for programs that were written for them.

Where that pack is installed its own routes answer. What it needs to gather results from its workers (tiles, images,
heartbeats) has no route here: slots give theirs to the collector directly.
"""

from __future__ import annotations

import asyncio
import functools
import json
import platform
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from comfy_parallel.core.gpu_config import SETTINGS, GpuConfig
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest, ConfigError
from comfy_parallel.http import checks, distributed_jobs, replies
from comfy_parallel.http.bodies import Handler
from comfy_parallel.http.workers import known, lines_of, worker_json

Submit = Callable[[web.Request], Awaitable[web.StreamResponse]]
Change = Callable[[GpuConfig, dict[str, Any]], GpuConfig]
_SUCCESS = {"status": "success"}


def add_routes(server: Any, front: Any, submit: Submit) -> None:
    """Add them to the host's server; `submit` answers `POST /prompt`."""
    for method, path, handler in _routes(front, submit):
        server.routes.route(method, path)(_unless_taken(server, method, path, _refusing(handler)))


def _routes(front: Any, submit: Submit) -> list[tuple[str, str, Handler]]:
    clear = functools.partial(_clear_memory, front)
    found: list[tuple[str, str, Handler]] = []
    for family in ("/distributed", "/multigpu"):
        found += [
            ("GET", f"{family}/config", _config),
            ("POST", f"{family}/config/update_worker", _changing(_update_worker)),
            ("POST", f"{family}/config/update_setting", _changing(_update_setting)),
            ("POST", f"{family}/prepare_job", _prepare_job),
            ("POST", f"{family}/clear_memory", clear),
        ]
    return found + [
        ("POST", "/distributed/config", _changing(lambda config, data: config.with_all(data))),
        ("POST", "/distributed/config/delete_worker", _changing(_delete_worker)),
        ("POST", "/distributed/config/update_master", _changing(lambda config, data: config.with_master(data))),
        ("POST", "/distributed/queue", functools.partial(_queue, submit)),
        ("POST", "/distributed/launch_worker", _launch),
        ("POST", "/distributed/stop_worker", _stop),
        ("POST", "/distributed/worker/clear_launching", _clear_launching),
        ("GET", "/distributed/managed_workers", _managed_workers),
        ("GET", "/distributed/local-worker-status", _managed_workers),
        ("GET", "/distributed/worker_log/{worker_id}", _worker_log),
        ("GET", "/distributed/network_info", _network_info),
        ("GET", "/distributed/system_info", _system_info),
        *distributed_jobs.routes(),
    ]


def _unless_taken(server: Any, method: str, path: str, handler: Handler) -> Handler:
    """The handler, or that of a node pack which has the same route."""

    async def answer(request: web.Request) -> web.StreamResponse:
        for route in server.routes:
            if getattr(route, "path", None) == path and route.method == method and route.handler is not answer:
                return await route.handler(request)  # type: ignore[no-any-return]
        return await handler(request)

    return answer


def _refusing(handler: Handler) -> Handler:
    """The handler, whose BadRequest is the reply, with its message where the original's page looks for it."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except BadRequest as error:
            return replies.refusal(error, message=error.message)

    return answer


# Configuration.


async def _config(request: web.Request) -> web.Response:
    config = await asyncio.to_thread(known().read)
    settings = {name: default for name, (_, default) in SETTINGS.items()} | dict(config.settings)
    parts = {"master": config.master.json, "workers": [worker.json for worker in config.workers]}
    return web.json_response({**config.json, **parts, "settings": settings})


def _changing(change: Change) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        data = await _body(request)
        file = known().file
        try:
            await asyncio.to_thread(file.change, lambda config: change(config, data))
        except ConfigError as error:
            raise BadRequest("invalid_config", str(error), "nothing was changed") from error
        return web.json_response(_SUCCESS)

    return handler


def _update_worker(config: GpuConfig, data: dict[str, Any]) -> GpuConfig:
    """A worker that is not there is added; null takes a field away."""
    changes = {name: value for name, value in data.items() if name != "worker_id"}
    return config.with_worker(_worker_id(data), changes)


def _delete_worker(config: GpuConfig, data: dict[str, Any]) -> GpuConfig:
    worker_id = _worker_id(data)
    if config.worker(worker_id) is None:
        raise ConfigError(f"gpu_config.json: no worker has the id {shown(worker_id)}")
    return config.without_worker(worker_id)


def _update_setting(config: GpuConfig, data: dict[str, Any]) -> GpuConfig:
    name = data.get("key")
    if not isinstance(name, str) or "value" not in data:
        raise ConfigError("the request names no setting: send key and value")
    return config.with_setting(name, data["value"])


# Jobs.


async def _queue(submit: Submit, request: web.Request) -> web.StreamResponse:
    """Queue a workflow on as many participants as the request names workers, and one more."""
    data = await _body(request)
    workers = data.get("enabled_worker_ids", data.get("workers", []))
    if not isinstance(workers, list):
        raise BadRequest("invalid_request", f"enabled_worker_ids is {shown(workers)}", "send a list of workers' ids")
    workflow = data.get("workflow") if isinstance(data.get("workflow"), dict) else {}
    prompt = data.get("prompt", (workflow or {}).get("prompt"))
    shares = max(1, len(workers) + (0 if data.get("delegate_master") is True else 1))
    extra_data: dict[str, Any] = {"participants": shares, "extra_pnginfo": {"workflow": workflow}}
    body = {"prompt": prompt, "client_id": data.get("client_id"), "extra_data": extra_data}
    text = json.dumps({name: value for name, value in body.items() if value is not None})
    request._read_bytes = text.encode(request.charset or "utf-8")
    reply = await submit(request)
    if reply.status == 200 and isinstance(reply, web.Response) and isinstance(reply.body, bytes):
        told = {**json.loads(reply.body), "worker_count": len(workers), "auto_prepare_supported": True}
        return web.json_response(told)
    return reply


async def _prepare_job(request: web.Request) -> web.Response:
    """Nothing has to be prepared: a collector gathers what slots give it from the moment it runs."""
    data = await _body(request)
    if not isinstance(data.get("multi_job_id"), str):
        raise BadRequest("invalid_request", "multi_job_id is missing", "send it as a string")
    return web.json_response(_SUCCESS)


async def _clear_memory(front: Any, request: web.Request) -> web.Response:
    """Every slot, and every worker that was launched here, unloads its models."""
    for name in ("unload_models", "free_memory"):
        front.set_flag(name, True)
    await asyncio.to_thread(known().free_memory)
    return web.json_response(_SUCCESS)


# Workers.


async def _launch(request: web.Request) -> web.Response:
    return await _act(request, lambda workers, worker_id: workers.launch(worker_id))


async def _stop(request: web.Request) -> web.Response:
    return await _act(request, lambda workers, worker_id: workers.stop(worker_id))


async def _act(request: web.Request, act: Callable[[Any, str], Any]) -> web.Response:
    data = await _body(request)
    try:
        worker_id = str(_worker_id(data))
    except ConfigError as error:
        raise BadRequest("invalid_request", str(error), "send worker_id") from error
    workers = known()
    worker = await asyncio.to_thread(act, workers, worker_id)
    path, _ = await asyncio.to_thread(workers.log, worker_id, 1)
    told = worker_json(workers, worker)
    return web.json_response({**_SUCCESS, "pid": told["pid"], "log_file": path, "worker": told})


async def _clear_launching(request: web.Request) -> web.Response:
    """Whether a worker still starts is told by its state; a request cannot change it."""
    data = await _body(request)
    await asyncio.to_thread(known().worker, str(data.get("worker_id")))
    return web.json_response(_SUCCESS)


async def _managed_workers(request: web.Request) -> web.Response:
    workers = known()
    config = await asyncio.to_thread(workers.read)
    told = {worker.id: worker_json(workers, worker) for worker in config.workers if worker.is_local}
    for worker_id, one in told.items():
        one.update(running=workers.is_running(worker_id), launching=one["state"] == "starting")
    running = {worker_id: one for worker_id, one in told.items() if one["running"]}
    return web.json_response({**_SUCCESS, "managed_workers": running, "worker_statuses": told})


async def _worker_log(request: web.Request) -> web.Response:
    lines = lines_of(request)
    path, last = await asyncio.to_thread(known().log, request.match_info["worker_id"], lines)
    told = {"content": "\n".join(last), "log_file": path, "lines_shown": len(last)}
    return web.json_response({**_SUCCESS, **told})


# The machine.


async def _network_info(request: web.Request) -> web.Response:
    name = socket.gethostname()
    addresses = await asyncio.to_thread(_addresses, name)
    recommended = next((one for one in addresses if not one.startswith("127.")), None)
    return web.json_response({**_SUCCESS, "hostname": name, "all_ips": addresses, "recommended_ip": recommended})


def _addresses(name: str) -> list[str]:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:  # A machine need not know its own name.
        return []


async def _system_info(request: web.Request) -> web.Response:
    told = {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()}
    return web.json_response({**_SUCCESS, "hostname": socket.gethostname(), "platform": told})


async def _body(request: web.Request) -> dict[str, Any]:
    return checks.parse_object(await request.read(), charset=request.charset or "utf-8", may_be_empty=True)


def _worker_id(data: dict[str, Any]) -> str | int:
    worker_id = data.get("worker_id")
    if isinstance(worker_id, bool) or not isinstance(worker_id, str | int) or worker_id == "":
        raise ConfigError(f"worker_id is {shown(worker_id)}: send the id of a worker, a text or a number")
    return worker_id
