"""Another ComfyUI: whether it can be reached, what it has, and what it was sent. It has a thread with an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from comfy_parallel.core.ability import Ability
from comfy_parallel.core.remotes import Remote
from comfy_parallel.errors import RemoteError
from comfy_parallel.fleet.remote.inputs import Inputs
from comfy_parallel.fleet.remote.outputs import Fetched
from comfy_parallel.fleet.remote.wire import LONG_S, Socket, Wire
from comfy_parallel.slots.slot import entered

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECTING, READY, UNREACHABLE = "connecting", "ready", "unreachable"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_LOOK_S = 10.0  # how often its memory is asked for
_READ_AGAIN_S = 60.0  # how often what it has is read again while jobs cannot run there


class Values(Protocol):
    """Another way for values than the routes of a ComfyUI. A future may end with a `RemoteError`."""

    def fetch(self, path: str) -> Future[Any]:
        """The bytes there."""

    def bring(self, path: str, value: bytes) -> Future[Any]:
        """Put these bytes there."""


class RemoteHost:
    """Watches the ComfyUI at an address.

    Args:
        changed: called when other jobs than before may run there.
    """

    def __init__(self, remote: Remote, changed: Callable[[], None]) -> None:
        self.remote, self._changed = remote, changed
        self.wire = Wire(remote)
        self.inputs = Inputs(
            self.wire, lambda kind, name: self.ability is not None and self.ability.is_choice(kind, name)
        )
        self.fetched = Fetched()
        self.ability: Ability | None = None
        self.numbers: tuple[int, ...] = ()  # of the slots that it has itself, if it has our package
        self.takes_shares = False  # It has our package, and asks for what its part of a job needs.
        self.reports: list[dict[str, Any]] = []  # one for each of its devices
        self.state = CONNECTING
        self.problem: str | None = None
        self.returns = 0  # how often it could be reached again
        self.is_lacking = False  # A job could not run there since what it has was read.
        self.ready = threading.Event()
        self.values: Values | None = None  # how tensors come from there and go there, if not by its own routes
        self._is_connected = False
        self._has_address = asyncio.Event()
        self._watching: Future[None] | None = None
        self._abandoned: set[str] = set()  # ids there of jobs that nobody waits for any more
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=remote.name)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have something done on the loop, in the calling slot."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def contact(self) -> Future[None]:
        """Ask for the first time what it has."""
        with entered(None):
            return self.run(self._read())

    def watch(self) -> None:
        """Keep looking whether it can be reached; returns at once."""
        with entered(None):
            self._watching = self.run(self._watch())

    def move(self, remote: Remote) -> None:
        """It was started, and has this address from now on. Any thread may call this."""
        with entered(None):
            self.run(self._move(remote))

    def lose(self, reason: str) -> None:
        """It has ended, and will have another address. Any thread may call this."""
        with entered(None):
            self.run(self._lose(reason))

    async def _move(self, remote: Remote) -> None:
        self.remote, self.fetched = remote, Fetched()
        self.inputs.forget()
        await self.wire.move(remote)
        self._has_address.set()

    async def _lose(self, reason: str) -> None:
        self._has_address.clear()
        self._note_gone(reason)
        await self.wire.close()

    def stop(self) -> None:
        """Look no more, and close the connections."""
        if self._watching is not None:
            self._watching.cancel()
        self.run(self.wire.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def distrust(self, reason: str) -> None:
        """It refuses jobs for now: give it none for a while."""
        self._note_gone(reason)
        self._loop.call_later(_LONGEST_PAUSE_S, self._trust)

    def abandon(self, job_id: str) -> None:
        """End a job there, now or when it can be reached again."""
        self._abandoned.add(job_id)
        with entered(None):
            self.run(self._cancel_abandoned())

    async def fetch(self, path: str) -> bytes:
        """The bytes that are there under a path, by the way that values take. Raises RemoteError."""
        if self.values is None:
            return await self.wire.fetch(path)
        found: bytes = await asyncio.wrap_future(self.values.fetch(path))
        return found

    async def bring(self, path: str, value: bytes) -> None:
        """Put these bytes there. Raises RemoteError."""
        if self.values is None:
            await self.wire.bring(path, value)
        else:
            await asyncio.wrap_future(self.values.bring(path, value))

    async def cancel(self, job_id: str) -> bool:
        """End a job there, whether it runs or waits; whether it had not begun.

        An older host interrupts whatever runs, so it is asked first whether that is the job.

        Raises:
            RemoteError: when that cannot be done.
        """
        running, waiting = await self._queue()
        if job_id in waiting:
            await self.wire.post("/queue", {"delete": [job_id]})
            return job_id not in (await self._queue())[0]
        if job_id in running:
            await self.wire.post("/interrupt", {"prompt_id": job_id})
        return False

    async def knows(self, job_id: str) -> bool:
        """Whether a job waits, runs or has ended there.

        Raises:
            RemoteError: when that cannot be told.
        """
        running, waiting = await self._queue()
        return job_id in running or job_id in waiting or await self.entry(job_id) is not None

    async def entry(self, job_id: str) -> dict[str, Any] | None:
        """The history's entry of a job; None when it has not ended.

        Raises:
            RemoteError: when that cannot be told.
        """
        found = await self.wire.get(f"/history/{job_id}")
        entry = found.get(job_id) if isinstance(found, dict) else None
        return entry if isinstance(entry, dict) else None

    async def _queue(self) -> tuple[list[Any], list[Any]]:
        told = await self.wire.get("/queue")
        try:
            return [item[1] for item in told["queue_running"]], [item[1] for item in told["queue_pending"]]
        except (TypeError, LookupError) as error:
            raise RemoteError("GET /queue: this is no reply of ComfyUI's") from error

    # Watching.

    async def _watch(self) -> None:
        pause_s = _FIRST_PAUSE_S
        if self.remote.url:
            self._has_address.set()
        while True:
            try:
                if not self._has_address.is_set():
                    await self._has_address.wait()
                    pause_s = _FIRST_PAUSE_S
                await self._read()
                async with self.wire.socket(uuid.uuid4().hex) as socket:
                    self._is_connected = True
                    self._note_ready()
                    pause_s = _FIRST_PAUSE_S
                    await self._listen(socket)
            except RemoteError as error:
                self._note_gone(str(error))
            except Exception as error:  # Whatever it replies, the watching goes on.
                logger.exception("%s: what it says is not understood", self.remote.name)
                self._note_gone(f"{type(error).__name__}: {error}")
            self._is_connected = False
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _listen(self, socket: Socket) -> None:
        """Returns never; how the connection ends is raised."""
        now = self._loop.time
        looked_at = read_at = now()
        while True:
            await socket.receive(_LOOK_S)
            if now() - looked_at >= _LOOK_S:
                looked_at = now()
                await self._look()
            if self.is_lacking and now() - read_at >= _READ_AGAIN_S:
                read_at = now()
                await self._read()

    async def _read(self) -> None:
        """Ask what it has.

        Raises:
            RemoteError: when it cannot be asked, or is no ComfyUI.
        """
        object_info = await self.wire.get("/object_info", LONG_S)
        if not isinstance(object_info, dict) or not object_info:
            raise RemoteError("GET /object_info: this is no reply of ComfyUI's")
        await self._look()
        self.is_lacking = False
        ability = Ability(object_info)
        if ability != self.ability:
            self.ability = ability
            self._changed()

    async def _look(self) -> None:
        """Ask for its devices, by our package if it has that."""
        try:
            told = await self.wire.get("/queue/all")
        except RemoteError as error:
            if error.status != 404:
                raise
        else:
            own = [queue for queue in told["queues"] if queue.get("kind") != "remote"]
            self.takes_shares = told.get("takes_shares") is True
            self.numbers = tuple(queue["gpu_id"] for queue in own)
            self.reports = [_report(queue.get("device_name"), queue.get("vram"), queue.get("models")) for queue in own]
            return
        stats = await self.wire.get("/system_stats")
        devices = stats.get("devices") if isinstance(stats, dict) else None
        self.numbers, self.takes_shares = (), False
        self.reports = [
            _report(one.get("name"), {"total_bytes": one.get("vram_total"), "free_bytes": one.get("vram_free")})
            for one in (devices or [])[:1]  # It uses one, whatever others it sees.
        ]

    def _trust(self) -> None:
        if self._is_connected:
            self._note_ready()

    def _note_ready(self) -> None:
        if self.state == UNREACHABLE:
            self.returns += 1
            logger.info("%s (%s) can be reached again", self.remote.name, self.remote.url)
        self.state = READY
        self.ready.set()
        self.run(self._cancel_abandoned())

    def _note_gone(self, reason: str) -> None:
        if self.state != UNREACHABLE or self.problem != reason:
            logger.warning("%s (%s) cannot be reached: %s", self.remote.name, self.remote.url, reason)
        self.state, self.problem = UNREACHABLE, reason
        self.ready.clear()
        self.inputs.forget()

    async def _cancel_abandoned(self) -> None:
        for job_id in list(self._abandoned):
            try:
                await self.cancel(job_id)
            except RemoteError as error:
                logger.info("%s: job %s there is ended later: %s", self.remote.name, job_id, error)
                return
            self._abandoned.discard(job_id)


def _report(name: Any, memory: Any, models: Any = None) -> dict[str, Any]:
    """What is shown of a device there."""
    known = memory if isinstance(memory, dict) else {}
    sizes = {kind: size for kind, size in known.items() if type(size) is int}
    return {"device_name": name, "memory": sizes or None, "graphs": None, "models": models or []}
