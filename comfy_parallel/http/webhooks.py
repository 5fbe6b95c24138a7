"""A signed POST for each job that has ended: to one address, or to the one that the job names."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from comfy_parallel.config import Webhooks
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest

logger = logging.getLogger(__name__)

FIELD = "webhook"  # of a job's extra_data
TIMESTAMP, SIGNATURE = "X-Comfy-Parallel-Timestamp", "X-Comfy-Parallel-Signature"
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further attempt
_TIMEOUT_S = 10.0
_MOST_AT_ONCE = 8
_MOST_PENDING = 1000
_RETRIED = frozenset((408, 425, 429))

_config = Webhooks()


def send(server: Any, front: Any, settings: Webhooks) -> None:
    """Tell of each job's end from now on, if there is a key to sign that with."""
    if settings.secret:
        use(settings)
        front.job_recorded = Sender(server.loop).job_ended


def use(config: Webhooks) -> None:
    """What the operator allows."""
    global _config
    _config = config


def check(extra_data: dict[str, Any]) -> None:
    """Refuse a job that names an address which is not allowed.

    Raises:
        BadRequest: with what the operator can do about it.
    """
    url = extra_data.get(FIELD)
    if url is None:
        return
    if not _config.hosts:
        raise _bad(
            f"extra_data.{FIELD} is set, but this server sends none",
            "leave it out, or have the operator set COMFY_PARALLEL_WEBHOOK_HOSTS",
        )
    if not isinstance(url, str) or not _is_allowed(url):
        raise _bad(
            f"extra_data.{FIELD} is {shown(url)}",
            f"send an http or https address of one of these hosts: {', '.join(_config.hosts)}",
        )


def _is_allowed(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        return False
    return parts.hostname in _config.hosts or f"{parts.hostname}:{port}" in _config.hosts


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """The signature of a body: HMAC with SHA-256 over `timestamp.body`, in hexadecimal, behind `sha256=`."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Sender:
    """Sends them from the server's event loop, so that no job waits for one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)

    def job_ended(self, entry: dict[str, Any], gpu_id: int) -> None:
        """Tell of a job whose history entry this is. Called on any thread; returns at once."""
        prompt_id, extra_data = entry["prompt"][1], entry["prompt"][3]
        url = extra_data.get(FIELD) if isinstance(extra_data, dict) else None
        url = url if isinstance(url, str) and _is_allowed(url) else _config.url
        if url is not None:
            status = entry.get("status") or {}
            told = {
                "prompt_id": prompt_id,
                "client_id": extra_data.get("client_id") if isinstance(extra_data, dict) else None,
                "gpu_id": gpu_id,
                "status": status.get("status_str"),
                "messages": [message for message in status.get("messages") or [] if message[0] in _TOLD],
                "outputs": entry.get("outputs", {}),
            }
            self._loop.call_soon_threadsafe(self._begin, url, prompt_id, json.dumps(told, default=str).encode())

    def _begin(self, url: str, prompt_id: str, body: bytes) -> None:
        if len(self._tasks) >= _MOST_PENDING:
            logger.error("webhook of job %s: not sent, for %d others wait to be sent", prompt_id, _MOST_PENDING)
            return
        task = self._loop.create_task(self._send(url, prompt_id, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, url: str, prompt_id: str, body: bytes) -> None:
        problem = ""
        for attempt, pause_s in enumerate((0.0, *PAUSES_S), 1):
            await asyncio.sleep(pause_s)
            async with self._places:
                is_final, problem = await _post(url, body)
            if is_final:
                break
            logger.warning("webhook of job %s: %s, attempt %d", prompt_id, problem, attempt)
        if problem:
            logger.error("webhook of job %s: given up: %s", prompt_id, problem)


_TOLD = frozenset(("execution_success", "execution_error", "execution_interrupted"))


async def _post(url: str, body: bytes) -> tuple[bool, str]:
    """Whether that was the last attempt, and what was wrong; nothing when it was received."""
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        TIMESTAMP: timestamp,
        SIGNATURE: sign(_config.secret, timestamp, body),
    }
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, data=body, headers=headers, allow_redirects=False) as reply,
        ):
            if 200 <= reply.status < 300:
                return True, ""
            is_final = reply.status < 500 and reply.status not in _RETRIED
            return is_final, f"answered with {reply.status}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return False, f"{type(error).__name__}: {error}"


def _bad(message: str, details: str) -> BadRequest:
    return BadRequest("invalid_request", message, details)
