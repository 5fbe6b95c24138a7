"""Checks of what clients send, before the host acts on it. Every refusal says what to send instead."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, cast

from comfy_parallel.core import limits
from comfy_parallel.core.shown import shown
from comfy_parallel.errors import BadRequest

MAX_DEPTH = 100
MAX_NAME = 1000  # characters of a name or an id, which replies, events and logs repeat


def parse_object(body: bytes, *, charset: str, may_be_empty: bool = False) -> dict[str, Any]:
    """The JSON object in a request body.

    Raises:
        BadRequest: when it is none.
    """
    if not body.strip() and may_be_empty:
        return {}
    try:
        data = json.loads(body.decode(charset))
    except (ValueError, LookupError, RecursionError) as error:
        raise _bad("the request body is no JSON", f"send a JSON object, UTF-8 encoded: {error}") from error
    check_object(data)
    return cast(dict[str, Any], data)


def check_object(data: Any) -> None:
    """A request body must be an object, and no deeper than the host can copy recursively, also on its event loop."""
    if not isinstance(data, dict):
        raise _bad(f"the request body is {_kind(data)}", "send a JSON object")
    if _is_deeper_than(data, MAX_DEPTH):
        raise _bad("the request body is nested too deeply", f"send lists and objects nested at most {MAX_DEPTH} deep")


def check_prompt(data: dict[str, Any]) -> None:
    """`POST /prompt`. What only the host can judge (nodes, links, values) is left to it."""
    for name in data:
        if name in _PROMPT_CHECKS:
            _PROMPT_CHECKS[name](data)


def check_queue_change(data: dict[str, Any]) -> None:
    """`POST /queue` and `POST /history`."""
    _check_kind(data, "delete", list)
    for prompt_id in data.get("delete", []):
        if isinstance(prompt_id, list | dict):
            raise _bad(f"delete holds {_kind(prompt_id)}", "send delete as a list of prompt_ids, which are strings")


def check_interrupt(data: dict[str, Any]) -> None:
    """`POST /interrupt`."""
    if data.get("prompt_id") is not None and not isinstance(data["prompt_id"], str):
        raise _bad(f"prompt_id is {_kind(data['prompt_id'])}", "send the prompt_id as a string, or leave it out")


def check_page(query: dict[str, str]) -> None:
    """`GET /history`."""
    for name in ("max_items", "offset"):
        if not re.fullmatch(r"-?[0-9]{1,18}", query.get(name, "0")):
            raise _bad(f"{name}={shown(query[name])}", f"set {name} to a whole number, or leave it out")


def _check_nodes(data: dict[str, Any]) -> None:
    _check_kind(data, "prompt", dict)
    limits.check_nodes(len(data["prompt"]))
    for node_id, node in data["prompt"].items():
        if (
            len(node_id) > MAX_NAME
            or type(node) is not dict
            or type(node.get("class_type")) is not str
            or type(node.get("inputs")) is not dict
            or len(node["class_type"]) > MAX_NAME
        ):
            _check_node(node_id, node)


def _check_node(node_id: str, node: Any) -> None:
    _check_length(node_id, f"the node id {shown(node_id)}")
    where = f"prompt[{shown(node_id)}]"
    if not isinstance(node, dict):
        raise _bad(f"{where} is {_kind(node)}", 'write each node as {"class_type": …, "inputs": {…}}')
    if "class_type" in node and not isinstance(node["class_type"], str):
        raise _bad(f"{where}.class_type is {_kind(node['class_type'])}", "name the node's class as a string")
    _check_length(node.get("class_type"), f"{where}.class_type")
    if not isinstance(node.get("inputs", {}), dict):
        raise _bad(f"{where}.inputs is {_kind(node['inputs'])}", "write inputs as an object, {} when there are none")


def _is_deeper_than(data: dict[str, Any], depth: int) -> bool:
    level: list[Any] = [data]
    for _ in range(depth):
        below = []
        for parent in level:
            for child in parent.values() if type(parent) is dict else parent:
                if type(child) is dict or type(child) is list:
                    below.append(child)
        if not below:
            return False
        level = below
    return True


def _check_number(data: dict[str, Any]) -> None:
    number = data["number"]
    try:
        value = math.nan if isinstance(number, bool) else float(number)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise _bad(f"number is {shown(number)}", "send a finite number (smaller runs first), or leave it out")


def _check_kind(data: dict[str, Any], name: str, kind: type, *, nullable: bool = False) -> None:
    if name not in data or isinstance(data[name], kind) or (nullable and data[name] is None):
        return
    wanted = "an object" if kind is dict else "a list"
    raise _bad(f"{name} is {_kind(data[name])}", f"send {name} as {wanted}, or leave it out")


def _check_id(data: dict[str, Any], name: str, where: str = "") -> None:
    if isinstance(data.get(name), list | dict):
        raise _bad(f"{where or name} is {_kind(data[name])}", f"send {where or name} as a string, or leave it out")
    _check_length(data.get(name), where or name)


def _check_length(name: Any, where: str) -> None:
    if isinstance(name, str) and len(name) > MAX_NAME:
        raise _bad(f"{where} is {len(name)} characters long", f"send at most {MAX_NAME} characters")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _bad(message: str, details: str) -> BadRequest:
    return BadRequest("invalid_request", message, details)


def _check_extra_data(data: dict[str, Any]) -> None:
    _check_kind(data, "extra_data", dict)
    _check_id(data["extra_data"], "client_id", "extra_data.client_id")


def _check_targets(data: dict[str, Any]) -> None:
    """The host looks whether a node's id is in it, which a string may tell as well as a list."""
    if not isinstance(data["partial_execution_targets"], str):
        _check_kind(data, "partial_execution_targets", list, nullable=True)


_PROMPT_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "number": _check_number,
    "extra_data": _check_extra_data,
    "partial_execution_targets": _check_targets,
    "client_id": lambda data: _check_id(data, "client_id"),
    "prompt_id": lambda data: _check_id(data, "prompt_id"),
    "prompt": _check_nodes,
}
