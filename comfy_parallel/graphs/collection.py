"""Python's garbage collector rests while a forward is recorded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_collection_lock = threading.Lock()
_recorders = 0
_was_collecting = False


@contextmanager
def no_collection() -> Iterator[None]:
    """Freeing another recording or an event in the middle of a capture would spoil it, and what the collector calls, a
    finalizer or a callback of a library's, would be taken for a part of the forward."""
    global _recorders, _was_collecting
    with _collection_lock:
        if not _recorders:
            _was_collecting = gc.isenabled()
        _recorders += 1
        gc.disable()
    try:
        yield
    finally:
        with _collection_lock:
            _recorders -= 1
            if _was_collecting and not _recorders:
                gc.enable()
