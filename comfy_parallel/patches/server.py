"""Patches on the host's `server`: per-slot client attributes, and our middlewares and routes."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

from comfy_parallel.core.scope import current_scope
from comfy_parallel.core.shown import clipped, shown
from comfy_parallel.http import events, middleware, outboxes
from comfy_parallel.patching.engine import Addition, Patch
from comfy_parallel.slots import pool
from comfy_parallel.slots.items import error_text
from comfy_parallel.slots.slot import Slot, SlotLocal, current_slot, slots

logger = logging.getLogger(__name__)

_MOST = 300  # characters of a reason in the log
_OF_FAILURES = ("execution_error", "execution_interrupted")  # A job cannot fail of telling that it has failed.
_ENDS = frozenset(("execution_success", "execution_error", "execution_interrupted"))
_HAND_OVER_S = 50e-6  # The event loop tells the client now, not when this thread next lets go of the interpreter.


class SlotAttribute:
    """An attribute that every slot has its own of. Outside slots it reads as what was written last, as in the host."""

    def __init__(self, start: Callable[[], Any] = lambda: None) -> None:
        self._value: SlotLocal[Any] = SlotLocal(start)
        self._last: Any = start()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if current_slot() is not None:
            return self._value.get()
        viewed = current_scope().viewed_slots
        return self._value.of(slots()[viewed[0]]) if viewed else self._last

    def __set__(self, instance: Any, value: Any) -> None:
        self._last = value
        self._value.set(value)

    def of(self, slot: Slot) -> Any:
        """What this slot's jobs have written last."""
        return self._value.of(slot)


_LAST_NODE = SlotAttribute()


def _init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, loop: Any, *args: Any, **kwargs: Any) -> None:
        original(self, loop, *args, **kwargs)
        _senders[:] = _senders_of(type(self))
        pool.server_made(self)

    return __init__


def _add_routes(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_routes(self: Any, *args: Any, **kwargs: Any) -> None:
        pool.packs_loaded(self)
        original(self, *args, **kwargs)

    return add_routes


def _trigger_on_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def trigger_on_prompt(self: Any, json_data: Any, *args: Any, **kwargs: Any) -> Any:
        middleware.check_prompt(json_data)
        return original(self, json_data, *args, **kwargs)

    return trigger_on_prompt


def _send_sync(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def send_sync(self: Any, event: Any, data: Any, sid: Any = None, *args: Any, **kwargs: Any) -> None:
        if event == "status" and not self.sockets:
            return  # Sent for every job that is queued or ends; a client that connects is told the state anyway.
        slot = current_slot()
        run = None if slot is None else slot.run
        if run is not None:
            run.sight.note(event, data)
            run.alive_at = time.monotonic()
        if run is not None and run.share is not None:
            data = run.share.told(event, data, slot.index)
            if data is None:
                return
        elif slot is not None and isinstance(data, dict) and "prompt_id" in data:
            data = {**data, "gpu_id": slot.index}
        if slot is not None and isinstance(data, dict):
            data = _as_json(self, event, data, sid)
        send = functools.partial(_deliver, original, self, event, data, sid, *args, **kwargs)
        if event in _ENDS and run is not None and _is_of(data, run.prompt_id):
            run.at_end.append(send)  # Who hears that a job has ended may look into the history at once.
            return
        is_heard = send()
        if is_heard and slot is not None and event == "execution_start":
            time.sleep(_HAND_OVER_S)

    return send_sync


def _deliver(
    original: Callable[..., None], server: Any, event: Any, data: Any, sid: Any, *args: Any, **kwargs: Any
) -> bool:
    """Have the event loop send this, if there is somebody who may hear it; whether there is."""
    is_heard = _is_heard(server, sid) or not _sends_as_made(server)
    if is_heard:
        original(server, event, data, sid, *args, **kwargs)
    return is_heard


def _is_heard(server: Any, sid: Any) -> bool:
    return bool(server.sockets) if sid is None else sid in server.sockets


_SENDERS = ("publish_loop", "send", "send_json", "send_bytes", "send_image", "send_image_with_metadata")
_senders: list[Any] = []  # the server's class, and these as the host and our patches have made them


def _senders_of(kind: type) -> list[Any]:
    return [kind, *(getattr(kind, name, None) for name in _SENDERS)]


def _sends_as_made(server: Any) -> bool:
    """Whether no node pack has put something in the place of a method that sends, to hear of all events."""
    return vars(server).keys().isdisjoint(_SENDERS) and _senders_of(type(server)) == _senders


def _is_of(data: Any, prompt_id: Any) -> bool:
    return isinstance(data, dict) and data.get("prompt_id") == prompt_id


def _as_json(server: Any, event: Any, data: dict[Any, Any], sid: Any) -> dict[Any, Any]:
    return events.encoded(event, data) if _is_heard(server, sid) and event not in _OF_FAILURES else data


def _send(original: Callable[..., Any]) -> Callable[..., Any]:
    """The host tells a client that connects which node runs in one job of its; we tell it of the others.

    What cannot be sent is said in the log: in the host it ends the loop that sends all events, and so the process.
    """

    @functools.wraps(original)
    async def send(self: Any, event: Any, data: Any, sid: Any = None, *args: Any, **kwargs: Any) -> None:
        try:
            await original(self, event, data, sid, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a node has put into it
            logger.error("the event %s cannot be sent: %s", shown(event), clipped(error_text(error), _MOST))
        viewed = current_scope().viewed_slots
        if viewed and event == "status" and isinstance(data, dict) and "sid" in data:
            for index in viewed[1:]:
                if (told := _running_node(index, sid)) is not None:
                    await original(self, "executing", told, sid)

    return send


def _running_node(index: int, sid: Any) -> dict[str, Any] | None:
    """The node that a slot runs for this client, as the host tells it."""
    slot = slots()[index]
    run, node = slot.run, _LAST_NODE.of(slot)
    if run is None or run.client_id != sid or node is None:
        return None
    return {"node": node, "prompt_id": run.prompt_id, "gpu_id": index}


def _send_preview(original: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    async def send_preview(self: Any, *args: Any, **kwargs: Any) -> None:
        sid = (dict(zip(names, args, strict=False)) | kwargs).get("sid")
        if sid in self.sockets or (sid is None and self.sockets):
            await original(self, *args, **kwargs)

    return send_preview


PATCHES: tuple[Patch, ...] = (
    Patch(
        target="server:send_socket_catch_exception",
        wrap=outboxes.sender,
        params=("function", "message"),
        spare=True,
        feature="a pace of its own for each client",
        why="A client that reads slowly must not keep the others waiting.",
        until="the host sends to each client on its own",
    ),
    *(
        Addition(
            target=f"server:PromptServer.{name}",
            wrap=lambda nothing, attribute=attribute: attribute,
            why="Progress and results of a job must reach its own client.",
            until="the host passes the client with the job",
            hazards=hazards,
        )
        for name, attribute, hazards in (
            ("client_id", SlotAttribute(), (1, 3)),
            ("last_node_id", _LAST_NODE, (2, 3)),
            ("last_prompt_id", SlotAttribute(), (2,)),
        )
    ),
    Addition(
        target="server:PromptServer.workflow_metadata",
        wrap=lambda nothing: SlotAttribute(dict),
        why="What a job's messages carry for its client must be that job's.",
        until="the host passes it with the job",
    ),
    Patch(
        target="server:PromptServer.__init__",
        wrap=_init,
        params=("self", "loop"),
        why="Slots, routes and middlewares are added once the server exists.",
        until="the host has a start-up hook",
        hazards=(3, 10),
    ),
    Patch(
        target="server:PromptServer.add_routes",
        wrap=_add_routes,
        params=("self",),
        why="Slots take over the host's worker after the node packs have done to the queue what they do.",
        until="the host accepts a worker factory",
    ),
    Patch(
        target="server:PromptServer.send",
        wrap=_send,
        params=("self", "event", "data", "sid"),
        why="A client that connects again must hear of all its running jobs.",
        until="the host keeps what runs per job",
        hazards=(3,),
    ),
    Patch(
        target="server:PromptServer.trigger_on_prompt",
        wrap=_trigger_on_prompt,
        params=("self", "json_data"),
        why="A job that the host cannot act on must be refused before it is queued.",
        until="the host checks what clients send",
    ),
    Patch(
        target="server:PromptServer.send_sync",
        wrap=_send_sync,
        params=("self", "event", "data", "sid"),
        why="Clients must see which slot an event comes from.",
        until="the host's events carry a device",
    ),
    *(
        Patch(
            target=f"server:PromptServer.{name}",
            wrap=_send_preview,
            params=params,
            spare=True,
            feature="speed",
            why="The host encodes a preview before it looks whether its client is connected.",
            until="the host looks first",
        )
        for name, params in (
            ("send_image", ("self", "image_data", "sid")),
            ("send_image_with_metadata", ("self", "image_data", "metadata", "sid")),
        )
    ),
)
