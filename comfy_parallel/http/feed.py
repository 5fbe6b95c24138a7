"""The server's state for those who watch it: looked up only while somebody does, and at most twice a second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from comfy_parallel.errors import TooManyReaders

PAUSE_S = 0.5
ALIVE_S = 15.0  # A reader that is told nothing for so long is told that: what lies between would close the connection.
MAX_READERS = 100
_SHARE = 20  # Looking may take one part in so many of the time.
_LONGEST_PAUSE_S = 10.0
_ALIVE = b": nothing new\n\n"


class Feed:
    """What changes, as server-sent events: a `snapshot` of all parts, then a `change` with those that are new.

    Each reader is told at its own pace what differs from what it was told last, so a slow one skips states and holds
    up nobody.

    Args:
        look: returns the parts; called in a thread, because a device may take long to answer.
    """

    def __init__(self, look: Callable[[], Mapping[str, Any]]) -> None:
        self._look = look
        self._parts: dict[str, str] = {}
        self._looked_at = float("-inf")
        self._cost_s = 0.0
        self._lock = asyncio.Lock()
        self._closed = asyncio.Event()
        self.readers = 0

    def close(self) -> None:
        """End the events of all readers."""
        self._closed.set()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """What one reader is told.

        Raises:
            TooManyReaders: when enough are there already.
        """
        if self.readers >= MAX_READERS:
            raise TooManyReaders(MAX_READERS)
        self.readers += 1
        try:
            async with contextlib.aclosing(self._messages()) as messages:
                async for message in messages:
                    yield message
        finally:
            self.readers -= 1

    async def _messages(self) -> AsyncGenerator[bytes, None]:
        known: dict[str, str] = {}
        told_at = 0.0
        while not self._closed.is_set():
            parts = await self._latest()
            changed = {name: text for name, text in parts.items() if known.get(name) != text}
            if changed:
                yield _message("change" if known else "snapshot", changed)
                known, told_at = parts, time.monotonic()
            elif time.monotonic() - told_at > ALIVE_S:
                yield _ALIVE
                told_at = time.monotonic()
            await self._rest()

    async def _rest(self) -> None:
        try:
            await asyncio.wait_for(self._closed.wait(), self._pause_s)
        except asyncio.TimeoutError:
            return

    @property
    def _pause_s(self) -> float:
        return min(max(PAUSE_S, self._cost_s * _SHARE), _LONGEST_PAUSE_S)

    async def _latest(self) -> dict[str, str]:
        """The parts as JSON, the same for all who ask within a pause."""
        async with self._lock:
            begin = time.monotonic()
            if begin - self._looked_at >= self._pause_s * 0.9:
                self._parts = await asyncio.to_thread(self._encoded)
                self._looked_at = time.monotonic()
                self._cost_s = self._looked_at - begin
            return self._parts

    def _encoded(self) -> dict[str, str]:
        return {name: json.dumps(part, default=str) for name, part in self._look().items()}


def _message(event: str, parts: Mapping[str, str]) -> bytes:
    body = ", ".join(f"{json.dumps(name)}: {text}" for name, text in parts.items())
    return f'event: {event}\ndata: {{"clock": {time.monotonic():.3f}, "parts": {{{body}}}}}\n\n'.encode()
