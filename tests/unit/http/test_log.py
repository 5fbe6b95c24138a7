"""What is logged during a request is cut; what is logged otherwise is not."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from comfy_parallel.http.log import cut_in_requests, mark_request

LONG = "x" * 1_000_000 + "the end"
message_of = cut_in_requests(logging.LogRecord.getMessage)
traceback_of = cut_in_requests(logging.Formatter().formatException)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("name", logging.INFO, __file__, 1, "got %s", (text,), None)


def in_request(log: Callable[[], str]) -> str:
    """What `log` gives in a handler, in the task that aiohttp makes for a request."""

    async def handler(request: Any) -> Any:
        return log()

    async def run() -> Any:
        handled: Awaitable[Any] = mark_request(None, handler)  # type: ignore[arg-type]
        return await asyncio.create_task(handled)  # type: ignore[arg-type]

    text: str = asyncio.run(run())
    return text


def test_long_messages_of_a_request_keep_both_ends() -> None:
    text = in_request(lambda: message_of(record(LONG)))
    assert len(text) < 9000
    assert text.startswith("got xxx")
    assert text.endswith("the end")
    assert "more characters" in text


def test_short_messages_and_those_of_jobs_are_left_alone() -> None:
    assert in_request(lambda: message_of(record("short"))) == "got short"
    assert message_of(record(LONG)) == f"got {LONG}"


def test_tracebacks_are_cut_too() -> None:
    def failing() -> str:
        try:
            raise KeyError(LONG)
        except KeyError:
            return traceback_of(sys.exc_info())

    text = in_request(failing)
    assert len(text) < 9000
    assert text.startswith("Traceback")
    assert len(failing()) > len(LONG)
