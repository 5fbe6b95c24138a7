"""A client that does not read holds up nobody; what is too much for it closes its connection."""

from __future__ import annotations

import asyncio
import gc
import struct
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from comfy_parallel.core.backlog import Limits
from comfy_parallel.http import outboxes

pytestmark = pytest.mark.timeout(120)


class Socket(web.WebSocketResponse):
    """Takes a message only while its gate is open."""

    __slots__ = ()
    kept: dict[int, dict[str, Any]] = {}

    @property
    def own(self) -> dict[str, Any]:
        return self.kept.setdefault(id(self), {"gate": asyncio.Event(), "got": [], "closed": []})

    async def send_str(self, data: str, compress: int | None = None) -> None:
        await self.own["gate"].wait()
        self.own["got"].append(data)

    async def send_bytes(self, data: Any, compress: int | None = None) -> None:
        await self.own["gate"].wait()
        self.own["got"].append(bytes(data))

    async def close(self, *, code: int = 1000, message: bytes = b"", drain: bool = True) -> bool:
        self.own["closed"].append((code, message))
        return True


@pytest.fixture(autouse=True)
def _forget() -> None:
    Socket.kept.clear()


async def settle() -> None:
    """Let all tasks go on as far as they can; a time might be over before a busy machine has got there."""
    for _ in range(200):
        await asyncio.sleep(0)


async def as_host(function: Callable[..., Awaitable[None]], message: Any) -> None:
    await function(message)


def preview(number: int) -> bytes:
    return struct.pack(">I", 1) + bytes([number])


def test_one_that_does_not_read_keeps_nobody_waiting() -> None:
    async def main() -> tuple[list[Any], list[Any]]:
        send, slow, quick = outboxes.sender(as_host), Socket(), Socket()
        quick.own["gate"].set()
        for number in range(3):
            for socket in (slow, quick):
                await asyncio.wait_for(send(socket.send_json, {"type": "n", "data": number}), 60)
                await asyncio.wait_for(send(socket.send_bytes, preview(number)), 60)
        await settle()
        first = list(quick.own["got"]), list(slow.own["got"])
        slow.own["gate"].set()
        await settle()
        assert slow.own["got"] == quick.own["got"]
        return first

    quick, slow = asyncio.run(main())
    assert slow == []
    assert quick[:2] == ['{"type": "n", "data": 0}', preview(0)]
    assert len(quick) == 6


def test_too_many_previews_are_dropped_and_too_many_texts_close(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outboxes, "LIMITS", Limits(messages=10))

    async def main() -> Socket:
        send, slow = outboxes.sender(as_host), Socket()
        for number in range(100):
            await send(slow.send_bytes, preview(number))
        assert slow.own["closed"] == []
        for number in range(100):
            await send(slow.send_json, {"type": "n", "data": number})
        await settle()
        return slow

    closed = asyncio.run(main()).own["closed"]
    assert closed == [(1013, b"events are taken too slowly")]
    assert caplog.text.count("takes its events too slowly") == 1


def test_an_error_of_one_client_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def failing(function: Callable[..., Awaitable[None]], message: Any) -> None:
        raise RuntimeError("as libraries do")

    async def main() -> None:
        send, socket = outboxes.sender(failing), Socket()
        await send(socket.send_json, {"type": "n", "data": 1})
        await settle()
        await send(socket.send_json, {"type": "n", "data": 2})
        await settle()

    asyncio.run(main())
    assert caplog.text.count("as libraries do") == 2


def test_a_client_that_is_gone_is_not_kept() -> None:
    async def main() -> None:
        send, socket = outboxes.sender(as_host), Socket()
        socket.own["gate"].set()
        await send(socket.send_json, {"type": "n", "data": 1})
        await settle()
        seen = weakref.ref(socket)
        Socket.kept.clear()
        del socket
        await asyncio.sleep(0)
        gc.collect()
        assert seen() is None

    asyncio.run(main())


def test_what_is_no_websocket_is_left_to_the_host() -> None:
    got: list[Any] = []

    async def own(message: Any) -> None:
        got.append(message)

    asyncio.run(outboxes.sender(as_host)(own, {"type": "n"}))  # type: ignore[arg-type]
    assert got == [{"type": "n"}]
