"""A weight file mapped read-only, whose users keep its bytes when the file is overwritten."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from typing import Any
from weakref import WeakValueDictionary

from comfy_parallel.weights.files.leases import Leases
from comfy_parallel.weights.files.regions import Region
from comfy_parallel.weights.spans import Span, tensor_in

logger = logging.getLogger(__name__)

_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2  # Linux, <sys/mman.h>
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
                self.pins.close()
                if self.is_used and not self.is_detached:
                    self._detach()
        finally:
            _leases.give_back(self.fd)

    def _detach(self) -> None:
        import torch

        everything = Span(0, torch.uint8, (self.size,), (1,))
        _copy_in_place(self.address, self.size, mmap.PROT_READ)
        for view in self.private_views:
            _copy_in_place(tensor_in(view, everything).data_ptr(), self.size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.is_detached = True


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
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    copy = libc.mmap(None, length, writable, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    _check(copy != _FAILED)
    ctypes.memmove(copy, address, size)
    _check(libc.mprotect(copy, length, protection) == 0)
    _check(libc.mremap(copy, length, length, _MREMAP_MAYMOVE | _MREMAP_FIXED, address) == address)


def _check(is_done: bool) -> None:
    if not is_done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
