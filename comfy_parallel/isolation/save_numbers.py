"""File numbers that no two slots share.

The host lists a folder, takes the highest number plus one and writes later; two slots doing so at once
write the same file. Here the number is a reservation: it looks like the int the host returns, adding 1
reserves the next free one, and an unused one is given back when it is dropped.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_reserved: dict[tuple[str, str], _Series] = {}
_dropped: deque[tuple[tuple[str, str], int, bool]] = deque()
_listings = 0


class _Series:
    """Reservations of one folder and file name prefix."""

    def __init__(self) -> None:
        self.highest = 0
        self.live = 0


class Counter(int):
    """A reserved file number. Formatting it marks it used."""

    _key: tuple[str, str]
    _is_used: bool
    _following: dict[int, Counter]

    @classmethod
    def reserve(cls, key: tuple[str, str], at_least: int) -> Counter:
        """The first number from `at_least` on that nobody holds."""
        with _lock:
            _forget_dropped()
            series = _reserved.setdefault(key, _Series())
            number = max(at_least, series.highest + 1)
            series.highest, series.live = number, series.live + 1
        counter = cls(number)
        counter._key, counter._is_used, counter._following = key, False, {}
        return counter

    def __add__(self, other: Any) -> Any:
        if type(other) is not int or other < 1:
            return int(self) + other
        if other not in self._following:
            self._following[other] = Counter.reserve(self._key, int(self) + other)
        return self._following[other]

    __radd__ = __add__

    def __format__(self, spec: str) -> str:
        self._is_used = True
        return format(int(self), spec)

    def __str__(self) -> str:
        self._is_used = True
        return int.__repr__(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __del__(self) -> None:
        # No lock here: the garbage collector may run this on a thread that holds it.
        _dropped.append((self._key, int(self), self._is_used))


def _forget_dropped() -> None:
    while _dropped:
        key, number, is_used = _dropped.popleft()
        series = _reserved[key]
        series.live -= 1
        if not is_used and number == series.highest:
            series.highest -= 1
    if _listings == 0:
        for key in [key for key, series in _reserved.items() if series.live == 0]:
            del _reserved[key]


@contextmanager
def _listing() -> Iterator[None]:
    """A folder is being listed: files written since must not be forgotten, the listing may lack them."""
    global _listings
    with _lock:
        _forget_dropped()
        _listings += 1
    try:
        yield
    finally:
        with _lock:
            _listings -= 1


def reserving(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap the host's `get_save_image_path`."""

    @functools.wraps(original)
    def get_save_image_path(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with _listing():
            folder, filename, counter, *rest = original(*args, **kwargs)
            key = (os.path.normcase(os.path.abspath(folder)), os.path.normcase(filename))
            reserved = Counter.reserve(key, counter)
        return (folder, filename, reserved, *rest)

    return get_save_image_path
