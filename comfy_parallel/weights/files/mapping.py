"""A weight file mapped read-only, whose users keep its bytes when the file is overwritten.

Where that fails, as where there is no memory for a copy, they must not compute with other bytes: the mapping is `lost`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from comfy_parallel.weights.files.leases import Leases
from comfy_parallel.weights.files.regions import Region
from comfy_parallel.weights.spans import Span, tensor_in

logger = logging.getLogger(__name__)

_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2  # Linux, <sys/mman.h>
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value


class MappedFile(Region):
    """The bytes of a file as they were when it was opened.

    Raises:
        OSError: when the file cannot be mapped, or cannot be guarded against being overwritten.
    """

    def __init__(self, path: str, file: Any) -> None:
        self.lock = threading.Lock()
        self.is_current = True
        self.is_detached = False
        self.is_lost = False
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        super().__init__(self.fd, os.fstat(self.fd).st_size, file)
        _by_fd[self.fd] = self
        if not _leases.take(self.fd):
            raise OSError(f"{path}: its file system or its owner does not let us guard it against being overwritten")

    def __del__(self) -> None:
        _leases.give_back(self.fd)
        super().__del__()

    def release_pages(self, span: Span) -> None:
        with self.lock:
            if not self.is_detached:  # Then the pages are in no file any more.
                super().release_pages(span)

    def let_go(self) -> None:
        """Let others write to the file; whoever uses its tensors keeps the old bytes, now in memory of our own."""
        try:
            with self.lock:
                self.is_current = False
                try:
                    self.pins.close()
                finally:
                    if self.is_used and not self.is_detached:
                        self._detach()
        finally:
            _leases.give_back(self.fd)

    def _detach(self) -> None:
        import torch

        everything = Span(0, torch.uint8, (self.size,), (1,))
        mappings = [(self.address, mmap.PROT_READ)]
        for view in self.private_views:
            mappings.append((tensor_in(view, everything).data_ptr(), mmap.PROT_READ | mmap.PROT_WRITE))
        self.is_detached = True
        try:
            while mappings:
                _copy_in_place(mappings[0][0], self.size, mappings[0][1])
                mappings.pop(0)
        except OSError as error:
            self.is_lost = True
            on_loss(self, error)
            for address, protection in mappings:
                _blank(address, self.size, protection)  # What was cut off ends the process when it is read.


def _tell_of_loss(region: MappedFile, error: OSError) -> None:
    logger.critical("comfy_parallel: a weight file in use was overwritten, and its bytes could not be kept: %s", error)


#: Called with a mapping whose bytes could not be kept, and why; on any thread.
on_loss: Callable[[MappedFile, OSError], None] = _tell_of_loss


def _broken(fd: int) -> None:
    region = _by_fd.get(fd)
    if region is not None:
        logger.info("comfy_parallel: a weight file in use is being overwritten; running jobs keep its old bytes")
        region.let_go()


_by_fd: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()
_leases = Leases(_broken)


def _copy_in_place(address: int, size: int, protection: int) -> None:
    """Replace a mapping of a file by memory with the same bytes at the same place; readers notice nothing.

    Copy-on-write pages would not do: cutting a file off takes those away too.

    Raises:
        OSError: when there is no memory for it; the mapping is as before.
    """
    libc, length = _libc(), _in_pages(size)
    copy = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    _check(copy != _FAILED)
    try:
        ctypes.memmove(copy, address, size)
        _check(libc.mprotect(copy, length, protection) == 0)
        _check(libc.mremap(copy, length, length, _MREMAP_MAYMOVE | _MREMAP_FIXED, address) == address)
    except OSError:
        libc.munmap(copy, length)
        raise


def _blank(address: int, size: int, protection: int) -> None:
    """Replace a mapping of a file by zeros, which take no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
    _check(_libc().mmap(address, _in_pages(size), protection, flags, -1, 0) == address)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return libc


def _in_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _check(is_done: bool) -> None:
    if not is_done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
