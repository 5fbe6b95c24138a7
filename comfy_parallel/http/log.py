"""What is logged while a request is handled, also by the host: cut, for clients choose names and ids."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from aiohttp import web

from comfy_parallel.core.shown import clipped_in_the_middle

_MOST = 8000  # characters of a message or of a traceback
_handles_request: ContextVar[bool] = ContextVar("comfy_parallel_handles_request", default=False)


@web.middleware
async def mark_request(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Not taken back: aiohttp handles each request in a task of its own, and logs its errors there at the end."""
    _handles_request.set(True)
    return await handler(request)


def cut_in_requests(make_text: Callable[..., str]) -> Callable[..., str]:
    """Wrap one of `logging`'s functions that make a record's text."""

    @functools.wraps(make_text)
    def make_cut_text(*args: Any, **kwargs: Any) -> str:
        text = make_text(*args, **kwargs)
        if len(text) <= _MOST or not _handles_request.get():
            return text
        return clipped_in_the_middle(text, _MOST)

    return make_cut_text
