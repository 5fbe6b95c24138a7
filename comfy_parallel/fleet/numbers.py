"""File numbers that no two running jobs share, across processes: the front keeps who holds them, workers ask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.save_numbers import Counter, Reserve, Series

Ask = Callable[..., Any]


class Clerk:
    """The front's side: answers what one worker asks, in the worker's slot, so that its job holds the numbers."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._listings: dict[int, tuple[ExitStack, Reserve]] = {}
        self._numbers: dict[int, Any] = {}

    def answer(self, question: str, *args: Any) -> Any:
        """The answer to a question by its name."""
        answers: dict[str, Callable[..., Any]] = {
            "begin": self._begin,
            "end": self._end,
            "reserve": self._reserve,
            "counter": self._counter,
            "count_on_being_asked": self._count_on_being_asked,
            "make_room": self._make_room,
        }
        return answers[question](*args)

    def forget(self) -> None:
        """The worker's job has ended, and the job's numbers with it; or the worker has."""
        for key in list(self._listings):
            self._end(key)
        self._numbers.clear()

    def _begin(self) -> int:
        key, listing = next(self._keys), ExitStack()
        self._listings[key] = listing, listing.enter_context(save_numbers.kept_here())
        return key

    def _end(self, key: int) -> None:
        listing = self._listings.pop(key, None)
        if listing is not None:
            listing[0].close()

    def _reserve(self, listing: int, series: Series, at_least: int, room: int) -> tuple[int, int]:
        counter = self._listings[listing][1](series, at_least, room)
        key = next(self._keys)
        self._numbers[key] = counter._numbers
        return key, int.__pos__(counter)

    def _counter(self, key: int, position: int) -> int | None:
        """None when the job that held these has ended."""
        numbers = self._numbers.get(key)
        return None if numbers is None else int.__pos__(numbers.counter(position))

    def _count_on_being_asked(self, key: int) -> None:
        if key in self._numbers:
            self._numbers[key].count_on_being_asked()

    def _make_room(self, key: int) -> None:
        if key in self._numbers:
            self._numbers[key].make_room()


class AskedFor:
    """The worker's side: numbers of a series that the front keeps for this worker's job."""

    def __init__(self, ask: Ask, key: int, first: int) -> None:
        self._ask, self._key, self._first = ask, key, first

    def counter(self, position: int) -> int:
        number = self._ask("counter", self._key, position)
        if number is None:
            return self._first + position
        counter: Counter = save_numbers.numbered(number, self)
        counter._position = position
        return counter

    def count_on_being_asked(self) -> None:
        self._ask("count_on_being_asked", self._key)

    def make_room(self) -> None:
        self._ask("make_room", self._key)


def keeper(ask: Ask) -> save_numbers.Keeper:
    """What `save_numbers` is to reserve by in a worker. `ask(question, *args)` asks the front's clerk."""

    @contextmanager
    def kept_by_front() -> Iterator[Reserve]:
        listing = ask("begin")

        def reserve(series: Series, at_least: int, room: int) -> Counter:
            key, first = ask("reserve", listing, series, at_least, room)
            return save_numbers.numbered(first, AskedFor(ask, key, first))

        try:
            yield reserve
        finally:
            ask("end", listing)

    return kept_by_front
