"""`sys.stdout` and `sys.stderr` that a job puts something else in place of: for its own slot."""

from __future__ import annotations

import sys
from typing import Any

from comfy_parallel.slots.own_names import OwnName

NAMES = ("stdout", "stderr")


class _Routed:
    """Stands in for a stream, and is each slot's own one. A slot's streams lie on each other as they were put there."""

    def __init__(self, stream: Any) -> None:
        self._shared = stream
        self._own = OwnName(lambda: (self._shared,), is_host=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own.get()[-1], name)

    def __iter__(self) -> Any:
        return iter(self._own.get()[-1])

    def put(self, stream: Any) -> None:
        """Have the calling slot use `stream` from now on; an earlier one, or this object, takes later ones away."""
        streams = self._own.get()
        if stream is self:
            self._set(streams[:-1])
        elif any(stream is one for one in streams):
            self._set(streams[: next(place for place, one in enumerate(streams) if one is stream) + 1])
        else:
            self._set((*streams, stream))

    def _set(self, streams: tuple[Any, ...]) -> None:
        if len(streams) > 1:
            self._own.set(streams)
        else:
            self._own.forget()


def put(name: str, stream: Any) -> None:
    """What `sys.stdout = stream` does in a job."""
    found = getattr(sys, name)
    if not isinstance(found, _Routed):
        found = _Routed(found)
        setattr(sys, name, found)
    found.put(stream)


def below(name: str) -> Any:
    """The stream of the process, whatever lies on it in the calling slot."""
    found = getattr(sys, name)
    return found._shared if isinstance(found, _Routed) else found


def put_below(name: str, stream: Any) -> None:
    """Set that one."""
    found = getattr(sys, name)
    if isinstance(found, _Routed):
        found._shared = stream
    else:
        setattr(sys, name, stream)


def revert() -> None:
    """Put the streams back. Only sensible while no job runs."""
    for name in NAMES:
        found = getattr(sys, name)
        if isinstance(found, _Routed):
            setattr(sys, name, found._shared)
