"""A compressed stream that was cut off is told from a whole one."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import http_parser, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader

from comfy_parallel.http.bodies import refusing_early_ends

TEXT = bytes(range(256)) * 40
MEMBERS = gzip.compress(TEXT[:5000]) + gzip.compress(TEXT[5000:])
COMPRESSED = {"gzip": gzip.compress(TEXT), "deflate": zlib.compress(TEXT), "two members": MEMBERS}
end = refusing_early_ends(http_parser.DeflateBuffer.feed_eof)


def read(name: str, body: bytes, make_protocol: Callable[[], Any], pieces: int = 1) -> bytes:
    """What a handler gets of a body that comes in so many pieces."""

    async def receive() -> bytes:
        stream = StreamReader(make_protocol(), 1 << 20, loop=asyncio.get_running_loop())
        buffer = http_parser.DeflateBuffer(stream, "deflate" if name == "deflate" else "gzip")
        step = -(-len(body) // pieces)
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            while buffer.feed_data(piece, len(piece)):
                piece = b""
        end(buffer)
        return await asyncio.wait_for(stream.read(), 60)

    return asyncio.run(receive())


def of_request() -> Any:
    return web.RequestHandler(web.Server(lambda request: None), loop=asyncio.get_running_loop())  # type: ignore[arg-type, return-value]


def of_response() -> Any:
    return BaseProtocol(asyncio.get_running_loop())


@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_whole_stream_is_read(name: str, pieces: int) -> None:
    assert read(name, COMPRESSED[name], of_request, pieces) == TEXT


@pytest.mark.parametrize("missing", [1, 4, 7, 8, 9, 20, 60])
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_stream_that_was_cut_off_cannot_be_read(name: str, missing: int) -> None:
    for pieces in (1, 2, 7):
        with pytest.raises(web.RequestPayloadError, match="ends early"):
            read(name, COMPRESSED[name][:-missing], of_request, pieces)


def test_what_the_process_downloads_is_left_to_aiohttp() -> None:
    assert read("gzip", COMPRESSED["gzip"][:-8], of_response) == TEXT
