"""File numbers that no two running jobs share.

The host lists a folder, takes the highest number plus one and writes later; two jobs doing so at once write the same
file. Here a number belongs to the job that asked for it until the job has ended: by then its file exists, or the number
is free again. What becomes of the number in between, and who keeps it, does not matter.

A node that saves a batch asks once and counts on. If it adds to the number that it was given, it gets numbers that
nobody else holds. If it makes a plain one of it first, we do not see it count; so nobody gets the hundred after it.

Other processes may save into the same folders (`share`): they tell what their jobs hold, and what jobs held that have
ended, with the time, for one of them may end while a folder is listed here, and its files are not in that list.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from comfy_parallel.isolation.shared_numbers import Held, SharedNumbers
from comfy_parallel.slots.slot import Run, current_runs, current_slot

Series = tuple[str, str]  # a folder, and what its files are named before the number

_ROOM = 100
_FARTHEST = 10_000  # Who adds more than this to a number does not count files.
_KEPT_S = 60.0  # for so long other processes are told what an ended job held: longer than they list a folder

_lock = threading.RLock()
_holders: dict[Series, dict[int, Run]] = {}
_listings = 0
_ended_at: dict[Run, float] = {}  # jobs in `_holders` that have ended
_shared: SharedNumbers | None = None
_others: dict[Series, list[tuple[int, int, float | None]]] = {}  # what other processes tell
_is_told = False  # within `_told`


def share(shared: SharedNumbers | None) -> None:
    """From now on tell other processes what is held here, and hold nothing that they hold; None ends it."""
    global _shared
    with _lock:
        _shared = shared
    _tell_end()


@contextmanager
def _told() -> Iterator[None]:
    """The body may change who holds what, and the other processes see it done or not begun."""
    global _is_told
    with _lock:
        if _shared is None or _is_told:
            yield
            return
        with _shared.locked():
            _learn(_shared.others())
            _is_told = True
            try:
                yield
            finally:
                _is_told = False
                _shared.tell(_own())


def _learn(held: Held) -> None:
    _others.clear()
    for folder, name, first, last, ended_at in held:
        _others.setdefault((folder, name), []).append((first, last, ended_at))


def _own() -> Held:
    _note_ended(set(current_runs()))
    return [
        (*series, first, last, ended_at)
        for series, holders in _holders.items()
        for ended_at in {_ended_at.get(run) for run in holders.values()}
        for first, last in _ranges(number for number, run in holders.items() if _ended_at.get(run) == ended_at)
    ]


def _note_ended(running: set[Run]) -> None:
    now = time.monotonic()
    for holders in _holders.values():
        for run in holders.values():
            if run not in running:
                _ended_at.setdefault(run, now)


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of each row of numbers that follow each other."""
    ordered = sorted(numbers)
    begins = [number for before, number in zip([None, *ordered], ordered, strict=False) if number - 1 != before]
    ends = [number for number, after in zip(ordered, [*ordered[1:], None], strict=True) if number + 1 != after]
    yield from zip(begins, ends, strict=True)


def _tell_end() -> None:
    """Tell the others what is held now: a job that held numbers has ended, and they may have what it left."""
    with _told():
        pass


class Numbers(Protocol):
    """What a job holds of a series; in a process slot's process it stands for what the front keeps."""

    def counter(self, position: int) -> Any:
        """The number at this position, held if it was not before."""

    def count_on_being_asked(self) -> None:
        """A number is written as a text."""

    def make_room(self) -> None:
        """A plain number was made of one of these."""


class Counter(int):
    """A number as the host returns it, one of those that the job holds."""

    _numbers: Numbers
    _position: int

    def __add__(self, other: Any) -> Any:
        if type(other) is not int or not 1 <= other <= _FARTHEST:
            return int.__add__(self, other)
        return self._numbers.counter(self._position + other)

    __radd__ = __add__

    def __format__(self, spec: str) -> str:
        self._numbers.count_on_being_asked()
        return int.__format__(self, spec)

    def __str__(self) -> str:
        return format(self, "d")

    def __repr__(self) -> str:
        return format(self, "d")

    def __int__(self) -> int:
        self._numbers.make_room()
        return int.__pos__(self)

    __index__ = __int__

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


class _Numbers:
    """Numbers of a series that a job holds, in order. `ended` are jobs whose files the host has seen, as it has those
    of other processes' jobs that had ended at the time `since`."""

    def __init__(self, series: Series, run: Run | None, ended: set[Run], since: float) -> None:
        self._series, self._run, self._ended, self._since = series, run, ended, since
        self._held: list[int] = []
        self._num_given = 0
        self._is_plain = False

    def take(self, at_least: int, size: int) -> None:
        """Hold `size` more numbers that follow each other."""
        with _told():
            first = number = at_least
            while number < first + size:
                if self._is_anothers(number):
                    first = number + 1
                number += 1
            self._hold(range(first, first + size))

    def counter(self, position: int) -> Counter:
        """The number at this position, held if it was not before."""
        with _told():
            while position >= self._num_given:
                self._give_one_more()
        counter = Counter(self._held[position])
        counter._numbers, counter._position = self, position
        return counter

    def _give_one_more(self) -> None:
        if self._num_given < len(self._held) and self._is_anothers(self._held[self._num_given]):
            del self._held[self._num_given :]  # The same job has asked twice, and has let go of what follows.
        if self._num_given == len(self._held):
            self.take(self._held[-1] + 1, 1)
        self._hold_all([self._held[self._num_given]])
        self._num_given += 1

    def count_on_being_asked(self) -> None:
        """A number is written as a text. The next ones are made by adding to it, so others may have what follows."""
        with _told():
            if not self._is_plain:
                for number in self._held[self._num_given :]:
                    _holders.get(self._series, {}).pop(number, None)
                del self._held[self._num_given :]

    def make_room(self) -> None:
        """A plain number was made of one of these, to which somebody may add."""
        with _told():
            if not self._is_plain:
                self._is_plain = True
                last = self._held[-1]
                self._hold(range(last + 1, last + 1 + _ROOM - len(self._held)))

    def _is_anothers(self, number: int) -> bool:
        for first, last, ended_at in _others.get(self._series, ()):
            if first <= number <= last and (ended_at is None or ended_at > self._since):
                return True
        holder = _holders.get(self._series, {}).get(number)
        return holder is not None and holder is not self._run and holder not in self._ended

    def _hold(self, numbers: range) -> None:
        mine = [number for number in numbers if not self._is_anothers(number)]
        self._held += mine
        self._hold_all(mine)

    def _hold_all(self, numbers: list[int]) -> None:
        if self._run is None:
            return
        _holders.setdefault(self._series, {}).update(dict.fromkeys(numbers, self._run))
        if _shared is not None and _tell_end not in self._run.at_end:
            self._run.at_end.append(_tell_end)


def reserve(series: Series, at_least: int, room: int, ended: set[Run], since: float) -> Counter:
    """A number from `at_least` on that no other job holds, with room for as many; outside of jobs nothing is held.

    A job that asks again before it has written gets the same number, as from the host.
    """
    slot = current_slot()
    run = None if slot is None else slot.run
    numbers = _Numbers(series, run, ended, since)
    with _told():
        held = _holders.get(series, {}).items()
        mine = [number for number, holder in held if holder is run and number >= at_least]
        numbers.take(min(mine, default=at_least), room)
    return numbers.counter(0)


@contextmanager
def _listing() -> Iterator[tuple[set[Run], float]]:
    """A folder is listed in the body; yields the jobs whose files will be seen, for they have ended, and the time."""
    global _listings
    with _told():
        since, running = time.monotonic(), set(current_runs())
        _note_ended(running)
        if not _listings:
            _forget_ended(running)
        ended = {run for holders in _holders.values() for run in holders.values()} - running
        _listings += 1
    try:
        yield ended, since
    finally:
        with _lock:
            _listings -= 1


def _forget_ended(running: set[Run]) -> None:
    """What ended jobs held, below all that running ones hold: these only count upwards."""
    for series, holders in list(_holders.items()):
        lowest = min((number for number, run in holders.items() if run in running), default=None)
        kept = {
            number: run
            for number, run in holders.items()
            if (lowest is not None and number >= lowest) or _may_matter_to_others(series, run)
        }
        if kept:
            _holders[series] = kept
        else:
            del _holders[series]
    for run in _ended_at.keys() - {run for holders in _holders.values() for run in holders.values()}:
        del _ended_at[run]


def _may_matter_to_others(series: Series, run: Run) -> bool:
    """Whether a process may list the folder since before this job ended, or count on from before."""
    if _shared is None:
        return False
    is_recent = time.monotonic() - _ended_at.get(run, 0.0) < _KEPT_S
    return is_recent or any(ended_at is None for _, _, ended_at in _others.get(series, ()))


Reserve = Callable[[Series, int, int], Any]
Keeper = Callable[[], AbstractContextManager[Reserve]]


@contextmanager
def kept_here() -> Iterator[Reserve]:
    """A folder is listed in the body, with which numbers are then reserved; this process keeps who holds them."""
    with _listing() as (ended, since):
        yield lambda series, at_least, room: reserve(series, at_least, room, ended, since)


_keeper: Keeper = kept_here


def keep_by(keeper: Keeper) -> None:
    """Have another process keep who holds which numbers."""
    global _keeper
    _keeper = keeper


def numbered(number: int, numbers: Numbers) -> Counter:
    """The first number of some that a job holds."""
    counter = Counter(number)
    counter._numbers, counter._position = numbers, 0
    return counter


def reserving(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap the host's `get_save_image_path`."""

    @functools.wraps(original)
    def get_save_image_path(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        room = 1 if _is_hosts(str(sys._getframe(1).f_globals.get("__name__"))) else _ROOM
        with _keeper() as reserve_number:
            folder, filename, number, *rest = original(*args, **kwargs)
            series = os.path.normcase(os.path.abspath(folder)), os.path.normcase(filename)
            counter = reserve_number(series, number, room)
        return (folder, filename, counter, *rest)

    return get_save_image_path


def _is_hosts(module_name: str) -> bool:
    """Whether a module is ours or ComfyUI's, whose nodes only add to the number. ComfyUI names some by their paths."""
    parts = module_name.replace("\\", "/").split("/")
    if len(parts) > 1:
        return parts[-2] == "comfy_extras"
    return parts[0].partition(".")[0] in ("nodes", "comfy_api", "comfy_extras", "comfy_parallel")
