"""Settings of the process or a thread, and whether any of them has changed, in microseconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

_handler_of: Callable[[int], Any] = getattr(signal.getsignal, "__wrapped__", signal.getsignal)  # It names each one.


class Setting(NamedTuple):
    """How a setting is read and set."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


class Glance:
    """Reads settings anew only where one has changed: nearly no job changes any, and this is on the way of each.

    Args:
        signals: the numbers of those that count, with the environment, as settings; None where neither does.
    """

    def __init__(self, settings: Iterable[Setting], signals: tuple[int, ...] | None = None) -> None:
        self._readers = tuple(setting.read for setting in settings)
        self._signals = signals
        self._seen: tuple[Any, ...] = ()
        self._named: dict[str, Any] = {}

    def look(self, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `read()` gives; it is called only when something is not as before."""
        seen = self._look()
        if seen is None or not _are_equal(seen, self._seen):
            self._named = read()
            self._seen = seen or ()
        return self._named

    def _look(self) -> tuple[Any, ...] | None:
        """None when a setting cannot be read."""
        try:
            values: list[Any] = [read() for read in self._readers]
        except Exception:  # noqa: BLE001 - as in `_value`
            return None
        if self._signals is not None:
            values += map(_handler_of, self._signals)
            values.append(dict(environment()))
        return tuple(values)


def _are_equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    try:
        return one == other
    except Exception:  # noqa: BLE001 - what a job has put there may refuse to be compared
        return False


def environment() -> Mapping[bytes, bytes]:
    """The variables as the system has them: several times as fast as what decodes each."""
    encoded: Mapping[bytes, bytes] = getattr(os.environ, "_data", None) or os.environb
    return encoded
