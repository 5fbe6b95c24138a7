"""Bodies that cannot be read: those that do not decompress, or end early. They are the client's fault, so 400."""

from __future__ import annotations

import asyncio
import functools
import gzip
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from comfy_parallel.errors import BadRequest
from comfy_parallel.http import replies

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A decompressor that is between two members of its stream, or at its end, takes one more.
_EMPTY_MEMBERS = {"gzip": gzip.compress(b""), "zstd": bytes.fromhex("28b52ffd2000010000")}


@web.middleware
async def refuse_unreadable(request: web.Request, handler: Handler) -> web.StreamResponse:
    """On every route, also of node packs: what reads a broken body gets nothing of it, and the client is told."""
    try:
        return await handler(request)
    except web.RequestPayloadError as error:
        _forget_body(request)
        reason = getattr(error.__cause__, "message", "") or str(error)
        encoding = request.headers.get("Content-Encoding")
        details = "send it as it is, or compressed as Content-Encoding says" if encoding else "send all of it"
        response = replies.refusal(BadRequest("invalid_request", f"the request body cannot be read: {reason}", details))
        response.force_close()  # What follows on this connection cannot be told from the rest of the body.
        return response


def _forget_body(request: web.Request) -> None:
    """Mark what is left of a broken body as read: aiohttp would read on and log the same error as one of its own."""
    content: Any = request.content
    content.set_exception(None)
    content.read_nowait()
    content.feed_eof()


def refusing_early_ends(feed_eof: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap aiohttp's `DeflateBuffer.feed_eof`, which takes a gzip stream that was cut off for a whole one.

    A handler would store or act on the first part. Its reading fails instead.
    """

    @functools.wraps(feed_eof)
    def checked_feed_eof(self: Any) -> None:
        if self.size > 0 and _is_of_request(self.out) and _ended_early(self.decompressor, self.encoding):
            _fail(self.out, web.RequestPayloadError(f"the {self.encoding} stream ends early"))
        else:
            feed_eof(self)

    return checked_feed_eof


def _fail(stream: Any, error: Exception) -> None:
    """Now, for who reads later; and once more for a reader that was woken by the last data and then waits again."""
    stream.set_exception(error)
    asyncio.get_running_loop().call_soon(lambda: stream.exception() is error and stream.set_exception(error))


def _is_of_request(stream: Any) -> bool:
    return isinstance(getattr(stream, "_protocol", None), web.RequestHandler)


def _ended_early(decompressor: Any, encoding: str) -> bool:
    """Whether a stream of which no more comes is incomplete. Uses the decompressor up."""
    inner: Any = getattr(decompressor, "_decompressor", None) or getattr(decompressor, "_obj", None)
    if inner is not None and hasattr(inner, "is_finished"):
        return not inner.is_finished()
    if inner is None or inner.eof:
        return False
    return encoding not in _EMPTY_MEMBERS or not _takes(inner, _EMPTY_MEMBERS[encoding])


def _takes(decompressor: Any, member: bytes) -> bool:
    try:
        decompressor.decompress(member)
    except Exception:  # noqa: BLE001 - each library has its own error; the stream is broken, whatever it is called.
        return False
    return bool(decompressor.eof)
