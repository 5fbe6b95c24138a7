"""Where a request or a job is meant to go: the target a client names, and the scope of a request."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest

HEADER = "X-TARGET-GPU"
BODY_FIELD = "target_gpu"
SETTLED_FIELD = "comfy_parallel_target"  # what the header named, in a job's extra_data until that is queued
AUTO = "auto"


class RequestKey(NamedTuple):
    """A client's name for one request, by which it is known when it comes again: with the same body."""

    name: str
    digest: str

    @property
    def text(self) -> str:
        """Both, the digest first: it has no space."""
        return f"{self.digest} {self.name}"


@dataclass(slots=True)
class Scope:
    """What one HTTP request is about. `slot` None: all slots. `prompt_id`: exactly that job.

    `target` is where a submitted job goes: a slot's number, `AUTO`, or None when the client named none.
    `placed` is filled in with the slot's number a job was bound to at once. `viewed_slots` run the jobs of a
    client that connects. `is_in_turn`: a submitted job has no number of its client's choice.

    Who asks is told by `client_id` where the request says it, and by `peer`: a user's name, else an address; `party` is
    whom its jobs count for among those who share fairly. `order_of(body)` is the order that it asks for its client's
    jobs. `is_all`: an interrupt means everybody's jobs. `interrupted` is filled in with the ids of those it reached.

    `is_submission`: a client's `POST /prompt`, which is answered once its job is on disk; `request_key` names it, and
    `repeated` is filled in with its job if that has come before. `is_kept`: a restart must find the job again.
    """

    slot: int | None = None
    prompt_id: str | None = None
    target: int | str | None = None
    placed: int | None = None
    viewed_slots: tuple[int, ...] = ()
    is_in_turn: bool = False
    client_id: Any = None
    peer: str | None = None
    party: Any = None
    is_all: bool = False
    order_of: Callable[[dict[str, Any]], str | None] | None = None
    interrupted: list[Any] = field(default_factory=list)
    is_submission: bool = False
    request_key: RequestKey | None = None
    repeated: Any = None
    is_kept: bool = True

    def note_interrupted(self, prompt_ids: Iterable[Any]) -> None:
        """Tell the request in progress, if there is one, which jobs it reached."""
        if self is not _EVERYTHING:
            self.interrupted.extend(prompt_ids)

    def covers(self, index: int) -> bool:
        return self.slot is None or self.slot == index


_EVERYTHING = Scope()
_SCOPE: ContextVar[Scope] = ContextVar("comfy_parallel_scope", default=_EVERYTHING)

current_scope = _SCOPE.get


def is_of_request() -> bool:
    """Whether this is done for a request that has a scope, as a client's `POST /prompt` has."""
    return _SCOPE.get() is not _EVERYTHING


class scoped:  # noqa: N801 - used like a function
    """Run the body as part of a request with this scope. A class, because it is on the way of every request."""

    __slots__ = ("_scope", "_token")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        self._token = _SCOPE.set(self._scope)

    def __exit__(self, *_exc_info: object) -> None:
        _SCOPE.reset(self._token)


def note_placed(target: int | None) -> None:
    """Tell the request in progress, if there is one, where its job went."""
    scope = _SCOPE.get()
    if scope is not _EVERYTHING:
        scope.placed = target


def parse_target(value: Any, num_slots: int, where: str) -> int | str:
    """A slot's number or `AUTO` out of a header or a body field.

    Raises:
        BadRequest: for anything else; numbers are never clamped.
    """
    text = value.strip() if isinstance(value, str) else value
    if text == AUTO:
        return AUTO
    if isinstance(text, str) and re.fullmatch(r"[0-9]{1,4}", text, re.ASCII):
        text = int(text)
    if type(text) is not int or not 0 <= text < num_slots:
        choices = "0" if num_slots == 1 else f"a whole number from 0 to {num_slots - 1}"
        raise BadRequest(
            "invalid_target_gpu",
            f"{where} is {shown(value)}, which names no slot",
            f"set {where} to {choices}, or to {AUTO}, or leave it out",
        )
    return text


def body_target(extra_data: dict[str, Any], num_slots: int) -> int | str | None:
    """What a job's `extra_data` names; None when it names nothing.

    Raises:
        BadRequest: when it names no slot.
    """
    for name in (SETTLED_FIELD, BODY_FIELD):
        if extra_data.get(name) is not None:
            return parse_target(extra_data[name], num_slots, f"extra_data.{name}")
    return None


def note_target(target: int | str | None) -> None:
    """Tell the request in progress, if there is one, where its job is to go."""
    scope = _SCOPE.get()
    if scope is not _EVERYTHING:
        scope.target = target
