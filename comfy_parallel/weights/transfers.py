"""Copies of shared weights on a GPU: queued, so that they run while Python goes on."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any

from comfy_parallel.slot import Slot, SlotLocal
from comfy_parallel.weights import homes
from comfy_parallel.weights.homes import Arrival, Home, Place
from comfy_parallel.weights.pins import Piece
from comfy_parallel.weights.spans import Span

logger = logging.getLogger(__name__)

_PART = 512 << 20  # Asked of the driver at once, and copied together.
_PARTS_AHEAD = 2  # The driver takes about as long for memory as for copies from another GPU.
_TURN_S = 0.1  # So long a slot waits for its turn at most.
_SMALL = 1 << 20  # Up to here torch's allocator cuts tensors from 2 MiB (its kSmallSize).
_UNIT = 512  # of its tensors' sizes (its kMinBlockSize).
_BUFFER = 32 << 20
_turn = threading.RLock()


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


@contextmanager
def turn() -> Iterator[None]:
    """For Python of a load that is over soon: one slot after the other is faster than all at once, since handing the
    interpreter over costs more than what is done in between. Nobody waits long: who is not let in goes on without."""
    is_mine = _turn.acquire(timeout=_TURN_S)
    try:
        yield
    finally:
        if is_mine:
            _turn.release()


def move(pairs: Sequence[tuple[Any, Home]], device: Any, may_pin: Callable[[int], bool]) -> None:
    """Give each parameter a copy of its contiguous home on a CUDA device, within `complete()`.

    Args:
        pairs: `(parameter, home)`.
        may_pin: whether so many bytes more may be pinned.
    """
    import torch

    queued = _queued.get()
    queued.streams.add(torch.cuda.current_stream(device))
    parts = list(_parts(pairs))
    rooms = _rooms(parts, device)
    made = deque(islice(rooms, _PARTS_AHEAD))
    for part in parts:
        if made:
            made.popleft()
        _move(part, device, queued, may_pin)
        made.extend(islice(rooms, 1))


def bytes_from(slot: Slot) -> dict[str, int]:
    """How many bytes were copied to a slot's device, by what from: pinned memory, staging buffers or another GPU."""
    counted = _queued.of(slot).bytes_from
    return {source: counted[source] for source in ("pinned", "staged", "peer")}


def copy_pinned(region: Any, spans: Sequence[Span], copies: Sequence[Any], pieces: list[Piece]) -> None:
    """Queue copies of pieces of a region's tensors, within its pins' `read`.

    Args:
        spans: where the tensors lie; `pieces` has their numbers.
        copies: tensors on the device, likewise.
    """
    import torch

    with torch.inference_mode():  # Tensors of both kinds may be written to.
        sources = [_part(region.pins.tensor(spans[piece[0]]), piece) for piece in pieces]
        torch._foreach_copy_([_part(copies[piece[0]], piece) for piece in pieces], sources, non_blocking=True)
    _queued.get().bytes_from["pinned"] += sum(stop - start for _, start, stop in pieces)


def _parts(pairs: Sequence[tuple[Any, Home]]) -> Iterator[Sequence[tuple[Any, Home]]]:
    """Of at least `_PART` bytes each, but for the last."""
    start = part_size = 0
    for number, (_, home) in enumerate(pairs):
        part_size += home.tensor.nbytes
        if part_size >= _PART or number + 1 == len(pairs):
            yield pairs[start : number + 1]
            start, part_size = number + 1, 0


def _rooms(parts: Sequence[Sequence[tuple[Any, Home]]], device: Any) -> Iterator[Any]:
    """Memory for the copies of each part. Let go of a room, and torch's allocator cuts a part's large tensors from it,
    without the driver. What all small ones are cut from is free at once."""
    import torch

    sizes = [[home.tensor.nbytes for _, home in part] for part in parts]
    small = sum(size for part in sizes for size in part if size <= _SMALL)
    try:
        with turn():
            pieces = [torch.empty(_SMALL, dtype=torch.uint8, device=device) for _ in range(0, small, _SMALL)]
        del pieces
        for part in sizes:
            large = sum(-(-size // _UNIT) * _UNIT for size in part if size > _SMALL)
            yield torch.empty(large, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        logger.debug("no room on %s ahead of the copies", device)


def _allocate(tensors: list[Any], device: Any) -> list[Any]:
    """Memory for copies, for each in the mode of its tensor."""
    import torch

    copies = []
    for is_inference, group in groupby(tensors, torch.Tensor.is_inference):
        with torch.inference_mode(is_inference):
            copies += [torch.empty_like(tensor, device=device) for tensor in group]
    return copies


def _move(pairs: Sequence[tuple[Any, Home]], device: Any, queued: _Queued, may_pin: Callable[[int], bool]) -> None:
    with turn():
        copies = _allocate([home.tensor for _, home in pairs], device)
    _copy(queued, [home for _, home in pairs], copies, may_pin)
    with turn():
        for (parameter, home), copy in zip(pairs, copies, strict=True):
            parameter.data = copy
            homes.remember(parameter, home, queued.arrival)


def _copy(queued: _Queued, sources: list[Home], copies: list[Any], may_pin: Callable[[int], bool]) -> None:
    tensors, places = [home.tensor for home in sources], [home.place for home in sources]
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
    spans = [span for _, span in places]
    for piece in region.pins.read(ranges, stream, may_pin, lambda pieces: copy_pinned(region, spans, copies, pieces)):
        if queued.staging is None:
            queued.staging = _Staging()
        with torch.inference_mode():
            queued.staging.copy(_part(tensors[piece[0]], piece), _part(copies[piece[0]], piece), stream)
        queued.bytes_from["staged"] += piece[2] - piece[1]


def _part(tensor: Any, piece: Piece) -> Any:
    import torch

    _, start, stop = piece
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
