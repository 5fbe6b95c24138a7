"""Read-only memory that tensors of several slots lie in."""

from __future__ import annotations

import mmap
import os
from typing import Any
from weakref import ref

from comfy_parallel.weights.gpu.pins import Pins
from comfy_parallel.weights.spans import Span, address_of, tensor_in

ALIGNMENT = 64  # What torch's CPU kernels expect of memory of its own; sums may depend on it.
_TAG = "comfy_parallel_origin"
_PAGEMAP = "/proc/self/pagemap"
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61  # Linux, Documentation/admin-guide/mm/pagemap.rst


class Origin:
    """Where the memory of a tensor's storage comes from; it lives exactly as long as the storage.

    `is_private`: the storage is a copy-on-write view of the region, which its owner may have written to.
    """

    def __init__(self, region: Region, offset: int, slot_index: int | None, *, is_private: bool) -> None:
        self.region = region
        self.offset = offset
        self.slot_index = slot_index
        self.is_private = is_private
        region.note_user(self)


class Region:
    """Memory that cannot be written through its tensors. It goes with the last of them, and its owner's reference.

    Args:
        fd: what backs it; closed with the region.
        size: in bytes.
        file: the weight file whose bytes these are.

    Attributes:
        is_lost: whether its bytes are no longer those that its users were given.
    """

    fd = -1
    is_lost = False

    def __init__(self, fd: int, size: int, file: Any) -> None:
        self.fd = fd
        self.size = size
        self.file = file
        self._users: set[ref[Origin]] = set()
        self._private_views: set[ref[mmap.mmap]] = set()
        self._memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self.pins = Pins(fd, size)

    def __del__(self) -> None:
        if "pins" in vars(self):  # else it could not be mapped
            self.pins.unpin()  # Who copies holds the region until the copy is complete.
        if self.fd >= 0:
            os.close(self.fd)

    @property
    def address(self) -> int:
        """Of the first byte."""
        return address_of(self._memory)

    @property
    def users(self) -> list[Origin]:
        """One for each storage in this memory."""
        return [user for one in list(self._users) if (user := one()) is not None]

    @property
    def is_used(self) -> bool:
        return any(one() is not None for one in list(self._users))

    @property
    def private_views(self) -> list[mmap.mmap]:
        return [view for one in list(self._private_views) if (view := one()) is not None]

    def note_user(self, user: Origin) -> None:
        self._users.add(ref(user, self._users.discard))

    def tensor(self, span: Span, slot_index: int | None = None) -> Any:
        """A tensor of this memory: no copy. Whoever writes to it ends the process."""
        tensor = tensor_in(self._memory, span)
        tag(tensor, Origin(self, span.offset, slot_index, is_private=False))
        return tensor

    def private_view(self) -> mmap.mmap:
        """The same bytes to write to: pages that are written become the writer's own."""
        view = mmap.mmap(self.fd, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._private_views.add(ref(view, self._private_views.discard))
        return view

    def private_tensor(self, view: mmap.mmap, span: Span, slot_index: int | None = None) -> Any:
        """A tensor in a private view, that remembers which bytes it began with."""
        tensor = tensor_in(view, span)
        tag(tensor, Origin(self, span.offset, slot_index, is_private=True))
        return tensor

    def release_pages(self, span: Span) -> None:
        """Say that this part is not needed for now; it stays in the page cache."""
        first = -(-span.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (span.offset + span.extent) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


class SharedMemory(Region):
    """Anonymous memory, filled piece by piece, to be read by all slots.

    Args:
        made_by_another: the descriptor of such a memory of another process, which nothing is added to here.

    Attributes:
        used: how many bytes of it count.
        number: what the processes of a group call it; None while it is this process's own.
    """

    def __init__(self, size: int, file: Any, *, made_by_another: int | None = None) -> None:
        self._may_grow = made_by_another is None
        self.used = 0
        self.number: int | None = None
        if made_by_another is None:
            self.fd = os.memfd_create("comfy_parallel weights", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size)
        else:
            self.fd = made_by_another
        super().__init__(self.fd, size, file)

    def has_room(self, size: int) -> bool:
        return self._may_grow and _aligned(self.used) + size <= self.size

    def append(self, source: Any, dtype: Any) -> Span:
        """Copy a tensor to the end, converted to `dtype`, contiguous."""
        span = Span.contiguous(_aligned(self.used), dtype, tuple(source.shape))
        self.used = span.offset + source.numel() * dtype.itemsize
        if source.numel():
            start = span.offset // mmap.PAGESIZE * mmap.PAGESIZE
            window = mmap.mmap(self.fd, self.used - start, offset=start)
            tensor_in(window, span._replace(offset=span.offset - start)).copy_(source)
        return span

    def read_file(self, fd: int) -> None:
        """Fill it with a file's bytes."""
        while self.used < self.size:
            count = os.sendfile(self.fd, fd, self.used, self.size - self.used)
            if not count:
                raise OSError(f"the file was cut off at byte {self.used} of {self.size} while it was read")
            self.used += count


def tag(tensor: Any, origin: Origin) -> None:
    """Say where a tensor's memory comes from. Views of the tensor share its storage, and so the tag."""
    setattr(tensor.untyped_storage(), _TAG, origin)


def origin_of(tensor: Any) -> Origin | None:
    return getattr(tensor.untyped_storage(), _TAG, None)


def is_shared(tensor: Any) -> bool:
    """Whether a tensor lies in memory that must not be written."""
    if tensor.device.type != "cpu":
        return False
    origin = origin_of(tensor)
    return origin is not None and not origin.is_private


def span_of(tensor: Any, origin: Origin) -> Span:
    return Span.of(tensor, origin.offset + tensor.storage_offset() * tensor.dtype.itemsize)


def is_unwritten(tensor: Any) -> bool:
    """Whether no page of a copy-on-write tensor was written to, as the kernel's page table says."""
    size = Span.of(tensor, 0).extent
    first = tensor.data_ptr() // mmap.PAGESIZE
    count = (tensor.data_ptr() + max(size, 1) - 1) // mmap.PAGESIZE - first + 1
    try:
        entries = _page_entries(first, count)
    except OSError:  # no Linux, or a sandbox without it
        return False
    here = (entries & (_PRESENT | _SWAPPED)) != 0
    return not (here & ((entries & _OF_FILE) == 0)).any()


def _page_entries(first: int, count: int) -> Any:
    import numpy as np

    with open(_PAGEMAP, "rb", buffering=0) as pagemap:
        data = os.pread(pagemap.fileno(), count * 8, first * 8)
    if len(data) != count * 8:
        raise OSError(f"{_PAGEMAP}: {len(data)} bytes for {count} pages")
    return np.frombuffer(data, dtype=np.uint64)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
