"""What makes two calls of a model's forward the same computation on other numbers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable
from typing import Any

from comfy_parallel.graphs.refusal import Uncapturable, refuse

PLAIN = (bool, int, str, bytes, type(None))
_NOT_MOVED = ("transformer_options", "control")
_UNREAD = ("transformer_options.sample_sigmas",)
_ALIGNMENT = 256  # bytes; kernels are chosen by it


class Unread:
    """Stands in for a value that differs from job to job: whoever reads it makes the call uncapturable."""

    def __init__(self, where: str) -> None:
        self._where = where

    def _read(self, *_args: Any) -> Any:
        refuse(f"reads {self._where}")

    __getitem__ = __iter__ = __len__ = __contains__ = __eq__ = __bool__ = __getattr__ = _read
    __hash__ = None  # type: ignore[assignment]


def describe(arguments: dict[str, Any], device: Any) -> tuple[Hashable, list[Any]]:
    """A key, equal for calls that differ only in the numbers inside their tensors, and these tensors in order.

    The key holds every plain value and each tensor's shape, strides, dtype and alignment. Conditionings may lie in
    RAM: the host copies them to the device in each step, and converts them there or here with the same rounding.

    Raises:
        Uncapturable: for an argument that the key cannot hold, or a tensor that is elsewhere than on `device`.
    """
    tensors: list[Any] = []
    key = _describe(arguments, "", device, tensors)
    return key, tensors


def substitute(arguments: dict[str, Any], tensors: list[Any]) -> dict[str, Any]:
    """The same arguments with other tensors, in the order in which `describe` lists them."""
    rest = iter(tensors)
    made: dict[int, Any] = {}

    def other(tensor: Any) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = next(rest)
        return made[id(tensor)]

    replaced: dict[str, Any] = _substitute(arguments, "", other)
    return replaced


def repeatable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in containers of their own: a forward may take items out of those it is given."""
    copied: dict[str, Any] = _copied(arguments)
    return copied


def have_same_bytes(one: Any, other: Any) -> bool:
    """Whether two tensors of one shape and dtype are equal, which for numbers is not the same: nan, -0.0."""
    import torch

    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def _describe(value: Any, where: str, device: Any, tensors: list[Any]) -> Hashable:
    import torch

    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is float:
        return float, value.hex()  # 0.0 == -0.0
    if _is_unread(value, where):
        return "unread"
    if kind is torch.Tensor:
        return _describe_tensor(value, where, device, tensors)
    if kind is dict:
        return dict, tuple(
            (_name(name, where), _describe(item, _at(where, name), device, tensors)) for name, item in value.items()
        )
    if kind in (list, tuple):
        return kind, tuple(_describe(item, where, device, tensors) for item in value)
    if kind in (torch.dtype, torch.device, torch.Size):
        return kind, value
    raise Uncapturable(f"a {kind.__name__} in {_short(where)}")


def _describe_tensor(tensor: Any, where: str, device: Any, tensors: list[Any]) -> Hashable:
    import torch

    if tensor.device != device and (tensor.device.type != "cpu" or where.partition(".")[0] in _NOT_MOVED):
        raise Uncapturable(f"a tensor on {tensor.device.type} in {_short(where)}")
    if tensor.layout is not torch.strided:
        raise Uncapturable(f"a sparse tensor in {_short(where)}")
    for index, known in enumerate(tensors):
        if known is tensor:
            return "tensor", index
    tensors.append(tensor)
    alignment = tensor.data_ptr() % _ALIGNMENT if tensor.is_cuda else 0
    return "tensor", tensor.device.type, tensor.dtype, tuple(tensor.shape), tensor.stride(), alignment


def _substitute(value: Any, where: str, other: Callable[[Any], Any]) -> Any:
    import torch

    if _is_unread(value, where):
        return Unread(where)
    kind = type(value)
    if kind is torch.Tensor:
        return other(value)
    if kind is dict:
        return {name: _substitute(item, _at(where, name), other) for name, item in value.items()}
    if kind in (list, tuple):
        return kind(_substitute(item, where, other) for item in value)
    return value


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _is_unread(value: Any, where: str) -> bool:
    """What the host adds to each job for nodes, and its models do not read: ids, and the sigmas of all steps."""
    if where in _UNREAD:
        return True
    return type(value) is list and len(value) > 0 and all(type(item) is uuid.UUID for item in value)


def _name(name: Any, where: str) -> Hashable:
    if type(name) in PLAIN or (type(name) is tuple and all(type(part) in PLAIN for part in name)):
        return type(name), name
    raise Uncapturable(f"a {type(name).__name__} as key in {_short(where)}")


def _at(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)


def _short(where: str) -> str:
    """Reasons are counted, so there must be few of them."""
    return ".".join(where.split(".")[:2]) or "the arguments"
