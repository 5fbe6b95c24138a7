"""Events as JSON: encoded where they come from, so that what is no JSON fails the job that made it."""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

from comfy_parallel.core.shown import clipped

logger = logging.getLogger(__name__)

_MOST = 300  # characters of a reason
_NO_JSON = (TypeError, ValueError, RecursionError, OverflowError)
_encode = json.dumps
_last: tuple[Any, str] = (None, "")  # the message that was encoded last: an event for all clients is encoded once


class Encoded(dict[str, Any]):
    """An event's data and its JSON text; None once a node pack has changed the data."""

    def __init__(self, data: dict[str, Any], text: str) -> None:
        super().__init__(data)
        self.text: str | None = text


def _changing(name: str) -> Any:
    method = getattr(dict, name)

    @functools.wraps(method)
    def change(self: Encoded, *args: Any, **kwargs: Any) -> Any:
        self.text = None
        return method(self, *args, **kwargs)

    return change


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(Encoded, _name, _changing(_name))


def encoded(event: Any, data: dict[str, Any]) -> Encoded:
    """The data with its JSON.

    Raises:
        TypeError: when it is no JSON; it says which event, and why.
    """
    try:
        return Encoded(data, _encode(data))
    except _NO_JSON as error:
        raise _refused(f"the event {clipped(repr(event), _MOST)} cannot be sent to a client", error) from error


def checked(value: Any, what: str) -> str:
    """The JSON of a value.

    Raises:
        TypeError: when it has none, beginning with `what`.
    """
    try:
        return _encode(value)
    except _NO_JSON as error:
        raise _refused(what, error) from error


def _refused(what: str, error: BaseException) -> TypeError:
    return TypeError(f"{what}, because it is no JSON: {clipped(str(error), _MOST)}")


def text_of(message: dict[str, Any]) -> str | None:
    """A message's JSON; None, and an error in the log, when it has none."""
    global _last
    known, text = _last
    if known is message:
        return text
    data = message.get("data")
    try:
        if type(data) is Encoded and data.text is not None and message.keys() == {"type", "data"}:
            text = f'{{"type": {json.dumps(message["type"])}, "data": {data.text}}}'
        else:
            text = checked(message, f"the event {clipped(repr(message.get('type')), _MOST)} is not sent")
    except TypeError as error:
        logger.error("%s", error)
        return None
    _last = message, text
    return text


def check_output(ui: Any) -> None:
    """What a node shows goes into the history and to its client.

    Raises:
        TypeError: when it is no JSON.
    """
    if ui:
        checked(ui, 'what the node shows (its "ui") cannot be kept')
