"""Copies from one GPU to another, or to another slot's memory on the same one."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterable
from typing import Any

_PROBE = 64 << 20
_ROUNDS = 3
_streams: dict[tuple[int, int], Any] = {}
_reads: dict[tuple[int, int], Any] = {}  # the last one's event, by GPU and by the stream that it was queued in


def copy(pairs: Iterable[tuple[Any, Any]], events: Collection[Any]) -> None:
    """Queue copies from tensors on GPUs to tensors on another GPU or the same one, whose current stream waits for them.

    Args:
        events: of CUDA, after which the sources are complete.
    """
    import torch

    by_devices: dict[tuple[int, int], list[tuple[Any, Any]]] = {}
    for source, target in pairs:
        by_devices.setdefault((source.device.index, target.device.index), []).append((source, target))
    for devices, together in by_devices.items():
        stream = _stream(*devices) if devices[0] != devices[1] else torch.cuda.current_stream(devices[0])
        for event in events:
            stream.wait_event(event)
        with torch.cuda.stream(stream), torch.inference_mode():  # Tensors of both kinds may be written to.
            sources, targets = zip(*together, strict=True)
            torch._foreach_copy_(targets, sources, non_blocking=True)  # Between GPUs torch waits for both streams.
        _reads[devices[0], stream.cuda_stream] = stream.record_event()


def wait_for_readers(source: int) -> None:
    """Return when nobody copies from this GPU any more."""
    for (gpu, _), event in list(_reads.items()):
        if gpu == source:
            event.synchronize()


def _stream(source: int, target: int) -> Any:
    """Of the source's device, so that copies do not wait for what is computed there."""
    import torch

    if (source, target) not in _streams:
        _streams[source, target] = torch.cuda.Stream(source)  # type: ignore[no-untyped-call]
    return _streams[source, target]


@functools.cache
def is_faster_than_ram(source: int, target: int) -> bool:
    """Whether a GPU gets bytes faster from that one than from pinned memory, by measuring it once."""
    import torch

    if source == target:
        return True
    if not torch.cuda.can_device_access_peer(target, source):
        return False
    here, there = (torch.empty(_PROBE, dtype=torch.uint8, device=f"cuda:{index}") for index in (target, source))
    pinned = torch.empty(_PROBE, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(_stream(source, target)):
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
