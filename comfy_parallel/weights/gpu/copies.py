"""Copies of shared weights on a GPU, from where they come fastest: another GPU, registered memory, or pinned buffers.

They are queued, so that they run while Python goes on, and waited for once.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

from comfy_parallel.slots.slot import Slot, SlotLocal
from comfy_parallel.weights.gpu.blocks import Block, bytes_of, memory_of, seal
from comfy_parallel.weights.gpu.homes import Arrival, Home
from comfy_parallel.weights.gpu.pins import Piece
from comfy_parallel.weights.spans import Span

logger = logging.getLogger(__name__)

_BUFFER = 32 << 20
_PROBE = 64 << 20
_ROUNDS = 3
MayPin = Callable[[int], bool]  # whether so many bytes more may be pinned


class _Borrowed(NamedTuple):
    """A block that another slot lent; its bytes are right if both seals are equal."""

    block: Block
    memory: Any
    expected: Any
    found: Any
    may_pin: MayPin


class _Queued:
    """The calling slot's copies that may still run, and what they need."""

    def __init__(self) -> None:
        self.depth = 0
        self.streams: set[Any] = set()
        self.sources: list[Any] = []
        self.lent: deque[tuple[Any, Any]] = deque()  # other slots' memory, until the copies' event
        self.borrowed: list[_Borrowed] = []
        self.bytes_from: Counter[str] = Counter()
        self.staging: _Staging | None = None

    def give_back(self) -> None:
        """Let go of what is copied by now: its owners may need the memory before this slot's load ends."""
        while self.lent and self.lent[0][0].query():
            self.lent.popleft()

    def wait(self) -> None:
        while self.streams:
            for stream in list(self.streams):
                stream.synchronize()
            self.streams.clear()
            borrowed, self.borrowed = self.borrowed, []
            for one in borrowed:
                self._check(one)
        self.sources.clear()
        self.lent.clear()

    def _check(self, one: _Borrowed) -> None:
        import torch

        if not torch.equal(one.expected, one.found):
            logger.info("comfy_parallel: a model that another slot lent was written to there; it is read from RAM")
            self.bytes_from["peer"] -= one.block.content_size
            read(one.block, one.memory, one.may_pin)


_queued: SlotLocal[_Queued] = SlotLocal(_Queued)


@contextmanager
def complete() -> Iterator[None]:
    """The copies that the body queues are complete at its end, and their bytes are those of the files."""
    queued = _queued.get()
    queued.depth += 1
    try:
        yield
    finally:
        queued.depth -= 1
        if not queued.depth:
            queued.wait()


def bytes_from(slot: Slot) -> dict[str, int]:
    """How many bytes were copied to a slot's device, by what from: pinned memory, staging buffers or a GPU."""
    counted = _queued.of(slot).bytes_from
    return {source: counted[source] for source in ("pinned", "staged", "peer")}


@contextmanager
def uncounted() -> Iterator[None]:
    """What the body copies is not told by `bytes_from`: it is compared and dropped."""
    queued = _queued.get()
    before = queued.bytes_from.copy()
    try:
        yield
    finally:
        queued.bytes_from = before


def read(block: Block, memory: Any, may_pin: MayPin) -> None:
    """Queue copies of a block's bytes from RAM, within `complete()`."""
    _read(block.region, block.stretches, block.bytes_of(memory), may_pin)


def borrow(block: Block, memory: Any, lender: Any, arrival: Arrival, may_pin: MayPin) -> Any:
    """Queue a copy of a block from another slot's, within `complete()`, which reads it from RAM if it was written to.

    Args:
        lender: a tensor in the other slot's block, of this arrival.

    Returns the seal that it has to have.
    """
    import torch

    queued, stream = _queued.get(), _stream_of(memory)
    queued.streams.add(stream)
    with torch.inference_mode():
        expected = torch.empty_like(arrival.seal, device=memory.device)
    _copy_peer([(memory_of(lender), memory_of(memory)), (arrival.seal, expected)], arrival.event)
    queued.lent.append((stream.record_event(), lender))
    queued.borrowed.append(_Borrowed(block, memory, expected, seal(memory), may_pin))
    queued.bytes_from["peer"] += block.content_size
    return expected


def give_back() -> None:
    """Let go of what the calling slot has borrowed and copied by now."""
    _queued.get().give_back()


def apart(pairs: Sequence[tuple[Any, Home]], device: Any, may_pin: MayPin) -> list[Any]:
    """Copies of these parameters' homes on a CUDA device, each in memory of its own, queued within `complete()`."""
    import torch

    copies = []
    for _, home in pairs:
        with torch.inference_mode(home.tensor.is_inference()):
            copies.append(torch.empty_like(home.tensor, device=device))
    numbers = [number for number, (_, home) in enumerate(pairs) if home.size]
    for region, group in groupby(numbers, lambda number: pairs[number][1].place[0]):
        own = list(group)
        _read(region, [pairs[number][1].place[1] for number in own], [copies[number] for number in own], may_pin)
    return copies


def copy_pinned(region: Any, spans: Sequence[Span], targets: Sequence[Any], pieces: list[Piece]) -> None:
    """Queue copies of pieces of a region's tensors, within its pins' `read`.

    Args:
        spans: where the tensors lie; `pieces` has their numbers.
        targets: tensors on the device, likewise.
    """
    import torch

    with torch.inference_mode():  # Tensors of both kinds may be written to.
        sources, parts = [], []
        for number, start, stop in pieces:
            source, target = region.pins.tensor(spans[number]), targets[number]
            is_whole = stop - start == target.nbytes
            sources.append(source if is_whole else bytes_of(source)[start:stop])
            parts.append(target if is_whole else bytes_of(target)[start:stop])
        torch._foreach_copy_(parts, sources, non_blocking=True)
    _queued.get().bytes_from["pinned"] += sum(stop - start for _, start, stop in pieces)


def is_fast(source: int, target: int) -> bool:
    """Whether a GPU gets bytes faster from that one than from RAM."""
    return source == target or _is_faster_than_ram(source, target)


def _read(region: Any, spans: Sequence[Span], targets: Sequence[Any], may_pin: MayPin) -> None:
    queued, stream = _queued.get(), _stream_of(targets[0])
    queued.streams.add(stream)
    queued.sources.append(region)
    ranges = [(number, span.offset, targets[number].nbytes) for number, span in enumerate(spans)]
    copy = functools.partial(copy_pinned, region, spans, targets)
    for number, start, stop in region.pins.read(ranges, stream, may_pin, copy):
        queued.staging = queued.staging or _Staging()
        source = bytes_of(region.tensor(spans[number]))[start:stop]
        queued.staging.copy(source, bytes_of(targets[number])[start:stop], stream)
        queued.bytes_from["staged"] += stop - start


def _stream_of(tensor: Any) -> Any:
    import torch

    return torch.cuda.current_stream(tensor.device)


def _copy_peer(pairs: Sequence[tuple[Any, Any]], event: Any) -> None:
    """Queue copies from one GPU to another or the same one, whose current stream waits for them."""
    import torch

    source, target = pairs[0][0].device.index, pairs[0][1].device.index
    stream = torch.cuda.current_stream(source) if source == target else _stream_between(source, target)
    stream.wait_event(event)
    with torch.cuda.stream(stream), torch.inference_mode():
        for one, other in pairs:
            other.copy_(one, non_blocking=True)  # Between GPUs torch waits for both streams.


@functools.cache
def _stream_between(source: int, target: int) -> Any:
    """Of the source's device, so that copies do not wait for what is computed there."""
    import torch

    return torch.cuda.Stream(source)  # type: ignore[no-untyped-call]


@functools.cache
def _is_faster_than_ram(source: int, target: int) -> bool:
    """By measuring it once."""
    import torch

    if not torch.cuda.can_device_access_peer(target, source):
        return False
    here, there = (torch.empty(_PROBE, dtype=torch.uint8, device=f"cuda:{index}") for index in (target, source))
    pinned = torch.empty(_PROBE, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(_stream_between(source, target)):
        return _seconds(here, there) < _seconds(here, pinned)


def _seconds(target: Any, source: Any) -> float:
    """Of the fastest copy."""
    import torch

    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(target.device).synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)


class _Staging:
    """Two pinned buffers in turn: one is filled while the other is copied to the device."""

    def __init__(self) -> None:
        import torch

        with torch.inference_mode(False):  # Such tensors may be written to in both modes.
            self._buffers = [torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events: list[Any] = [None, None]
        self._next = 0

    def copy(self, source: Any, target: Any, stream: Any) -> None:
        """Of flat tensors of bytes."""
        import torch

        with torch.inference_mode():
            for start in range(0, source.numel(), _BUFFER):
                part = source[start : start + _BUFFER]
                index, self._next = self._next, 1 - self._next
                if self._events[index] is not None:
                    self._events[index].synchronize()
                buffer = self._buffers[index][: part.numel()]
                buffer.copy_(part)
                target[start : start + part.numel()].copy_(buffer, non_blocking=True)
                self._events[index] = stream.record_event()
