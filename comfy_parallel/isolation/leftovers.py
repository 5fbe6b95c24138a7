"""What jobs leave behind in settings that all slots share: ascribed to the job that left it, put back, and said.

A job that runs beside another may have changed a setting for as long as it runs. So a setting that differs from what
it was before is put back once no job runs that may have changed it; a job that began later is not waited for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_parallel.core.shown import clipped
from comfy_parallel.slots.slot import Slot, current_slot

logger = logging.getLogger(__name__)

ABSENT: Any = object()
ENVIRONMENT = "environment variable "
_MOST = 200  # characters of a value in the log


@dataclass(frozen=True, slots=True)
class Leftover:
    """A setting that a job has left changed. `was_sure`: no other job ran that may have done it."""

    name: str
    value: Any
    before: Any
    was_sure: bool = True


class SharedSettings:
    """Settings of the whole process, and which of the running jobs may have changed each.

    Args:
        read: gives all settings by name.
        write: sets one of them, or takes it away where the value is `ABSENT`; returns what it is from then on.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]], write: Callable[[str, Any], Any]) -> None:
        self._read, self._write = read, write
        self._lock = threading.Lock()
        self._running: set[Hashable] = set()
        self._seen: dict[str, Any] = {}
        self._before: dict[str, Any] = {}  # of the settings that running jobs may have changed
        self._suspects: dict[str, set[Hashable]] = {}
        self._were_many: set[str] = set()

    def begin(self, job: Hashable) -> None:
        """A job starts: what was changed until now, it has not changed."""
        with self._lock:
            self._look()
            self._running.add(job)

    def end(self, job: Hashable) -> list[Leftover]:
        """A job has ended. What it, or one that ended before, has left is put back and returned."""
        with self._lock:
            self._look()
            self._running.discard(job)
            for suspects in self._suspects.values():
                suspects.discard(job)
            return [self._put_back(name) for name in [name for name, left in self._suspects.items() if not left]]

    def _look(self) -> None:
        now = dict(self._read())
        for name in now.keys() | self._seen.keys():
            if not _same(now.get(name, ABSENT), self._seen.get(name, ABSENT)):
                self._changed(name, now.get(name, ABSENT), set(self._running))
        self._seen = now

    def _changed(self, name: str, value: Any, suspects: set[Hashable]) -> None:
        before = self._before.get(name, self._seen.get(name, ABSENT))
        self._saw(name, value)
        if not suspects or _same(value, before):  # The server's own change, or undone by whoever had made it.
            self._forget(name)
            return
        self._before[name] = before
        self._suspects.setdefault(name, set()).update(suspects)
        if len(suspects) > 1:
            self._were_many.add(name)

    def _put_back(self, name: str) -> Leftover:
        value, before = self._seen.get(name, ABSENT), self._before[name]
        left = Leftover(name, value, before, name not in self._were_many)
        self._forget(name)
        try:
            before = self._write(name, before)
        except Exception as error:  # noqa: BLE001 - a setting that cannot be put back must not cost the job its result
            logger.error("%s cannot be put back to %s: %r", name, _shown(name, before), error)
        self._saw(name, before)
        return left

    def _saw(self, name: str, value: Any) -> None:
        if value is ABSENT:
            self._seen.pop(name, None)
        else:
            self._seen[name] = value

    def _forget(self, name: str) -> None:
        self._before.pop(name, None)
        self._suspects.pop(name, None)
        self._were_many.discard(name)


class OwnSettings:
    """Settings of a slot's own thread, which only the slot's job can have changed."""

    def __init__(self, read: Callable[[], Mapping[str, Any]], write: Callable[[str, Any], None]) -> None:
        self._read, self._write = read, write
        self._before: Mapping[str, Any] = {}

    def begin(self) -> None:
        """The slot's job starts, on the calling thread."""
        self._before = self._read()

    def end(self) -> list[Leftover]:
        """It has ended, on the same thread: what it left is put back and returned."""
        now = self._read()
        changed = [name for name in self._before if not _same(now.get(name, ABSENT), self._before[name])]
        for name in changed:
            self._write(name, self._before[name])
        return [Leftover(name, now.get(name, ABSENT), self._before[name]) for name in changed]


def tell(slot_name: str, prompt_id: Any, left: list[Leftover]) -> None:
    """Say in the log what was put back."""
    for one in left:
        who = "left" if one.was_sure else "or one that ran beside it left"
        logger.warning(
            "%s: job %s %s %s at %s; put back to %s. Other jobs share it",
            slot_name,
            clipped(str(prompt_id), _MOST),
            who,
            one.name,
            _shown(one.name, one.value),
            _shown(one.name, one.before),
        )


def _shown(name: str, value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    return "a value" if name.startswith(ENVIRONMENT) else clipped(repr(value), _MOST)  # It may be a password.


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, str | int | float | tuple) and bool(one == other)


class JobWatch:
    """Puts back and tells what each slot's job leaves: of what all slots share, and of the slot's own thread."""

    def __init__(self, shared: SharedSettings, own_of: Callable[[Slot], OwnSettings]) -> None:
        self._shared, self._own_of = shared, own_of
        self._own: dict[int, tuple[int, OwnSettings]] = {}  # by slot: the worker's thread, and its settings

    def begin(self) -> None:
        """The calling slot's worker is about to run a job."""
        slot = _slot()
        self._shared.end(slot.index)  # Whatever kept the job before from being ended as others are.
        thread, own = self._own.get(slot.index, (0, None))
        if own is None or thread != threading.get_ident():
            own = self._own_of(slot)
            self._own[slot.index] = threading.get_ident(), own
        own.begin()
        self._shared.begin(slot.index)

    def end(self) -> None:
        """The job has ended, and its end is about to be told."""
        slot = _slot()
        left = self._shared.end(slot.index)
        thread, own = self._own.get(slot.index, (0, None))
        if own is not None and thread == threading.get_ident():  # A node pack may end a job on another.
            left += own.end()
        tell(slot.name, None if slot.run is None else slot.run.prompt_id, left)


def _slot() -> Slot:
    slot = current_slot()
    if slot is None:
        raise RuntimeError("jobs begin and end in slots")
    return slot
