"""Memory registered with the CUDA driver, which its copy engines read without a detour."""

from __future__ import annotations

import functools
import logging
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comfy_parallel.weights.spans import Span, address_of, tensor_in

logger = logging.getLogger(__name__)

CHUNK = 256 << 20
Piece = tuple[int, int, int]  # of tensor number …, from byte … to byte …
_READ_ONLY = 8  # cudaHostRegisterReadOnly, CUDA Runtime API, "Memory Management"
_ENDING = 4  # cudaErrorCudartUnloading: the process ends


class Pins:
    """A region's memory, registered chunk by chunk as copies need it. Registering takes about 50 ms per GiB, once.

    The driver sees a second view of the memory. It refuses a copy of what lies in two chunks, or in one that is
    registered and one that is not; and copies of registered memory outlast the call that asks for them. Whoever copies
    a tensor of the first view, as ComfyUI does when it patches a weight, need not know of either.

    Args:
        fd: what backs the region, open as long as this.
        size: of the region, in bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._view: mmap.mmap | None = None
        self._start = 0  # its address
        self._tensors: dict[Span, Any] = {}  # of the second view
        self._chunks: dict[int, bool] = {}  # False: the driver refused it
        self._registrar: Any = None  # The driver, once it was asked: the only one that unregisters.
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

        Returns the pieces that are not pinned. `copy` gets at those that are by `tensor`.
        """
        ready: list[Piece] = []
        left: list[Piece] = []
        refused: set[int] = set()
        with self._lock:
            self._streams.add(stream)
            for number, offset, size in ranges:
                chunk = offset // CHUNK
                if self._chunks.get(chunk) and offset + size <= (chunk + 1) * CHUNK:
                    ready.append((number, 0, size))  # as nearly all
                    continue
                for start, stop in pieces(offset, size):
                    chunk = start // CHUNK
                    if chunk not in self._chunks and ready:
                        copy(ready)  # They run while the next chunk is pinned.
                        ready = []
                    piece = (number, start - offset, stop - offset)
                    if chunk not in refused and self._is_pinned(chunk, may_pin):
                        ready.append(piece)
                    else:
                        refused.add(chunk)
                        left.append(piece)
            if ready:
                copy(ready)
        return left

    def can_read(self, offset: int, size: int, may_pin: Callable[[int], bool]) -> bool:
        """Whether this range is pinned, or could be now."""
        if (
            self._chunks.get(offset // CHUNK)
            and self._chunks.get((offset + max(size, 1) - 1) // CHUNK)
            and size <= CHUNK
        ):
            return True  # as nearly all, thousands of times in a job
        with self._lock:
            return all(self._is_pinned(start // CHUNK, may_pin) for start, _ in pieces(offset, size))

    def close(self) -> None:
        """Wait for the copies that are queued, unpin the memory and never pin it again."""
        with self._lock:
            self._is_closed = True
            for stream in self._streams:
                stream.synchronize()
            self.unpin()

    def tensor(self, span: Span) -> Any:
        """What lies there, in the view that the driver knows. To be called by `read`'s `copy`."""
        if span not in self._tensors:
            assert self._view is not None
            self._tensors[span] = tensor_in(self._view, span)
        return self._tensors[span]

    def unpin(self) -> None:
        """Give the memory up at once, when nobody reads it any more."""
        pinned = [index for index, is_pinned in self._chunks.items() if is_pinned]
        self._chunks.clear()
        for index in pinned:
            _unregister(self._registrar, self._start + index * CHUNK)
        self._tensors.clear()
        self._view = None

    def _is_pinned(self, index: int, may_pin: Callable[[int], bool]) -> bool:
        if index not in self._chunks and not self._is_closed and may_pin(self._length(index)):
            if self._view is None:
                self._view = mmap.mmap(self._fd, self._size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
                self._start = address_of(self._view)
                self._registrar = _driver()
            ahead = min(2 * CHUNK, self._size - index * CHUNK)
            self._view.madvise(mmap.MADV_WILLNEED, index * CHUNK, ahead)  # this one and the next
            self._chunks[index] = _register(self._registrar, self._start + index * CHUNK, self._length(index))
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


def _register(driver: Any, address: int, size: int) -> bool:
    code = driver.cudaHostRegister(address, size, _READ_ONLY)
    if int(code):
        _tell_once(driver.cudaGetErrorString(code))
        _clear_error()
    return not int(code)


def _unregister(driver: Any, address: int) -> None:
    if sys.is_finalizing():
        return
    code = driver.cudaHostUnregister(address)
    if int(code) not in (0, _ENDING):
        logger.error("comfy_parallel: CUDA does not unregister weights (%s)", driver.cudaGetErrorString(code))
        _clear_error()


def _clear_error() -> None:
    """The runtime keeps a failed call's error for whoever asks next."""
    import torch

    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        logger.debug("cleared: %s", error)


@functools.cache
def _tell_once(why: str) -> None:
    logger.info("comfy_parallel: CUDA does not register weights (%s); they are copied through pinned buffers", why)
