"""Values with tensors in them, as bytes that cannot make whoever reads them run code: what servers give each other.

A digest comes first, then a description in JSON, then the bytes of tensors. Plain values keep their types. Of classes
only those that were made known are written and read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

_LENGTH, _DIGEST = 8, 32
_PLAIN = frozenset((str, int, bool, type(None)))
_SEVERAL = {"tuple": tuple, "set": set, "frozenset": frozenset}
_known: dict[str, Any] = {}


class NotPlain(TypeError):
    """A value of a class that cannot be sent to another server."""


def make_known(*classes: Any) -> None:
    """Let values of these dataclasses be sent."""
    _known.update({kind.__name__: kind for kind in classes})


def encoded(value: Any) -> bytes:
    """The value as bytes.

    Raises:
        NotPlain: naming the class of what cannot be sent.
    """
    parts: list[Any] = []
    text = json.dumps(_Writer(parts).described(value), separators=(",", ":")).encode()
    body = b"".join((len(text).to_bytes(_LENGTH, "big"), text, *parts))
    return hashlib.sha256(body).digest() + body


def decoded(data: bytes) -> Any:
    """The value again.

    Raises:
        ValueError: when these are not the bytes that were written.
    """
    body = memoryview(data)[_DIGEST:]
    if len(body) < _LENGTH or hashlib.sha256(body).digest() != data[:_DIGEST]:
        raise ValueError("a value came with other bytes than it was sent with")
    start = _LENGTH + int.from_bytes(body[:_LENGTH], "big")
    try:
        return _Reader(body[start:]).made(json.loads(bytes(body[_LENGTH:start])))
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"a value is not written as it is to be: {error}") from error


class _Writer:
    """Describes values in JSON; `parts` gets the bytes that belong to them."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts, self._size = parts, 0

    def described(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN or (kind is float and math.isfinite(value)):
            return value
        if kind is float:
            return {"float": repr(value)}
        if kind is list:
            return [self.described(one) for one in value]
        if kind is dict:
            return {"dict": [[self.described(key), self.described(one)] for key, one in value.items()]}
        if kind.__name__ in _SEVERAL and kind is _SEVERAL[kind.__name__]:
            return {kind.__name__: [self.described(one) for one in value]}
        if isinstance(value, bytes):
            return {"bytes": self._place(value)}
        if _known.get(kind.__name__) is kind:
            fields = [self.described(getattr(value, field.name)) for field in dataclasses.fields(value)]
            return {"data": [kind.__name__, fields]}
        return self._tensor(value)

    def _tensor(self, value: Any) -> Any:
        import torch

        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
            raise NotPlain(f"{type(value).__module__}.{type(value).__qualname__} cannot be sent to another server")
        plain = value.detach().to("cpu").contiguous()
        raw: Any = plain.reshape(-1).view(torch.uint8).numpy()
        return {"tensor": [str(plain.dtype).removeprefix("torch."), list(plain.shape), *self._place(raw.data)]}

    def _place(self, raw: Any) -> list[int]:
        start, self._size = self._size, self._size + len(raw)
        self._parts.append(raw)
        return [start, len(raw)]


class _Reader:
    """Makes values of their descriptions. `parts`: the bytes that belong to them."""

    def __init__(self, parts: memoryview) -> None:
        self._parts = parts
        self._makers: dict[str, Callable[[Any], Any]] = {
            "float": float,
            "dict": self._dict,
            "bytes": self._bytes,
            "data": self._data,
            "tensor": self._tensor,
        }

    def made(self, told: Any) -> Any:
        if isinstance(told, list):
            return [self.made(one) for one in told]
        if not isinstance(told, dict):
            return told
        ((kind, content),) = told.items()
        if kind in _SEVERAL:
            return _SEVERAL[kind](self.made(one) for one in content)
        made: Any = self._makers[kind](content)
        return made

    def _dict(self, pairs: list[Any]) -> dict[Any, Any]:
        return {self.made(key): self.made(value) for key, value in pairs}

    def _bytes(self, place: list[int]) -> bytes:
        return bytes(self._part(*place))

    def _data(self, told: list[Any]) -> Any:
        name, fields = told
        return _known[name](*(self.made(field) for field in fields))

    def _tensor(self, told: list[Any]) -> Any:
        import torch

        name, shape, *place = told
        kind = getattr(torch, name)
        if not isinstance(kind, torch.dtype):
            raise TypeError(f"{name} is no type of tensors")
        raw = bytearray(self._part(*place))
        if not raw:
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(raw, dtype=torch.uint8).view(kind).reshape(shape)

    def _part(self, start: int, size: int) -> memoryview:
        part = self._parts[start : start + size]
        if len(part) != size:
            raise ValueError("a value came without all of its bytes")
        return part
