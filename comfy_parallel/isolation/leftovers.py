"""What jobs leave behind in settings that all slots share: ascribed to the job that left it, put back, and said.

A job that runs beside another may have changed a setting for as long as it runs. So a setting that differs from what
it was before is put back once no job runs that may have changed it; a job that began later is not waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_parallel.core.shown import clipped
from comfy_parallel.slots.slot import Slot, current_slot

logger = logging.getLogger(__name__)

ABSENT: Any = object()
UNREADABLE: Any = object()  # Reading it failed: a library may refuse to tell what a job has made of it.
ENVIRONMENT = "environment variable "
_FRESH_S = 0.001  # A slot's next job begins as it found things at the end of the last one, if that is no longer ago.
_MOST = 200  # characters of a value in the log


@dataclass(frozen=True, slots=True)
class Leftover:
    """A setting that a job has left changed.

    `was_sure`: no other job ran that may have done it. `was_chance`: no job meant to; see `SharedSettings`.
    """

    name: str
    value: Any
    before: Any
    was_sure: bool = True
    was_chance: bool = False


class SharedSettings:
    """Settings of the whole process, and which of the running jobs may have changed each.

    Args:
        read: gives all settings by name.
        write: sets one of them, or takes it away where the value is `ABSENT`; returns what it is from then on.
        stays: whether a change, from one value to another, is to be left; asked right after `read`.
        by_chance: whether what a setting is now may come from jobs that each put it back, in an unlucky order; asked
            with whether one job alone may have left it.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Any]],
        write: Callable[[str, Any], Any],
        stays: Callable[[str, Any, Any], bool] = lambda name, before, value: False,
        by_chance: Callable[[str, bool], bool] = lambda name, was_sure: False,
    ) -> None:
        self._read, self._write, self._stays, self._by_chance = read, write, stays, by_chance
        self._lock = threading.Lock()
        self._running: set[Hashable] = set()
        self._seen: dict[str, Any] = {}
        self._before: dict[str, Any] = {}  # of the settings that running jobs may have changed
        self._suspects: dict[str, set[Hashable]] = {}
        self._were_many: set[str] = set()

    def is_running(self, job: Hashable) -> bool:
        """Whether it has begun and not ended."""
        return job in self._running

    def begin(self, job: Hashable, *, is_fresh: bool = False) -> None:
        """A job starts: what was changed until now, it has not changed. `is_fresh`: the last `end` was just now."""
        with self._lock:
            if not is_fresh:
                self._look()
            self._running.add(job)

    def end(self, job: Hashable) -> list[Leftover]:
        """A job has ended. What it, or one that ended before, has left is put back and returned."""
        with self._lock:
            self._look()
            self._running.discard(job)
            if not self._suspects:
                return []
            for suspects in self._suspects.values():
                suspects.discard(job)
            alone = [name for name in {**self._seen, **self._suspects} if self._suspects.get(name, {job}) == set()]
            left = [one for name in alone if (one := self._put_back(name)) is not None]
            if left:  # Some settings are two views of one.
                self._seen = {
                    **self._read(),
                    **{one.name: self._seen[one.name] for one in left if one.name in self._seen},
                }
            return left

    def _look(self) -> None:
        now = dict(self._read())
        if _are_same(now, self._seen):
            return
        for name in {**now, **self._seen}:
            if not _same(now.get(name, ABSENT), self._seen.get(name, ABSENT)):
                self._changed(name, now.get(name, ABSENT), set(self._running))
        self._seen = now

    def _changed(self, name: str, value: Any, suspects: set[Hashable]) -> None:
        before = self._before.get(name, self._seen.get(name, ABSENT))
        self._saw(name, value)
        if not suspects or _same(value, before) or before is UNREADABLE or self._stays(name, before, value):
            # The server's own change, or undone by whoever had made it, or nobody's.
            self._forget(name)
            return
        self._before[name] = before
        self._suspects.setdefault(name, set()).update(suspects)
        if len(suspects) > 1:
            self._were_many.add(name)

    def _put_back(self, name: str) -> Leftover | None:
        """None where there was nothing to do."""
        value, before = self._seen.get(name, ABSENT), self._before[name]
        was_sure = name not in self._were_many
        left = Leftover(name, value, before, was_sure, self._by_chance(name, was_sure))
        self._forget(name)
        try:
            before = self._write(name, before)
        except Exception as error:  # noqa: BLE001 - a setting that cannot be put back must not cost the job its result
            logger.error("%s cannot be put back to %s: %r", name, _shown(name, before), error)
        self._saw(name, before)
        return None if _same(before, value) else left

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
        self._before: Mapping[str, Any] | None = None

    def begin(self, *, is_fresh: bool = False) -> None:
        """The slot's job starts, on the calling thread. `is_fresh`: the last `end` was just now."""
        if not is_fresh or self._before is None:
            self._before = self._read()

    def end(self) -> list[Leftover]:
        """It has ended, on the same thread: what it left is put back and returned."""
        now = self._read()
        found, self._before = self._before or {}, None
        if now is found or _are_same(dict(now), dict(found)):
            self._before = now
            return []
        known = {name: before for name, before in found.items() if before is not UNREADABLE}
        left = [Leftover(name, now[name], before) for name, before in known.items() if not _same(now[name], before)]
        for one in left:
            try:
                self._write(one.name, one.before)
            except Exception as error:  # noqa: BLE001 - as above
                logger.error("%s cannot be put back to %s: %r", one.name, _shown(one.name, one.before), error)
        return left


def tell(slot_name: str, prompt_id: Any, left: list[Leftover]) -> None:
    """Say in the log what was put back; once, where jobs came by it without meaning to."""
    for one in left:
        if one.was_chance:
            if one.name not in _told:
                _told.add(one.name)
                logger.info(
                    "%s: %s were changed by several jobs at once and are put back; said once", slot_name, one.name
                )
            continue
        logger.warning(
            "%s: job %s %s %s at %s; put back to %s. Other jobs share it",
            slot_name,
            clipped(str(prompt_id), _MOST),
            "left" if one.was_sure else "or one that ran beside it left",
            one.name,
            _shown(one.name, one.value),
            _shown(one.name, one.before),
        )


_told: set[str] = set()


def _shown(name: str, value: Any) -> str:
    if value is ABSENT or value is UNREADABLE:
        return "nothing" if value is ABSENT else "what cannot be read"
    return "a value" if name.startswith(ENVIRONMENT) else clipped(repr(value), _MOST)  # It may be a password.


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Quickly whether nothing has changed, as after nearly all jobs; False where that is not known."""
    try:
        return now == before
    except Exception:  # noqa: BLE001 - what a job has put there may refuse to be compared
        return False


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, str | bytes | int | float | tuple) and bool(one == other)


class JobWatch:
    """Puts back and tells what each slot's job leaves: of what all slots share, and of the slot's own thread."""

    def __init__(self, shared: SharedSettings, own_of: Callable[[Slot], OwnSettings]) -> None:
        self._shared, self._own_of = shared, own_of
        self._own: dict[int, tuple[int, OwnSettings]] = {}  # by slot: the worker's thread, and its settings
        self._ended_at: dict[int, float] = {}  # by slot

    def begin(self) -> None:
        """The calling slot's worker is about to run a job."""
        slot = _slot()
        if self._shared.is_running(slot.index):  # Whatever kept the job before from being ended as others are.
            self._shared.end(slot.index)
        thread, own = self._own.get(slot.index, (0, None))
        if own is None or thread != threading.get_ident():
            own = self._own_of(slot)
            self._own[slot.index] = threading.get_ident(), own
        is_fresh = time.monotonic() - self._ended_at.get(slot.index, 0.0) < _FRESH_S
        own.begin(is_fresh=is_fresh)
        self._shared.begin(slot.index, is_fresh=is_fresh)

    def end(self) -> None:
        """The job has ended, and its end is about to be told."""
        slot = _slot()
        left = self._shared.end(slot.index)
        thread, own = self._own.get(slot.index, (0, None))
        if own is not None and thread == threading.get_ident():  # A node pack may end a job on another.
            left += own.end()
        self._ended_at[slot.index] = time.monotonic()
        tell(slot.name, None if slot.run is None else slot.run.prompt_id, left)


def _slot() -> Slot:
    slot = current_slot()
    if slot is None:
        raise RuntimeError("jobs begin and end in slots")
    return slot
