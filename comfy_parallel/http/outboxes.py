"""Events go to each WebSocket client at its own pace: one that reads slowly, or not at all, keeps nobody waiting.

The host sends one message after the other, to one client after the other, and waits until each has taken it.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from comfy_parallel.core.backlog import Backlog, Limits, Waiting
from comfy_parallel.core.shown import clipped
from comfy_parallel.http import events

logger = logging.getLogger(__name__)

Send = Callable[[Callable[..., Awaitable[None]], Any], Awaitable[None]]

LIMITS = Limits()
_PREVIEWS = (1, 2, 4)  # of the host's BinaryEventTypes: previews, without and with metadata
_CLOSE_S = 5.0
_MOST = 100  # characters of a client's name in the log


class Outbox:
    """What waits for one client, and the task that sends it, which exists only while something waits."""

    def __init__(self, socket: web.WebSocketResponse, send: Send) -> None:
        self._socket, self._send = weakref.ref(socket), send  # It is gone when the host lets go of it.
        self._backlog = Backlog(LIMITS)
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._is_closed = False

    def put(self, function: Callable[..., Awaitable[None]], message: Any, size: int, *, may_go: bool) -> None:
        """Have `function(message)` awaited, after all that was put before."""
        if self._is_closed:
            return
        self._backlog.put(Waiting((function, message), size, may_go))
        if self._backlog.is_over:
            self._give_up()
        elif self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(self._socket()))

    async def _work(self, socket: web.WebSocketResponse | None) -> None:
        try:
            while len(self._backlog):
                await self._send(*self._backlog.take())
        except Exception as error:  # noqa: BLE001 - the host knows some kinds and logs them; none may end the server
            logger.error("client %s cannot be sent to: %r", client_name(socket), error)
            self._backlog.clear()
        finally:
            self._task = None
            self._tell_dropped(socket)

    def _give_up(self) -> None:
        socket = self._socket()
        logger.warning(
            "client %s takes its events too slowly: %d wait, of %d bytes; its connection is closed. It can connect"
            " again, and ask /history for what it missed",
            client_name(socket),
            len(self._backlog),
            self._backlog.size_bytes,
        )
        self._is_closed = True
        self._backlog.clear()
        if self._task is not None:
            self._task.cancel()
        if socket is not None:
            self._closing = asyncio.get_running_loop().create_task(_close(socket))

    def _tell_dropped(self, socket: web.WebSocketResponse | None) -> None:
        if self._backlog.num_dropped:
            logger.info(
                "client %s takes its events slowly: it missed %d previews",
                client_name(socket),
                self._backlog.num_dropped,
            )
            self._backlog.num_dropped = 0


async def _close(socket: web.WebSocketResponse) -> None:
    transport = socket._req.transport if socket._req is not None else None
    try:
        await asyncio.wait_for(socket.close(code=1013, message=b"events are taken too slowly"), _CLOSE_S)
    except (TimeoutError, asyncio.TimeoutError, OSError, RuntimeError) as error:
        logger.debug("client %s was not told that it is closed: %r", client_name(socket), error)
    if transport is not None:
        transport.abort()


_outboxes: weakref.WeakKeyDictionary[web.WebSocketResponse, Outbox] = weakref.WeakKeyDictionary()


def sender(original: Send) -> Send:
    """What the host calls instead of waiting for a client: it returns at once."""

    async def send(function: Callable[..., Awaitable[None]], message: Any) -> None:
        socket = getattr(function, "__self__", None)
        if not isinstance(socket, web.WebSocketResponse):  # A node pack's own object.
            await original(function, message)
            return
        outbox = _outboxes.get(socket)
        if outbox is None:
            outbox = _outboxes[socket] = Outbox(socket, original)
        if isinstance(message, dict):
            text = events.text_of(message)
            if text is not None:
                outbox.put(socket.send_str, text, len(text), may_go=False)
        else:
            outbox.put(function, message, len(message), may_go=_is_preview(message))

    return send


def _is_preview(message: bytes | bytearray) -> bool:
    return len(message) >= 4 and struct.unpack_from(">I", message)[0] in _PREVIEWS


def client_name(socket: web.WebSocketResponse | None) -> str:
    """The id that a client gave itself, or its address; for the log."""
    request = None if socket is None else socket._req
    if request is None:
        return "(gone)"
    return clipped(request.rel_url.query.get("clientId") or f"at {request.remote}", _MOST)
