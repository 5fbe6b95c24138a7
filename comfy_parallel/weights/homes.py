"""Parameters on a device that are unchanged copies of shared tensors.

The way back costs nothing, and other GPUs may copy from them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from comfy_parallel.weights import peers
from comfy_parallel.weights.memory import Region, origin_of, span_of
from comfy_parallel.weights.spans import Span

_HOME = "comfy_parallel_home"
Place = tuple[Region, Span]


@dataclass(slots=True)
class Arrival:
    """Copies to a device that are made together. Until they are over, nobody copies from them."""

    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Home:
    """The shared tensor that a parameter on a device was copied from, and where the copy lies."""

    tensor: Any
    address: int


_lock = threading.Lock()
_holders: WeakKeyDictionary[Region, dict[Span, list[tuple[ref[Any], Arrival]]]] = WeakKeyDictionary()


def remember(parameter: Any, tensor: Any) -> None:
    """Say that a parameter is a copy of a shared tensor."""
    setattr(parameter, _HOME, Home(tensor, parameter.data_ptr()))


def lend(parameters: Iterable[tuple[Any, Place]], arrival: Arrival) -> None:
    """Let other GPUs copy from these parameters, which remember a home, once their arrival is over."""
    with _lock:
        for parameter, (region, span) in parameters:
            holders = _holders.setdefault(region, {}).setdefault(span, [])
            holders[:] = [holder for holder in holders if _is_other(holder[0](), parameter)]
            holders.append((ref(parameter), arrival))


def place_of(tensor: Any) -> Place:
    """Where a shared tensor lies."""
    origin = origin_of(tensor)
    assert origin is not None
    return origin.region, span_of(tensor, origin)


def home_of(parameter: Any) -> Any:
    """The shared tensor with a device parameter's numbers; None if it has none, or is another tensor by now."""
    home: Home | None = getattr(parameter, _HOME, None)
    if home is None or home.address != parameter.data_ptr() or home.tensor.dtype != parameter.dtype:
        return None
    return home.tensor if home.tensor.shape == parameter.shape else None


def send_home(parameter: Any) -> None:
    """Let a parameter on a device that still is a copy of a shared tensor be that tensor again."""
    home = home_of(parameter)
    if home is not None:
        parameter.data = home  # Who copies from it keeps its memory until that is done.
        delattr(parameter, _HOME)


def forget(parameter: Any) -> None:
    """Call this before a parameter is written to or replaced: GPUs that copy from it finish first."""
    with _lock:
        had_home = hasattr(parameter, _HOME)
        if had_home:
            delattr(parameter, _HOME)
    if had_home and parameter.device.type == "cuda":
        peers.wait_for_readers(parameter.device.index)


def borrow(places: Sequence[Place], copies: Sequence[Any]) -> dict[int, Any]:
    """Queue copies of these places to the tensors in `copies` from parameters on other GPUs, where that is fast.

    Returns what is copied from, by its number, to be kept until that is done. The others are not copied.
    """
    found: dict[int, Any] = {}
    with _lock:
        for number, ((region, span), copy) in enumerate(zip(places, copies, strict=True)):
            source = _lender(_holders.get(region, {}).get(span, ()), copy.device.index)
            if source is not None:
                found[number] = source
        peers.copy([(source, copies[number]) for number, source in found.items()])
    return found


def _lender(holders: Iterable[tuple[ref[Any], Arrival]], target: int) -> Any:
    """The numbers of a parameter on another GPU."""
    for holder, arrival in holders:
        parameter = holder()
        if parameter is None or not arrival.is_over:
            continue
        data = parameter.data  # first: the parameter may be sent home at any time
        home: Home | None = getattr(parameter, _HOME, None)
        is_copy = home is not None and home.address == data.data_ptr() and data.is_cuda
        if is_copy and peers.is_faster_than_ram(data.device.index, target):
            return data
    return None


def _is_other(parameter: Any, than: Any) -> bool:
    return parameter is not None and parameter is not than
