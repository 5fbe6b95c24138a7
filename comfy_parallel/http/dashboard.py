"""The dashboard at `/parallel/`: its files, its live data, and previews of running jobs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import logging
from pathlib import Path
from typing import Any

from aiohttp import web

from comfy_parallel.errors import BadRequest, TooManyReaders
from comfy_parallel.http import participants, replies
from comfy_parallel.http.feed import Feed
from comfy_parallel.http.overview import Weights, overview
from comfy_parallel.http.status import ModelsOf

logger = logging.getLogger(__name__)

FILES_DIR = Path(__file__).resolve().parents[1] / "ui" / "dashboard"
PREVIEW_PIXELS = 512
WRITE_TIMEOUT_S = 60.0
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_SAFE = {
    # The page is made of its own files only; nothing that a job is called can become code.
    # Nor may another site's page show it in a frame and have its buttons pressed.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_EVENT_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def add_routes(server: Any, front: Any, models_of: ModelsOf, weights: Weights) -> None:
    """Add them to the host's server, before it builds its routing table."""
    _add_files(server.routes)
    feed = Feed(functools.partial(overview, front, models_of, weights))
    _end_with(server.app, feed)
    _add_events(server.routes, feed)
    _add_previews(server.routes, front)
    participants.add_routes(server.routes)


def page_files() -> dict[str, Path]:
    """The page's files by the names that they are asked for with."""
    found = [path for path in FILES_DIR.rglob("*") if path.is_file() and path.suffix in _KINDS]
    return {path.relative_to(FILES_DIR).as_posix(): path for path in sorted(found)}


def _add_files(routes: web.RouteTableDef) -> None:
    files = page_files()

    @routes.get("/parallel")
    async def to_page(request: web.Request) -> web.Response:
        # Relative, for it may be reached under another path: /gpu0/parallel behind nginx.
        return web.Response(status=302, headers={"Location": "parallel/"})

    @routes.get("/parallel/")
    async def page(request: web.Request) -> web.StreamResponse:
        return _file(files["index.html"])

    @routes.get("/parallel/ui/{name:.+}")
    async def file(request: web.Request) -> web.StreamResponse:
        path = files.get(request.match_info["name"])
        return web.Response(status=404, text="no such file\n") if path is None else _file(path)


def _file(path: Path) -> web.FileResponse:
    return web.FileResponse(path, headers={**_SAFE, "Content-Type": f"{_KINDS[path.suffix]}; charset=utf-8"})


def _end_with(app: web.Application, feed: Feed) -> None:
    async def close(app: web.Application) -> None:
        feed.close()

    app.on_shutdown.append(close)


def _add_events(routes: web.RouteTableDef, feed: Feed) -> None:
    @routes.get("/parallel/events")
    async def events(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=_EVENT_HEADERS)
        try:
            async with contextlib.aclosing(feed.events()) as messages:
                async for message in messages:
                    if not response.prepared:
                        await response.prepare(request)
                    await asyncio.wait_for(response.write(message), WRITE_TIMEOUT_S)
        except TooManyReaders as error:
            return replies.refusal(error)
        except (ConnectionError, asyncio.TimeoutError):  # The reader went away, or reads no more.
            logger.debug("a reader of the events is gone: %s", request.remote)
        return response


def _add_previews(routes: web.RouteTableDef, front: Any) -> None:
    @routes.get("/parallel/preview/{gpu_id}")
    async def preview(request: web.Request) -> web.Response:
        try:
            picture = _picture(front, request.match_info["gpu_id"])
        except BadRequest as error:
            return replies.refusal(error)
        body = await asyncio.to_thread(_jpeg, *picture)
        return web.Response(body=body, content_type="image/jpeg", headers={"Cache-Control": "no-store"})


def _picture(front: Any, gpu_id: str) -> tuple[Any, int | None]:
    slots = {str(queue.slot.index): queue.slot for queue in front.slot_queues}
    if gpu_id not in slots:
        raise BadRequest("invalid_target_gpu", "no such slot", f"ask for one of: {', '.join(slots)}")
    run = slots[gpu_id].run
    picture: tuple[Any, int | None] | None = None if run is None else run.sight.image
    if picture is None:
        raise NoPreview(gpu_id)
    return picture


class NoPreview(BadRequest):
    """The slot runs no job that shows a preview."""

    status = 404

    def __init__(self, gpu_id: str) -> None:
        how = "previews come with ComfyUI's setting for them, or --preview-method auto"
        super().__init__("no_preview", f"slot {gpu_id} runs no job that shows a preview", how)


def _jpeg(image: Any, longest: int | None) -> bytes:
    """The picture, scaled up or down as its client would see it, to at most PREVIEW_PIXELS."""
    from PIL import ImageOps

    most = min(longest or max(image.size), PREVIEW_PIXELS)
    data = io.BytesIO()
    ImageOps.contain(image.convert("RGB"), (most, most)).save(data, "JPEG", quality=85)
    return data.getvalue()
