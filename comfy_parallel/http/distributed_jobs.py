"""The routes by which the original's workers take work and hand it over, and by which it compares files.

Here slots hand over their shares themselves, so that no job waits for what a worker sends. That is what these answer.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest
from comfy_parallel.host import facts
from comfy_parallel.host.files import named_file
from comfy_parallel.http import checks
from comfy_parallel.http.bodies import Handler
from comfy_parallel.http.workers import known, lines_of

_REMOTE_S = 10.0


class NoSuchJob(BadRequest):
    """No job waits for what a worker of the original sends."""

    status = 404

    def __init__(self, job_id: str) -> None:
        how = "name that worker in COMFY_PARALLEL_REMOTE, or in gpu_config.json, and its slots take part"
        super().__init__("no_such_job", f"no job here waits for workers' results under the id {job_id}", how)


class Unreachable(BadRequest):
    """A worker on another machine does not answer."""

    status = 502

    def __init__(self, worker_id: str, reason: str) -> None:
        super().__init__("unreachable", f"worker {worker_id} does not answer: {reason}", "see whether it runs there")


class NoTunnels(BadRequest):
    """This server starts no tunnels."""

    status = 501

    def __init__(self) -> None:
        how = "start cloudflared beside ComfyUI, or set a guarded proxy up: comfy-parallel caddy"
        super().__init__("no_tunnels", "this server starts no tunnels", how)


def routes() -> list[tuple[str, str, Handler]]:
    """Method, path and handler of each."""
    waiting = ("heartbeat", "submit_tiles", "submit_image", "request_image")
    return [
        *(("POST", f"/distributed/{name}", _not_waiting("multi_job_id")) for name in waiting),
        ("POST", "/distributed/job_complete", _not_waiting("job_id")),
        ("POST", "/multigpu/job_complete", _not_waiting("multi_job_id")),
        ("GET", "/distributed/queue_status/{job_id}", _queue_status),
        ("GET", "/distributed/job_status", _job_status),
        ("POST", "/distributed/check_file", _check_file),
        ("POST", "/distributed/load_image", _load_image),
        ("GET", "/distributed/local_log", _local_log),
        ("GET", "/distributed/remote_worker_log/{worker_id}", _remote_log),
        ("GET", "/distributed/tunnel/status", _tunnel_status),
        ("POST", "/distributed/tunnel/start", _no_tunnel),
        ("POST", "/distributed/tunnel/stop", _tunnel_status),
    ]


def _not_waiting(id_field: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        data = await _fields(request)
        for name in (id_field, "worker_id"):
            if not isinstance(data.get(name), str) or not data[name].strip():
                raise BadRequest("invalid_request", f"{name} is {shown(data.get(name))}", "send it as a string")
        raise NoSuchJob(shown(data[id_field]))

    return handler


async def _fields(request: web.Request) -> Mapping[str, Any]:
    """The fields of a body, which is JSON or a form."""
    if request.content_type.startswith("multipart/") or request.content_type.endswith("form-urlencoded"):
        try:
            return await request.post()
        except ValueError as error:
            raise BadRequest("invalid_request", f"the form cannot be read: {error}", "send a whole form") from error
    return checks.parse_object(await request.read(), charset=request.charset or "utf-8")


async def _queue_status(request: web.Request) -> web.Response:
    return web.json_response({"exists": False, "job_id": request.match_info["job_id"]})


async def _job_status(request: web.Request) -> web.Response:
    return web.json_response({"ready": False})


# Files.


async def _check_file(request: web.Request) -> web.Response:
    data = checks.parse_object(await request.read(), charset=request.charset or "utf-8")
    path, expected = _path(data.get("filename"), "filename"), data.get("hash")
    if not isinstance(expected, str) or not expected:
        raise BadRequest("invalid_request", f"hash is {shown(expected)}", "send the file's MD5 as hexadecimal digits")
    if path is None:
        return web.json_response({"status": "success", "exists": False})
    found = await asyncio.to_thread(_md5, path)
    return web.json_response({"status": "success", "exists": True, "hash_matches": found == expected.lower()})


async def _load_image(request: web.Request) -> web.Response:
    data = checks.parse_object(await request.read(), charset=request.charset or "utf-8")
    path = _path(data.get("image_path"), "image_path")
    if path is None:
        raise NoSuchFile(shown(data["image_path"]))
    try:
        told, digest = await asyncio.to_thread(lambda: (_data_url(path), _md5(path)))
    except OSError as error:
        raise BadRequest("invalid_request", f"the file is no image: {error}", "name an image or a video") from error
    return web.json_response({"status": "success", "image_data": told, "hash": digest})


class NoSuchFile(BadRequest):
    """ComfyUI's folders have no such file."""

    status = 404

    def __init__(self, name: str) -> None:
        super().__init__("no_such_file", f"there is no file {name}", "name a file of ComfyUI's input folder")


def _path(name: Any, field: str) -> Path | None:
    """The file of the host's folders that is named; None when it is not there."""
    if not isinstance(name, str) or not name:
        raise BadRequest("invalid_request", f"{field} is {shown(name)}", "send the name of a file")
    found = named_file(name)
    return None if found is None else found.path


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)  # the original's
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _data_url(path: Path) -> str:
    """A video as it is, an image as PNG."""
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind.startswith("video/"):
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    from PIL import Image

    written = io.BytesIO()
    with Image.open(path) as image:
        (image if image.mode in ("RGB", "RGBA") else image.convert("RGB")).save(written, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


# The server.


async def _local_log(request: web.Request) -> web.Response:
    lines = facts.log_lines()
    last = lines[-lines_of(request) :]
    told = {"content": "".join(last), "entries": len(last), "source": "memory", "truncated": len(last) < len(lines)}
    return web.json_response({"status": "success", **told, "lines_shown": len(last)})


async def _remote_log(request: web.Request) -> web.Response:
    """What a worker on another machine says of its own log."""
    lines, workers = lines_of(request), known()
    worker = await asyncio.to_thread(workers.worker, request.match_info["worker_id"])
    if worker.is_local:
        raise BadRequest("is_local", f"worker {worker.id} is on this machine", "ask for /distributed/worker_log")
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_REMOTE_S)) as session,
            session.get(f"{worker.url}/distributed/local_log", params={"lines": str(lines)}) as reply,
        ):
            reply.raise_for_status()
            return web.json_response(await reply.json())
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        raise Unreachable(worker.id, str(error) or type(error).__name__) from error


async def _tunnel_status(request: web.Request) -> web.Response:
    tunnel = {"status": "stopped", "public_url": None, "pid": None, "log_file": None}
    return web.json_response({"status": "success", "tunnel": tunnel, "master_host": None})


async def _no_tunnel(request: web.Request) -> web.Response:
    raise NoTunnels
