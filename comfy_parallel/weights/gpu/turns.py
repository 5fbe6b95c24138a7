"""Turns of the slots that load at the same time.

Their Python runs faster one after the other than all at once: handing the interpreter over, as every call of torch
does, costs more than what is done in between.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_S = 0.1  # that anybody waits
_lock = threading.Lock()
_waiting: deque[threading.Lock] = deque()
_is_taken = False


@contextmanager
def turn() -> Iterator[None]:
    """The body has the turn; it is over soon, and asks for none itself.

    Who waits longest is next, and who is not let in for long goes on without.
    """
    is_mine = _enter()
    try:
        yield
    finally:
        if is_mine:
            _leave()


def _enter() -> bool:
    global _is_taken
    with _lock:
        if not _is_taken:
            _is_taken = True
            return True
        mine = threading.Lock()
        mine.acquire()
        _waiting.append(mine)
    if mine.acquire(timeout=_LONGEST_S):
        return True
    with _lock:
        if mine in _waiting:
            _waiting.remove(mine)
            return False
    return True  # It has been given meanwhile.


def _leave() -> None:
    global _is_taken
    with _lock:
        if _waiting:
            _waiting.popleft().release()
        else:
            _is_taken = False
