"""Requests to another ComfyUI. Everything here belongs to one event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from comfy_parallel.core.remotes import Remote
from comfy_parallel.core.shown import clipped
from comfy_parallel.errors import RemoteError

_CONNECT_S = 5.0
_QUICK_S = 20.0
LONG_S = 120.0  # for what a busy host may take long to put together
_HEARTBEAT_S = 15.0  # A host that does not answer a ping within half of it is taken for gone, until it answers.
_QUIET_S = 60.0  # without a byte of a file that is sent or fetched
_CHUNK = 1 << 20
_MOST = 500  # characters of a reply in a reason


class Wire:
    """The way to one ComfyUI. Redirects are not followed: they would take the password elsewhere.

    Every method raises `RemoteError` for what does not work out.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, timeout_s: float = _QUICK_S) -> Any:
        """The JSON of a reply."""
        async with self._request("GET", path, timeout_s=timeout_s) as reply:
            return await _json(reply)

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Any:
        """Send JSON; the reply's JSON, None when it is empty."""
        async with self._request("POST", path, json=body, headers=headers, timeout_s=LONG_S) as reply:
            return await _json(reply)

    async def fetch(self, path: str) -> bytes:
        """The bytes of a reply."""
        async with self._request("GET", path, timeout_s=None) as reply:
            with _translated():
                return await reply.read()

    async def bring(self, path: str, value: bytes) -> None:
        """Put these bytes there."""
        headers = {"Content-Type": "application/octet-stream"}
        async with self._request("PUT", path, data=value, headers=headers, timeout_s=None):
            return

    async def upload(self, path: Path, kind: str, subfolder: str, name: str) -> dict[str, Any]:
        """Send a file, under another name if there is another one of its name; what became of it."""
        with path.open("rb") as file:
            form = aiohttp.FormData({"type": kind, "subfolder": subfolder}, quote_fields=False)  # Else ü is %C3%BC.
            form.add_field("image", file, filename=name, content_type="application/octet-stream")
            async with self._request("POST", "/upload/image", data=form, timeout_s=None) as reply:
                told = await _json(reply)
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            raise RemoteError("it did not say what became of an uploaded file")
        return told

    async def tag(self, kind: str, subfolder: str, name: str) -> str | None:
        """What changes when a file there does; None when it is not there, or that is not told."""
        try:
            async with self._request("HEAD", "/view", params=_place(kind, subfolder, name)) as reply:
                return reply.headers.get("ETag")
        except RemoteError as error:
            if error.status is None:
                raise
            return None

    @asynccontextmanager
    async def file(self, kind: str, subfolder: str, name: str) -> AsyncIterator[RemoteFile]:
        """A file there."""
        async with self._request("GET", "/view", params=_place(kind, subfolder, name), timeout_s=None) as reply:
            yield RemoteFile(reply)

    @asynccontextmanager
    async def socket(self, client_id: str, features: Any = None) -> AsyncIterator[Socket]:
        """A WebSocket of a client. `features`: what it says that it can take, if anything."""
        with _translated():
            connecting = self._open().ws_connect(
                f"{self._remote.url}/ws",
                params={"clientId": client_id},
                heartbeat=_HEARTBEAT_S,
                max_msg_size=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=2.0),
            )
            socket = await asyncio.wait_for(connecting, _QUICK_S)
        try:
            with _translated():
                if features:
                    await socket.send_json({"type": "feature_flags", "data": features})
            yield Socket(socket)
        finally:
            await socket.close()

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def move(self, remote: Remote) -> None:
        """It has another address from now on."""
        self._remote = remote
        await self.close()

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, *, timeout_s: float | None = _QUICK_S, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        quiet_s = None if timeout_s else _QUIET_S
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S, sock_read=quiet_s)
        url = self._remote.url + path
        with _translated():
            reply = await self._open().request(method, url, timeout=timeout, allow_redirects=False, **options)
        try:
            if reply.status != 200:
                with _translated():
                    text = await reply.text(errors="replace")
                raise _refusal(method, path, reply.status, text)
            yield reply
        finally:
            reply.release()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            wanted = self._remote.authorization
            headers = {} if wanted is None else {"Authorization": wanted}
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(headers=headers, connector=connector)
        return self._session


class RemoteFile:
    """A file that is being fetched."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self._reply = reply

    @property
    def tag(self) -> str | None:
        return self._reply.headers.get("ETag")

    async def write_to(self, write: Callable[[bytes], object]) -> None:
        """Fetch all of it."""
        while True:
            with _translated():
                chunk = await self._reply.content.read(_CHUNK)
            if not chunk:
                return
            write(chunk)


class Socket:
    """An open WebSocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def receive(self, timeout_s: float | None = None) -> str | bytes | None:
        """The next message; None after `timeout_s`.

        Raises:
            RemoteError: when the other side has closed it, or is gone.
        """
        try:
            message = await self._socket.receive(timeout_s)
        except asyncio.TimeoutError:
            return None
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            data: str | bytes = message.data
            return data
        if message.type is aiohttp.WSMsgType.ERROR:
            raise _unreachable(message.data)
        raise RemoteError("it closed the connection")


def _place(kind: str, subfolder: str, name: str) -> dict[str, str]:
    return {"filename": name, "subfolder": subfolder, "type": kind}


def _refusal(method: str, path: str, status: int, text: str) -> RemoteError:
    if status in (401, 403):
        hint = "; set COMFY_PARALLEL_REMOTE_TOKEN, or write its user and password into its address"
        return RemoteError(f"{method} {path} answered {status}{hint}", status=status)
    return RemoteError(f"{method} {path} answered {status}: {clipped(text, _MOST)}", status=status, body=text)


async def _json(reply: aiohttp.ClientResponse) -> Any:
    with _translated():
        text = await reply.text()
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise RemoteError(f"{reply.method} {reply.url.path}: the reply is no JSON") from error


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise _unreachable(error) from error


def _unreachable(error: BaseException | None) -> RemoteError:
    """aiohttp's texts name the address without a password, which is sent as a header."""
    text = clipped(str(error) or type(error).__name__, _MOST)
    if not isinstance(error, aiohttp.ClientConnectorError):
        return RemoteError(text)
    return RemoteError(text, was_sent=False, is_refused=isinstance(error.os_error, ConnectionRefusedError))
