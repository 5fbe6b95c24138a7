"""One gate per CUDA device: while a forward is recorded there, calls that act on the whole device wait.

CUDA refuses to wait for a device on which a recording is under way, and spoils the recording; torch's allocator
refuses to give its cache back. A recording takes a fraction of a second.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_gates: dict[int, threading.Lock] = {}
_thread = threading.local()


@contextmanager
def recording_on(index: int) -> Iterator[None]:
    """Nobody else records on this CUDA device in the body, nor waits for it, nor empties torch's cache."""
    with _gate(index):
        _thread.is_recording = True
        try:
            yield
        finally:
            _thread.is_recording = False


@contextmanager
def no_recording_on(indices: Iterable[int]) -> Iterator[None]:
    """No other thread records on these CUDA devices in the body."""
    with ExitStack() as held:
        if not getattr(_thread, "is_recording", False):  # Who records and waits for who records would wait for ever.
            for index in sorted(indices):
                held.enter_context(_gate(index))
        yield


def wait_for_recording(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.cuda.synchronize`."""
    import torch

    @functools.wraps(original)
    def synchronize(device: Any = None) -> Any:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        with no_recording_on([torch.cuda.current_device() if index is None else index]):
            return original(device)

    return synchronize


def _gate(index: int) -> threading.Lock:
    return _gates.setdefault(index, threading.Lock())
