"""Memory registered with the CUDA driver, which its copy engines read without a detour."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

logger = logging.getLogger(__name__)

CHUNK = 256 << 20
Piece = tuple[int, int, int]  # of tensor number …, from byte … to byte …
_READ_ONLY = 8  # cudaHostRegisterReadOnly, CUDA Runtime API, "Memory Management"


class Pins:
    """A region's memory, registered chunk by chunk as copies need it. Registering takes about 50 ms per GiB, once.

    Args:
        address, size: of the region, in bytes.
        will_need: tells the kernel to have so many bytes from an offset in RAM.
    """

    def __init__(self, address: int, size: int, will_need: Callable[[int, int], None]) -> None:
        self._address = address
        self._size = size
        self._will_need = will_need
        self._chunks: dict[int, bool] = {}  # False: the driver refused it
        self._streams: set[Any] = set()
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def pinned_bytes(self) -> int:
        return sum(self._length(index) for index, is_pinned in list(self._chunks.items()) if is_pinned)

    def read(
        self,
        ranges: Sequence[tuple[int, int, int]],
        stream: Any,
        may_pin: Callable[[int], bool],
        copy: Callable[[list[Piece]], None],
    ) -> list[Piece]:
        """Have `copy` queue copies of the pieces of these ranges that are pinned, or can be.

        A piece is `(number, start, stop)`, in bytes from the start of its range; none crosses the end of a chunk, as
        the driver wants it.

        Args:
            ranges: `(number, offset, size)`, in bytes from the region's start.
            stream: that the copies are queued in; they are waited for before the memory is given up.
            may_pin: whether so many bytes more may be pinned.

        Returns the pieces that are not pinned.
        """
        ready: list[Piece] = []
        left: list[Piece] = []
        with self._lock:
            self._streams.add(stream)
            for number, offset, size in ranges:
                for start, stop in pieces(offset, size):
                    if start // CHUNK not in self._chunks and ready:
                        copy(ready)  # They run while the next chunk is pinned.
                        ready = []
                    is_pinned = self._is_pinned(start // CHUNK, may_pin)
                    (ready if is_pinned else left).append((number, start - offset, stop - offset))
            if ready:
                copy(ready)
        return left

    def close(self) -> None:
        """Wait for the copies that are queued, unpin the memory and never pin it again."""
        with self._lock:
            self._is_closed = True
            for stream in self._streams:
                stream.synchronize()
            self.unpin()

    def unpin(self) -> None:
        """Give the memory up at once, when nobody reads it any more."""
        pinned = [index for index, is_pinned in self._chunks.items() if is_pinned]
        self._chunks.clear()
        for index in pinned:
            _unregister(self._address + index * CHUNK)

    def _is_pinned(self, index: int, may_pin: Callable[[int], bool]) -> bool:
        if index not in self._chunks and not self._is_closed and may_pin(self._length(index)):
            self._will_need(index * CHUNK, min(2 * CHUNK, self._size - index * CHUNK))  # and the next one
            self._chunks[index] = _register(self._address + index * CHUNK, self._length(index))
        return self._chunks.get(index, False)

    def _length(self, index: int) -> int:
        return min(CHUNK, self._size - index * CHUNK)


def pieces(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """A range, cut at the ends of chunks."""
    start = offset
    while start < offset + size:
        stop = min((start // CHUNK + 1) * CHUNK, offset + size)
        yield start, stop
        start = stop


def _driver() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _register(address: int, size: int) -> bool:
    code = _driver().cudaHostRegister(address, size, _READ_ONLY)
    if int(code):
        _tell_once(str(code))
        _clear_error()
    return not int(code)


def _unregister(address: int) -> None:
    if sys.is_finalizing():
        return
    code = _driver().cudaHostUnregister(address)
    if int(code):
        logger.error("comfy_parallel: the driver does not give weights back: %s", code)
        _clear_error()


def _clear_error() -> None:
    """The runtime keeps a failed call's error for whoever asks next."""
    import torch

    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        logger.debug("cleared: %s", error)


@functools.cache
def _tell_once(code: str) -> None:
    logger.info("comfy_parallel: CUDA does not register weights (%s); they are copied through pinned buffers", code)
