"""Copies of shared weights on a GPU: queued, so that they run while Python goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from comfy_parallel.slot import Slot, SlotLocal
from comfy_parallel.weights import homes
from comfy_parallel.weights.homes import Arrival, Place
from comfy_parallel.weights.pins import Piece

_BATCH = 128 << 20
_BUFFER = 32 << 20


class _Queued:
    """The calling slot's copies that may still run, and what they need."""

    def __init__(self) -> None:
        self.depth = 0
        self.arrival = Arrival()
        self.streams: set[Any] = set()
        self.sources: list[Any] = []
        self.bytes_from: Counter[str] = Counter()
        self.staging: _Staging | None = None

    def wait(self) -> None:
        for stream in self.streams:
            stream.synchronize()
        self.arrival.is_over = True
        self.arrival = Arrival()
        self.streams.clear()
        self.sources.clear()


_queued: SlotLocal[_Queued] = SlotLocal(_Queued)


@contextmanager
def complete() -> Iterator[None]:
    """The copies that the body queues are complete at its end."""
    queued = _queued.get()
    queued.depth += 1
    try:
        yield
    finally:
        queued.depth -= 1
        if not queued.depth:
            queued.wait()


def move(pairs: Sequence[tuple[Any, Any]], device: Any, may_pin: Callable[[int], bool]) -> None:
    """Give each parameter a copy of its shared contiguous tensor on a CUDA device, within `complete()`.

    Args:
        pairs: `(parameter, tensor)`.
        may_pin: whether so many bytes more may be pinned.
    """
    batch: list[tuple[Any, Any]] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += pair[1].nbytes
        if size >= _BATCH:
            _move(batch, device, may_pin)
            batch, size = [], 0
    if batch:
        _move(batch, device, may_pin)


def bytes_from(slot: Slot) -> dict[str, int]:
    """How many bytes were copied to a slot's device, by what from: pinned memory, staging buffers or another GPU."""
    counted = _queued.of(slot).bytes_from
    return {source: counted[source] for source in ("pinned", "staged", "peer")}


def _move(batch: list[tuple[Any, Any]], device: Any, may_pin: Callable[[int], bool]) -> None:
    """Each call into torch lets other slots' Python go first, so there are few."""
    import torch

    queued = _queued.get()
    queued.streams.add(torch.cuda.current_stream(device))
    tensors = [tensor for _, tensor in batch]
    copies = []
    for is_inference, group in groupby(tensors, torch.Tensor.is_inference):
        with torch.inference_mode(is_inference):
            copies += [torch.empty_like(tensor, device=device) for tensor in group]
    places = [homes.place_of(tensor) for tensor in tensors]
    _copy(queued, tensors, copies, places, may_pin)
    for (parameter, tensor), copy in zip(batch, copies, strict=True):
        parameter.data = copy
        homes.remember(parameter, tensor)
    homes.lend([(parameter, place) for (parameter, _), place in zip(batch, places, strict=True)], queued.arrival)


def _copy(
    queued: _Queued, tensors: list[Any], copies: list[Any], places: list[Place], may_pin: Callable[[int], bool]
) -> None:
    queued.sources += tensors
    lent = homes.borrow(places, copies)
    queued.sources += lent.values()
    queued.bytes_from["peer"] += sum(tensors[number].nbytes for number in lent)
    left = [number for number in range(len(tensors)) if number not in lent and tensors[number].nbytes]
    for region, numbers in groupby(left, lambda number: places[number][0]):
        _copy_from_ram(queued, region, list(numbers), tensors, copies, places, may_pin)


def _copy_from_ram(
    queued: _Queued,
    region: Any,
    numbers: list[int],
    tensors: list[Any],
    copies: list[Any],
    places: list[Place],
    may_pin: Callable[[int], bool],
) -> None:
    import torch

    stream = torch.cuda.current_stream(copies[numbers[0]].device)
    ranges = [(number, places[number][1].offset, tensors[number].nbytes) for number in numbers]

    def queue(pieces: list[Piece]) -> None:
        sources = [_part(tensors, piece) for piece in pieces]
        with torch.inference_mode():  # Tensors of both kinds may be written to.
            torch._foreach_copy_([_part(copies, piece) for piece in pieces], sources, non_blocking=True)
        queued.bytes_from["pinned"] += sum(stop - start for _, start, stop in pieces)

    for piece in region.pins.read(ranges, stream, may_pin, queue):
        if queued.staging is None:
            queued.staging = _Staging()
        with torch.inference_mode():
            queued.staging.copy(_part(tensors, piece), _part(copies, piece), stream)
        queued.bytes_from["staged"] += piece[2] - piece[1]


def _part(tensors: list[Any], piece: Piece) -> Any:
    import torch

    number, start, stop = piece
    tensor = tensors[number]
    return tensor if stop - start == tensor.nbytes else tensor.view(-1).view(torch.uint8)[start:stop]


class _Staging:
    """Two pinned buffers in turn: one is filled while the other is copied to the device."""

    def __init__(self) -> None:
        import torch

        with torch.inference_mode(False):  # Such tensors may be written to in both modes.
            self._buffers = [torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events: list[Any] = [None, None]
        self._next = 0

    def copy(self, source: Any, target: Any, stream: Any) -> None:
        import torch

        source, target = (tensor.view(-1).view(torch.uint8) for tensor in (source, target))
        for start in range(0, source.numel(), _BUFFER):
            part = source[start : start + _BUFFER]
            index, self._next = self._next, 1 - self._next
            if self._events[index] is not None:
                self._events[index].synchronize()
            buffer = self._buffers[index][: part.numel()]
            buffer.copy_(part)
            target[start : start + part.numel()].copy_(buffer, non_blocking=True)
            self._events[index] = stream.record_event()
