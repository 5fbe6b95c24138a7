"""Replies: refusals in the host's shape, and what we add to replies of the host."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web

from comfy_parallel.core.shown import clipped
from comfy_parallel.errors import BadRequest

logger = logging.getLogger(__name__)

_MOST = 2000  # characters of a sentence in a reply


def refusal(error: BadRequest, **besides: Any) -> web.Response:
    """The reply for a request that cannot be acted on, 400 unless the error says otherwise; the reason is logged.

    `besides`: more fields of it.
    """
    message, details = clipped(error.message, _MOST), clipped(error.details, _MOST)
    logger.warning("request refused: %s; %s", message, details)
    reason = {"type": error.type, "message": message, "details": details, "extra_info": {}}
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return web.json_response({"error": reason, "node_errors": {}, **besides}, status=error.status, headers=headers)


def complete(response: web.StreamResponse, add: Callable[[bytes], bytes], *, status: int = 200) -> None:
    """Put `add(body)` in the place of the host's reply, if it has this status and a body."""
    if response.status == status and isinstance(response, web.Response) and isinstance(response.body, bytes):
        response.body = add(response.body)


def with_gpu_id(gpu_id: int | None, reply: bytes) -> bytes:
    """Add a submitted job's slot to the JSON object as text: this is on the way of every job."""
    if b'"prompt_id"' not in reply:
        return reply
    return b'%b, "gpu_id": %b}' % (reply.rstrip()[:-1], b"null" if gpu_id is None else b"%d" % gpu_id)


def as_repeated(job: Any, reply: bytes) -> bytes:
    """The reply to a request whose job is there already: that job's, with `repeated`."""
    data = json.loads(reply)
    data.update(prompt_id=job.prompt_id, number=job.number, gpu_id=job.gpu_id, repeated=True)
    return json.dumps(data).encode()


def add_gpu_ids(front: Any, reply: bytes) -> bytes:
    """The newer hosts' job list: say of each job which slot runs or ran it."""
    data = json.loads(reply)
    jobs = [job for job in data.get("jobs", [data]) if isinstance(job, dict) and "id" in job]
    gpu_ids = front.gpu_ids([job["id"] for job in jobs])
    for job in jobs:
        job["gpu_id"] = gpu_ids[job["id"]]
    return json.dumps(data).encode()


def shortened(reply: bytes) -> bytes:
    """A refusal of the host's with its long texts cut: it repeats names and values that the client sent."""
    if len(reply) <= _MOST:
        return reply
    try:
        return json.dumps(_shortened(json.loads(reply))).encode()
    except ValueError:  # no JSON
        return reply


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return clipped(value, _MOST)
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, dict):
        return {clipped(key, _MOST): _shortened(item) for key, item in value.items()}
    return value
