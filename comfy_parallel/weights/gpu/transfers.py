"""Copies of shared weights on a GPU: queued, so that they run while Python goes on."""

from __future__ import annotations

import functools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

from comfy_parallel.slots.slot import Slot, SlotLocal
from comfy_parallel.weights.gpu import homes
from comfy_parallel.weights.gpu.homes import Arrival, Home
from comfy_parallel.weights.gpu.parts import Part, batches, make_room
from comfy_parallel.weights.gpu.pins import Piece
from comfy_parallel.weights.gpu.turns import turn
from comfy_parallel.weights.spans import Span

logger = logging.getLogger(__name__)

_BUFFER = 32 << 20


class _Queued:
    """The calling slot's copies that may still run, and what they need."""

    def __init__(self) -> None:
        self.depth = 0
        self.streams: set[Any] = set()
        self.sources: list[Any] = []
        self.lent: deque[tuple[Any, list[Any]]] = deque()  # other slots' memory, until the copies' event
        self.bytes_from: Counter[str] = Counter()
        self.staging: _Staging | None = None

    def give_back(self) -> None:
        """Let go of what is copied by now: its owners may need the memory before this slot's load ends."""
        while self.lent and self.lent[0][0].query():
            self.lent.popleft()

    def wait(self) -> None:
        for stream in self.streams:
            stream.synchronize()
        self.streams.clear()
        self.sources.clear()
        self.lent.clear()


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


def move(parts: Iterable[Part], device: Any, may_pin: Callable[[int], bool]) -> None:
    """Give each parameter a copy of its contiguous home on a CUDA device, within `complete()`.

    Args:
        may_pin: whether so many bytes more may be pinned.
    """
    import torch

    queued, stream = _queued.get(), torch.cuda.current_stream(device)
    queued.streams.add(stream)
    queued.give_back()
    with batches(parts, stream.device.index) as cut:
        for batch in cut:
            make_room(batch, device)
            made = [(part, *_copies(part, stream.device)) for part in batch]  # This needs no turn.
            left = []
            with turn():
                for part, copies, memory in made:
                    rest = _queue(queued, part, copies, memory, stream, may_pin)
                    if rest:
                        left.append((part, copies, rest))
                    else:
                        _take(part, copies, stream)
            for part, copies, rest in left:
                _stage(queued, rest, stream)
                with turn():
                    _take(part, copies, stream)
            queued.give_back()


def take_apart(block: Sequence[tuple[Any, Home | None]]) -> None:
    """Give these parameters on a device memory of their own, or none of them where there is no room."""
    import torch

    copies = []
    try:
        for parameter, _ in block:
            with torch.inference_mode(parameter.is_inference()):
                copies.append(parameter.data.clone())
    except torch.OutOfMemoryError:
        logger.debug("no room on %s for a block's weights one by one", block[0][0].device)
        return
    for (parameter, home), copy in zip(block, copies, strict=True):
        parameter.data = copy
        if home is not None:
            homes.remember(parameter, home, None)


def bytes_from(slot: Slot) -> dict[str, int]:
    """How many bytes were copied to a slot's device, by what from: pinned memory, staging buffers or a GPU."""
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
        sources, targets = [], []
        for number, start, stop in pieces:
            source, target = region.pins.tensor(spans[number]), copies[number]
            is_whole = stop - start == target.nbytes
            sources.append(source if is_whole else _part(source, start, stop))
            targets.append(target if is_whole else _part(target, start, stop))
        torch._foreach_copy_(targets, sources, non_blocking=True)
    _queued.get().bytes_from["pinned"] += sum(stop - start for _, start, stop in pieces)


def _copies(part: Part, device: Any) -> tuple[Sequence[Any], Any]:
    """Tensors for the copies, for each in the mode of its weight, and the memory of their block, if they lie in one."""
    import torch

    if part.block is not None:
        memory = part.block.memory(device)
        return part.block.weights(memory), memory
    copies: list[Any] = []
    for is_inference, group in groupby((home.tensor for home in part.homes), torch.Tensor.is_inference):
        with torch.inference_mode(is_inference):
            copies += [torch.empty_like(tensor, device=device) for tensor in group]
    return copies, None


class _Left(NamedTuple):
    """Bytes that neither a GPU nor pinned memory has."""

    source: Any
    target: Any


def _queue(
    queued: _Queued,
    part: Part,
    copies: Sequence[Any],
    memory: Any,
    stream: Any,
    may_pin: Callable[[int], bool],
) -> list[_Left]:
    """Queue copies from GPUs and from pinned memory. Returns what is left to copy."""
    sources, block = part.homes, part.block
    queued.sources.append(sources)
    lent = homes.borrow(sources, copies, None if block is None else block.layout)
    if block is not None and not lent:
        return _queue_pinned(sources[0].place[0], block.stretches, block.bytes_of(memory), stream, may_pin)
    if lent:
        queued.lent.append((stream.record_event(), list(lent.values())))
    queued.bytes_from["peer"] += sum(sources[number].size for number in lent)
    numbers = [number for number, home in enumerate(sources) if number not in lent and home.size]
    left: list[_Left] = []
    for region, group in groupby(numbers, lambda number: sources[number].place[0]):
        own = list(group)
        spans, targets = [sources[number].place[1] for number in own], [copies[number] for number in own]
        left += _queue_pinned(region, spans, targets, stream, may_pin)
    return left


def _queue_pinned(
    region: Any, spans: Sequence[Span], targets: Sequence[Any], stream: Any, may_pin: Callable[[int], bool]
) -> list[_Left]:
    ranges = [(number, span.offset, targets[number].nbytes) for number, span in enumerate(spans)]
    copy = functools.partial(copy_pinned, region, spans, targets)
    pieces = region.pins.read(ranges, stream, may_pin, copy)
    return [_Left(_part(region.tensor(spans[n]), *piece), _part(targets[n], *piece)) for n, *piece in pieces]


def _stage(queued: _Queued, left: Sequence[_Left], stream: Any) -> None:
    """Copy unpinned memory."""
    import torch

    if queued.staging is None:
        queued.staging = _Staging()
    for source, target in left:
        with torch.inference_mode():
            queued.staging.copy(source, target, stream)
        queued.bytes_from["staged"] += target.nbytes


def _take(part: Part, copies: Sequence[Any], stream: Any) -> None:
    arrival = Arrival(stream.record_event(), None if part.block is None else part.block.layout)
    for parameter, home, copy in zip(part.parameters, part.homes, copies, strict=True):
        parameter.data = copy
        homes.remember(parameter, home, arrival)


def _part(tensor: Any, start: int, stop: int) -> Any:
    """Its bytes from … to …."""
    import torch

    return tensor.view(-1).view(torch.uint8)[start:stop]


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
