"""What of a load is copied together, and in what order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from comfy_parallel.weights.gpu import homes
from comfy_parallel.weights.gpu.blocks import Block
from comfy_parallel.weights.gpu.homes import Home, Place

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST = 64 << 20  # Bytes that are asked of the driver at once; few, so that copies begin early.
_LARGEST = 512 << 20  # Each time twice as many, up to here.
_SMALL = 1 << 20  # Up to here torch's allocator cuts tensors from 2 MiB (its kSmallSize).
_UNIT = 512  # of its tensors' sizes (its kMinBlockSize).

_lock = threading.Lock()
_claimed: dict[Place, object] = {}


class Part(NamedTuple):
    """Weights that are copied together.

    Attributes:
        homes: of the parameters.
        large, small: bytes on a device of what takes more than `_SMALL` there, and of the rest.
        block: that they lie in, all of them, on the device.
    """

    parameters: Sequence[Any]
    homes: Sequence[Home]
    large: int = 0
    small: int = 0
    block: Block | None = None


def in_block(block: Block, pairs: Sequence[tuple[Any, Home]]) -> Part:
    """Of the parameters that lie in it, with their homes."""
    parameters, sources = zip(*pairs, strict=True)
    return Part(parameters, sources, *_large_and_small(block.size), block)


def apart(pairs: Iterable[tuple[Any, Home]]) -> list[Part]:
    """In the same order, to be copied one by one.

    Args:
        pairs: `(parameter, home)`.
    """
    sized = ((parameter, home, *_large_and_small(home.size)) for parameter, home in pairs)
    made = []
    for together in _cut(sized, lambda one: one[2] + one[3]):
        parameters, sources, large, small = zip(*together, strict=True)
        made.append(Part(parameters, sources, sum(large), sum(small)))
    return made


@contextmanager
def batches(parts: Iterable[Part], target: int) -> Iterator[Iterator[list[Part]]]:
    """Parts to be copied to a GPU together; the body copies each batch before it asks for the next one.

    What neither a GPU has nor another load is about to copy comes first, so that slots that load the same at the same
    time each read a share of it from RAM, and the rest from each other.
    """
    load = object()
    mine: set[Place] = set()  # Two of a load's parts may have the same.
    later: list[Part] = []

    def first() -> Iterator[Part]:
        for part in parts:
            place = part.homes[0].place
            if homes.is_lent(part.homes, target) or not _claim(place, load):
                later.append(part)
            else:
                mine.add(place)
                yield part

    try:
        yield _cut(chain(first(), later), lambda part: part.large + part.small)
    finally:
        with _lock:
            for place in mine:
                del _claimed[place]


def make_room(batch: Iterable[Part], device: Any) -> None:
    """Let torch's allocator have memory for a batch, from which it cuts tensors without asking the driver again."""
    import torch

    large, small = sum(part.large for part in batch), sum(part.small for part in batch)
    try:
        [torch.empty(size, dtype=torch.uint8, device=device) for size in (large, *[_SMALL] * -(-small // _SMALL))]
    except torch.OutOfMemoryError:
        logger.debug("no room on %s for a batch at once", device)


def _large_and_small(size: int) -> tuple[int, int]:
    """What a tensor of so many bytes takes."""
    size = -(-size // _UNIT) * _UNIT
    return (size, 0) if size > _SMALL else (0, size)


def _claim(place: Place, load: object) -> bool:
    with _lock:
        return _claimed.setdefault(place, load) is load


def _cut(things: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    together: list[T] = []
    size, enough = 0, _FIRST
    for thing in things:
        together.append(thing)
        size += size_of(thing)
        if size >= enough:
            yield together
            together, size, enough = [], 0, min(2 * enough, _LARGEST)
    if together:
        yield together
