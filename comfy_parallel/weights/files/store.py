"""The weight files in use, the memory that their tensors lie in, and the budget for what is not page cache."""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from comfy_parallel.weights.files import mapping
from comfy_parallel.weights.files.formats import Identity
from comfy_parallel.weights.files.group import FileState, Group
from comfy_parallel.weights.files.handed import Handed, Made
from comfy_parallel.weights.files.mapping import MappedFile
from comfy_parallel.weights.files.regions import ALIGNMENT, Region, SharedMemory, is_unwritten, origin_of, span_of
from comfy_parallel.weights.spans import Span

logger = logging.getLogger(__name__)

_CHUNK = 64 << 20


class WeightFile:
    """One file's bytes, and what was converted from them: to another dtype or layout, once for all slots."""

    def __init__(self, path: str, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self.lock = threading.Lock()
        self.content: Region | None = None
        self.index: Any = None  # where in the content the tensors are; made by who reads the file
        self.handed = Handed(None, None, self)
        self._converted: dict[tuple[Region, Span, Any], Made] = {}
        self._arenas: list[SharedMemory] = []

    def regions(self) -> list[Region]:
        return [*([] if self.content is None else [self.content]), *self._arenas]

    @property
    def is_outdated(self) -> bool:
        """Whether somebody wrote to the file after it was mapped."""
        return isinstance(self.content, MappedFile) and not self.content.is_current

    @property
    def is_used(self) -> bool:
        return any(region.is_used for region in self.regions())

    @property
    def slots(self) -> list[int]:
        """The slots whose models alias this file, or that have read it and keep what they read, as of a LoRA."""
        origins = [origin for region in self.regions() for origin in region.users]
        return sorted({origin.slot_index for origin in origins if origin.slot_index is not None})

    @property
    def mapped_bytes(self) -> int:
        is_mapped = isinstance(self.content, MappedFile) and not self.content.is_detached
        return self.content.size if is_mapped and self.content is not None else 0

    @property
    def copied_bytes(self) -> int:
        """The file's bytes in memory of our own."""
        return 0 if self.content is None or self.mapped_bytes else self.content.size

    @property
    def pinned_bytes(self) -> int:
        return sum(region.pins.pinned_bytes for region in self.regions())

    @property
    def counted_bytes(self) -> int:
        """What counts against the budget: all but the page cache, unless that is pinned."""
        pinned = self.content.pins.pinned_bytes if self.mapped_bytes and self.content is not None else 0
        return self.copied_bytes + self.converted_bytes + pinned

    @property
    def own_bytes(self) -> int:
        """The same without what the processes of a group have in common."""
        shared = (one for one in self.regions() if isinstance(one, SharedMemory) and one.number is not None)
        return self.counted_bytes - sum(one.size if one is self.content else one.used for one in shared)

    @property
    def converted_bytes(self) -> int:
        return sum(arena.used for arena in self._arenas)

    @contextmanager
    def private_view(self) -> Iterator[mmap.mmap]:
        """The content to write to, kept as it is until the body's tensors are there.

        Raises:
            OSError: when the file was overwritten after it was opened.
        """
        assert self.content is not None
        with self.content.lock if isinstance(self.content, MappedFile) else nullcontext():
            if self.is_outdated:
                raise _overwritten(self.path)
            yield self.content.private_view()

    def converted(self, region: Region, span: Span, dtype: Any, slot_index: int | None) -> Any:
        """The tensor at `span` as `dtype`, contiguous and aligned, in memory that all slots share."""
        with self.lock:
            key = (region, span, dtype)
            if key not in self._converted:
                self._converted[key] = self._find_converted(region, span, dtype)
            arena, place = self._converted[key]
            return arena.tensor(place, slot_index)

    def _find_converted(self, region: Region, span: Span, dtype: Any) -> Made:
        def convert() -> Made:
            source = region.tensor(span)
            arena = self._arena(source.numel() * dtype.itemsize)
            place = arena.append(source, dtype)
            region.release_pages(span)
            return arena, place

        number = region.number if isinstance(region, SharedMemory) else 0  # 0: the file itself
        if number is None:
            return convert()  # of what others do not have
        made = self.handed.made_once((number, span, dtype), convert, lambda: not region.is_lost)
        if made[0] not in self._arenas:
            self._arenas.insert(0, made[0])
        return made

    def drop_unused(self) -> None:
        """Give back what no tensor lies in. Does nothing while another thread converts."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            for arena in [arena for arena in self._arenas if not arena.is_used]:
                self._arenas.remove(arena)
                self.handed.release(arena)
            kept = set(self.regions())
            self._converted = {key: made for key, made in self._converted.items() if {key[0], made[0]} <= kept}
            if not self.is_used:
                self.content = self.index = None
                self._arenas, self._converted = [], {}
                self.handed.close()
        finally:
            self.lock.release()

    def _arena(self, size: int) -> SharedMemory:
        if not self._arenas or not self._arenas[-1].has_room(size):
            self._arenas.append(SharedMemory(max(_CHUNK, size), self))
        return self._arenas[-1]


class Store:
    """All weight files.

    Args:
        mode: `map` files where they can be guarded against being overwritten, else `copy` them.
        budget_bytes: for copies, conversions and what is pinned; beyond it those that nobody uses go, least recently
            used first.
        pins: whether memory may be pinned at all.
        group: the processes that share what is copied and converted; the budget is all theirs.
    """

    def __init__(self, mode: str, budget_bytes: int, *, pins: bool = True, group: Group | None = None) -> None:
        self.mode = mode
        self._group = group
        self._pins = pins
        self.budget_bytes = budget_bytes
        self._files: OrderedDict[Identity, WeightFile] = OrderedDict()
        self._outdated: list[WeightFile] = []
        self._lock = threading.Lock()
        self._has_told = False

    def join(self, group: Group) -> None:
        """Share with this group what is made of files that are opened from now on, unless it is in one already."""
        if self._group is None:
            self._group = group

    def files(self) -> list[WeightFile]:
        with self._lock:
            return [*self._outdated, *self._files.values()]

    @property
    def used_bytes(self) -> int:
        """What counts against the budget."""
        if self._group is None:
            return sum(file.counted_bytes for file in self.files())
        return self._group.used_bytes() + sum(file.own_bytes for file in self.files())

    def find(self, path: str) -> WeightFile:
        """The file that a path names now.

        Raises:
            OSError: when it cannot be read.
        """
        identity = Identity.of(path)
        with self._lock:
            file = self._files.get(identity)
            if file is None or file.is_outdated:
                if file is not None:
                    self._outdated.append(file)
                file = self._files[identity] = WeightFile(path, identity)
            self._files.move_to_end(identity)
            file.path = path
        return file

    @contextmanager
    def opened(self, path: str) -> Iterator[WeightFile]:
        """The file that a path names now, locked.

        Raises:
            OSError: when it cannot be read.
        """
        while True:
            file = self.find(path)
            with file.lock:
                if self._files.get(file.identity) is file:  # else it was dropped before we had the lock
                    yield file
                    return

    def content(self, file: WeightFile) -> Region:
        """The file's bytes, mapped or copied; the caller holds the file's lock.

        Raises:
            OSError: when they cannot be read, or are no longer those that `find` saw.
        """
        if file.content is None:
            content = self._mapped(file) if self.mode == "map" else None
            if content is not None:
                self.hand(file, content.fd)
            content = content or self._copied(file)
            if Identity.of(content.fd if isinstance(content, MappedFile) else file.path) != file.identity:
                raise _overwritten(file.path)
            file.content = content
        return file.content

    def hand(self, file: WeightFile, opened: int | str) -> None:
        """Share from now on what is made of the bytes that a file has now; the caller holds its lock.

        Raises:
            OSError: when it cannot be looked at.
        """
        if self._group is not None:
            file.handed.close()
            file.handed = Handed(self._group, FileState.of(opened), file)

    def shared(self, tensor: Any, dtype: Any, slot_index: int | None, *, must_align: bool) -> Any:
        """The same numbers in shared memory, contiguous; None for a tensor that does not come unchanged from a file.

        Args:
            must_align: torch computes on the CPU with it.
        """
        import torch

        origin = origin_of(tensor)
        if origin is None:
            return None
        span = span_of(tensor, origin)
        view = origin.region.tensor(span, slot_index)
        if origin.is_private and not (is_unwritten(tensor) or torch.equal(tensor, view)):
            return None
        is_aligned = view.data_ptr() % (ALIGNMENT if must_align else dtype.itemsize) == 0
        if dtype == tensor.dtype and span.is_contiguous and is_aligned:
            return view
        return origin.region.file.converted(origin.region, span, dtype, slot_index)

    def keep_to_budget(self) -> None:
        """Forget files that nobody uses: what is mapped costs a lease, what is copied costs memory."""
        for file in self.files():
            if self.used_bytes > self.budget_bytes or not file.counted_bytes or file.is_outdated:
                self._drop(file)

    def may_pin(self, size: int) -> bool:
        """Whether so many bytes more fit into the budget; what nobody uses makes room."""
        if not self._pins:
            return False
        for file in self.files():
            if self.used_bytes + size > self.budget_bytes:
                self._drop(file)
        return self.used_bytes + size <= self.budget_bytes

    def drop_unused(self) -> None:
        """Give back all that nobody uses."""
        for file in self.files():
            self._drop(file)

    def let_go(self, path: Any) -> None:
        """Let a file be overwritten by this process, which may not wait for itself."""
        try:
            stat = os.stat(path)
        except OSError:  # It is new, or the writer says better what is wrong.
            return
        for file in self.files():
            is_it = (file.identity.device, file.identity.inode) == (stat.st_dev, stat.st_ino)
            if is_it and isinstance(file.content, MappedFile):
                file.content.let_go()

    def on_loss(self, note: Callable[[MappedFile, OSError], None]) -> None:
        """Have this called with each mapping whose bytes could not be kept, and why; on any thread."""
        mapping.on_loss = note

    def has_changed(self, file: WeightFile, opened: int | str) -> bool:
        """Whether anybody has written to a file since `hand`. Raises OSError."""
        return file.handed.state is not None and FileState.of(opened) != file.handed.state

    def _drop(self, file: WeightFile) -> None:
        file.drop_unused()
        with self._lock:
            if file.regions() or file.lock.locked():
                return
            if file in self._outdated:
                self._outdated.remove(file)
            elif self._files.get(file.identity) is file:
                del self._files[file.identity]

    def _mapped(self, file: WeightFile) -> Region | None:
        try:
            return MappedFile(file.path, file)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            if not self._has_told:
                logger.info("comfy_parallel: weight files are copied into shared memory, not mapped: %s", error)
            self._has_told = True
            return None

    def _copied(self, file: WeightFile) -> Region:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if Identity.of(fd) != file.identity:
                raise _overwritten(file.path)
            self.hand(file, fd)
            return file.handed.made_once(
                "content", lambda: (_read(file, fd), None), lambda: not self.has_changed(file, fd)
            )[0]
        finally:
            os.close(fd)


def _read(file: WeightFile, fd: int) -> SharedMemory:
    memory = SharedMemory(file.identity.size, file)
    memory.read_file(fd)
    return memory


def _overwritten(path: str) -> OSError:
    return OSError(f"{path} was overwritten while it was loaded; submit the job again")
