"""Single weights that a host with dynamic VRAM copies to the GPU whenever it needs them.

The host keeps a pinned copy of each in RAM, for each model, and so for each slot. Here they come from the one mapping
of their file that all slots share.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from comfy_parallel.slots.slot import SlotLocal, current_index
from comfy_parallel.weights.files.regions import Origin, Region, origin_of, span_of
from comfy_parallel.weights.gpu import copies
from comfy_parallel.weights.gpu.homes import Place

if TYPE_CHECKING:  # Linux only
    from comfy_parallel.weights.files.store import Store
    from comfy_parallel.weights.spans import Span

_HOSTS_SLICE = "_comfy_tensor_file_slice"  # the host's note on a storage: where in a file it lies
_OWN_SLICE = "comfy_parallel_slice"


class _Running:
    """The calling slot's copies that may still run. The regions they read are kept until they are over."""

    def __init__(self) -> None:
        self._regions: dict[Region, set[Any]] = {}  # and the streams that copy from each
        self._ending: deque[tuple[list[Any], Region]] = deque()  # and events after their last copies
        self._lock = threading.Lock()  # A node may have threads of its own.

    def add(self, stream: Any, region: Region) -> None:
        """A copy is queued. Nothing is recorded yet: there are thousands of them in a job."""
        streams = self._regions.get(region)
        if streams is None or stream not in streams:
            with self._lock:
                self._regions.setdefault(region, set()).add(stream)

    def drop_finished(self) -> None:
        with self._lock:
            copied, self._regions = self._regions, {}
            self._ending.extend(([stream.record_event() for stream in streams], one) for one, streams in copied.items())
            while self._ending and all(event.query() for event in self._ending[0][0]):
                self._ending.popleft()


_running: SlotLocal[_Running] = SlotLocal(_Running)


def between_jobs() -> None:
    """Let go of what the calling slot's copies have read."""
    _running.get().drop_finished()


def is_mapped_by_host(tensor: Any) -> bool:
    """Whether the host has mapped the tensor's file itself, to read it when it needs it."""
    return hasattr(tensor.untyped_storage(), _HOSTS_SLICE)


def note_slices(content: Region, tensors: Iterable[Any]) -> None:
    """Remember where in a file's content these tensors lie, those that the host has mapped itself."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        file_slice = getattr(storage, _HOSTS_SLICE, None)
        if file_slice is not None and file_slice.offset + file_slice.size <= content.size:
            origin = Origin(content, file_slice.offset, current_index(), is_private=False)
            setattr(storage, _OWN_SLICE, origin)


def can_stream(store: Store, tensors: Iterable[Any]) -> bool:
    """Whether these tensors all lie in registered memory that slots share, or can: nobody need pin copies of them.

    Args:
        tensors: None among them does not count; quantised ones count with their numbers.
    """
    found = [getattr(tensor, "_qdata", tensor) for tensor in tensors if tensor is not None]
    places = [_place_of(tensor) for tensor in found]
    return bool(found) and all(
        place is not None and place[0].pins.can_read(place[1].offset, tensor.nbytes, store.may_pin)
        for tensor, place in zip(found, places, strict=True)
    )


def are_on_gpus(tensors: Iterable[Any]) -> bool:
    """Whether these tensors, apart from None, live on GPUs: a copy in RAM would only be a detour."""
    found = [tensor for tensor in tensors if tensor is not None]
    return bool(found) and all(tensor.device.type == "cuda" for tensor in found)


def fetched(store: Store, tensor: Any, device: Any, stream: Any, target: Any = None) -> Any:
    """A copy of a tensor on a GPU, queued; None if it does not lie in memory that the GPU reads without a detour.

    Args:
        stream: CUDA's; None for the current one.
        target: where to; by default new memory of that stream.
    """
    import torch

    if not can_stream(store, [tensor]):
        return None
    if target is None:
        with torch.cuda.stream(stream):
            target = torch.empty_like(tensor, device=device)
    return target if copy_in(store, tensor, target, stream) else None


def copy_in(store: Store, tensor: Any, target: Any, stream: Any) -> bool:
    """Queue a copy of a tensor to the GPU.

    Args:
        target: of the tensor's dtype and shape.
        stream: CUDA's; None for the current one.

    Returns whether that was possible. If not, some of it may be queued all the same.
    """
    import torch

    place = _place_of(tensor) if type(tensor) in (torch.Tensor, torch.nn.Parameter) else None
    if place is None or (target.dtype, target.shape) != (tensor.dtype, tensor.shape) or not target.is_contiguous():
        return False
    queue = torch.cuda.current_stream(target.device)
    if stream is None or stream == queue:  # as the host asks
        return _copy(store, *place, target, queue)
    with torch.cuda.stream(stream):
        return _copy(store, *place, target, torch.cuda.current_stream(target.device))


def _copy(store: Store, region: Region, span: Span, target: Any, queue: Any) -> bool:
    left = region.pins.read(
        [(0, span.offset, target.nbytes)],
        queue,
        store.may_pin,
        lambda pieces: copies.copy_pinned(region, [span], [target], pieces),
    )
    _running.get().add(queue, region)
    return not left


def _place_of(tensor: Any) -> Place | None:
    """Where a contiguous tensor lies; None if that is in no region."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        return None
    origin: Origin | None = getattr(tensor.untyped_storage(), _OWN_SLICE, None) or origin_of(tensor)
    if origin is None or origin.is_private:
        return None
    return origin.region, span_of(tensor, origin)
