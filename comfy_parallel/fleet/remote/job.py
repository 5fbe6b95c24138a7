"""One job on another ComfyUI: it is sent there, what it tells is told here, and what it saved is fetched."""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy_parallel.errors import CannotRunThere, JobLost, RemoteError
from comfy_parallel.fleet.remote import answering, asking, pictures
from comfy_parallel.fleet.remote.host import RemoteHost
from comfy_parallel.fleet.remote.outputs import Outputs
from comfy_parallel.fleet.remote.wire import Socket

logger = logging.getLogger(__name__)

GONE_S = 10.0  # A host that cannot be reached for so long has lost its job.
REFUSED_S = 2.0  # So has one of which the machine says for so long that it is not there.
_LOOK_S = 0.25
_ASK_AGAIN_S = 1.0
_SILENT_S = 5.0  # After so long without a word it is asked whether the job has ended: the word may have been lost.
_NOT_FOR_US = frozenset(("status", "feature_flags", "logs", "crystools.monitor"))
_MESSAGES = frozenset(
    ("execution_start", "execution_cached", "execution_success", "execution_error", "execution_interrupted")
)


@dataclass(frozen=True, slots=True)
class Order:
    """A job, as the host's executor was given it. `headers`: which slot there is to run it, if that is known there."""

    prompt_id: str
    prompt: dict[str, Any]
    extra_data: Mapping[str, Any]
    outputs: list[str]
    client_id: Any
    features: Any
    headers: Mapping[str, str]


class RemoteJob:
    """A job that is given to another ComfyUI. Everything but `interrupt` happens on that one's loop, in the job's slot.

    Args:
        executor: the host's, whose results these become.
        may_run_again: whether the job may be run once more when the other side is lost.
    """

    def __init__(self, host: RemoteHost, executor: Any, order: Order, *, may_run_again: bool) -> None:
        self._host, self._executor, self._server, self._order = host, executor, executor.server, order
        self._may_run_again = may_run_again
        self._id = str(uuid.uuid4())  # there; another one for each attempt
        self._client_id = uuid.uuid4().hex
        self._outputs = Outputs(host.wire, host.fetched)
        self._told: set[Any] = set()  # the messages, and the nodes whose results the client knows
        self._is_interrupted = self._is_removed = self._was_sent = False

    def interrupt(self) -> None:
        """End it there. Any thread may call this."""
        self._is_interrupted = True

    async def run(self) -> bool:
        """Run it there; whether it ended there. If not, it was interrupted before it began.

        Raises:
            CannotRunThere: as the other side has refused it.
            JobLost: as the other side cannot be reached any more, or does not know it any more.
        """
        try:
            prompt = await self._host.inputs.bring(self._order.prompt)
        except RemoteError as error:
            raise self._lost(f"an input could not be sent: {error}") from error
        if self._is_interrupted:
            return False
        asking = asyncio.get_running_loop().create_task(self._end_when_interrupted())
        try:
            entry = await self._follow(prompt)
            if entry is not None:
                await self._take_results(entry)
        except BaseException:
            if self._was_sent:
                self._host.abandon(self._id)
            raise
        finally:
            asking.cancel()
        return entry is not None

    async def _follow(self, prompt: dict[str, Any]) -> dict[str, Any] | None:
        """Its entry in the history there; None when it was taken out before it began."""
        while True:
            try:
                async with self._host.wire.socket(self._client_id, self._order.features) as socket:
                    if self._was_sent:
                        entry = await self._host.entry(self._id)  # It may have ended while there was no connection.
                        if entry is not None:
                            return entry
                    else:
                        await self._submit(socket, prompt)
                    await self._answer()  # Its word that it asks may have been lost.
                    if not await self._listen(socket):
                        return None
                    entry = await self._host.entry(self._id)
                    if entry is None:
                        raise self._lost("it does not know the result")
                    return entry
            except RemoteError as error:
                if not self._was_sent:
                    raise self._lost(str(error)) from error
                await self._rejoin(error)

    async def _submit(self, socket: Socket, prompt: dict[str, Any]) -> None:
        if self._order.features:
            await _await_features(socket)
        body = {
            "prompt": prompt,
            "prompt_id": self._id,
            "client_id": self._client_id,
            "extra_data": dict(self._order.extra_data),
            "partial_execution_targets": self._order.outputs,
        }
        try:
            self._was_sent = True
            reply = await self._host.wire.post("/prompt", body, self._order.headers)
        except RemoteError as error:
            self._was_sent = error.was_sent and error.status is None
            if error.status == 400:
                raise CannotRunThere(f"it refused the job: {_refusal(error.body)}") from error
            if error.status is not None:
                self._host.distrust(str(error))
            raise
        self._id = str(reply.get("prompt_id", self._id))
        if reply.get("node_errors"):  # It would leave out what we are to compute.
            raise CannotRunThere(f"it refused part of the job: {_refusal(json.dumps(reply))}")

    async def _rejoin(self, error: RemoteError) -> None:
        """Wait until the other side answers, and knows the job.

        Raises:
            JobLost: when it does not.
        """
        logger.warning("%s: the connection of job %s is lost: %s", self._name, self._order.prompt_id, error)
        began = time.monotonic()
        while True:
            try:
                if await self._host.knows(self._id):
                    return
                raise self._lost("it does not know the job any more, so it was started again")
            except RemoteError as again:
                if time.monotonic() - began > (REFUSED_S if again.is_refused else GONE_S):
                    raise self._lost(f"it cannot be reached: {again}") from again
                await asyncio.sleep(_LOOK_S)

    # What it tells.

    async def _listen(self, socket: Socket) -> bool:
        """Tell what comes until the job has ended; False when it was taken out before it began."""
        heard = time.monotonic()
        while True:
            message = await socket.receive(_LOOK_S)
            if self._is_removed:
                return False
            if isinstance(message, bytes):
                self._send_frame(message)
            elif message is not None and await self._hear(message):
                return True
            if message is not None:
                heard = time.monotonic()
            elif time.monotonic() - heard > _SILENT_S:
                await self._answer()
                if await self._host.entry(self._id) is not None:
                    return True
                heard = time.monotonic()

    async def _hear(self, text: str) -> bool:
        """Tell one event; whether it was the job's last."""
        try:
            event = json.loads(pictures.renamed(text, self._id, self._order.prompt_id))
            kind, data = event["type"], event["data"]
        except (ValueError, TypeError, LookupError):
            logger.warning("%s: an event of job %s is not understood", self._name, self._order.prompt_id)
            return False
        if kind in _NOT_FOR_US or not isinstance(data, dict):
            return False
        if data.get("prompt_id", self._order.prompt_id) != self._order.prompt_id:
            return False  # another job's, which this host may have besides
        if kind == asking.TOLD:
            await self._answer()
            return False
        if kind == "executing" and data.get("node") is None:
            return True
        await self._tell(kind, data)
        return False

    async def _answer(self) -> None:
        if self._order.extra_data.get(asking.ASKS):
            await answering.answer_all(self._host, self._id)

    async def _tell(self, kind: str, data: dict[str, Any]) -> None:
        if kind in _MESSAGES:
            if kind not in self._told:
                self._told.add(kind)
                data = {name: value for name, value in data.items() if name not in ("timestamp", "gpu_id")}
                self._executor.add_message(kind, data, broadcast=kind == "execution_interrupted")
            return
        if kind == "executed":
            self._told.add(("executed", str(data.get("node"))))
            data = {**data, "output": await self._outputs.bring(data.get("output"))}
        client_id = self._order.client_id
        if kind == "executing" and client_id is not None:
            self._server.last_node_id = data.get("display_node", data.get("node"))
        if client_id is not None or kind not in ("executing", "executed"):
            self._server.send_sync(kind, data, client_id)

    def _send_frame(self, frame: bytes) -> None:
        try:
            event, data = pictures.event_of(frame, self._id, self._order.prompt_id)
        except (ValueError, struct.error):
            logger.warning("%s: a preview of job %s is not understood", self._name, self._order.prompt_id)
            return
        self._server.send_sync(event, data, self._order.client_id)

    async def _take_results(self, entry: dict[str, Any]) -> None:
        """Have the host's executor tell what the history there tells."""
        status = entry.get("status") or {}
        outputs = await self._outputs.bring(_dict(entry.get("outputs")))
        for kind, data in status.get("messages") or ():
            if isinstance(data, dict) and kind in _MESSAGES:  # What came while there was no connection.
                text = pictures.renamed(json.dumps(data), self._id, self._order.prompt_id)
                await self._tell(kind, json.loads(text))
        self._executor.success = bool(status.get("completed"))
        self._executor.history_result = {"outputs": outputs, "meta": _dict(entry.get("meta"))}
        try:
            await self._host.wire.post("/history", {"delete": [self._id]})
        except RemoteError as error:
            logger.info("%s: its history keeps job %s: %s", self._name, self._id, error)

    async def _end_when_interrupted(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S if not self._is_interrupted else 0)
            if self._is_interrupted and self._was_sent:
                try:
                    self._is_removed = await self._host.cancel(self._id) or self._is_removed
                except RemoteError as error:
                    logger.info("%s: job %s is interrupted later: %s", self._name, self._order.prompt_id, error)
                await asyncio.sleep(_ASK_AGAIN_S)

    @property
    def _name(self) -> str:
        return self._host.remote.name

    def _lost(self, reason: str) -> JobLost:
        return JobLost(f"{self._name}: {reason}", has_begun=self._was_sent, may_run_again=self._may_run_again)


async def _await_features(socket: Socket) -> None:
    """Wait until the other side has heard what the client can take, which it answers; older ones do not."""
    until = time.monotonic() + _ASK_AGAIN_S
    while (left_s := until - time.monotonic()) > 0:
        message = await socket.receive(left_s)
        if isinstance(message, str) and '"feature_flags"' in message:
            return


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refusal(body: str) -> str:
    """What a reply of status 400 says, with what is wrong at which node."""
    try:
        told = json.loads(body)
        error = told.get("error") or {}
        parts = [str(error.get("message", error) if isinstance(error, dict) else error)] if error else []
        for node, errors in (told.get("node_errors") or {}).items():
            parts += [f"node {node}: {one.get('message')}: {one.get('details')}" for one in errors.get("errors", ())]
    except (ValueError, AttributeError, TypeError):
        return body[:500]
    return "; ".join(parts)[:500]
