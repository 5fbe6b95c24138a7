"""How fast slots are, measured by jobs that have ended, and which slot a waiting job is to go to because of that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from comfy_parallel.core.pace import Paces
from comfy_parallel.core.schedule import UnderWay
from comfy_parallel.core.states import SlotState
from comfy_parallel.core.unequal import first_expected
from comfy_parallel.slots.desk import Desk
from comfy_parallel.slots.items import view_of
from comfy_parallel.slots.slot import Run

_LATE = 0.5  # A job that takes so much longer than expected is not waited for.
_LOOK_S = 1.0


class Measuring:
    """Whoever calls something here holds the queue's lock. `look_again` is called on another thread, without it."""

    def __init__(self, look_again: Callable[[], None]) -> None:
        self._look_again = look_again
        self._is_to_look = False
        self._paces = Paces(0)
        self._num_slots = 0

    def of(self, num_slots: int) -> Paces:
        """What is known of so many slots."""
        if num_slots != self._num_slots:
            self._num_slots, self._paces = num_slots, Paces(num_slots)
        return self._paces

    def note(self, desks: Sequence[Desk], slot: int, item: Any, run: Run) -> None:
        """A job has succeeded on a slot.

        One that had to load its models says nothing of the slot's speed: loads would make equal slots look unequal.
        """
        if len(desks) > 1 and run.share is None and not run.has_to_load and (kind := _kind(item)) is not None:
            self.of(len(desks)).note(slot, kind, time.monotonic() - run.started_at)

    def matters(self, desks: Sequence[Desk]) -> bool:
        """Whether slots differ so much that it matters where a job runs."""
        return len(desks) > 1 and self.of(len(desks)).are_unequal

    def next_start(
        self,
        waiting: Sequence[Any],
        desks: Sequence[Desk],
        under_way: UnderWay,
        is_given: Callable[[Any], bool],
        running_of: Callable[[Desk], dict[int, Any]],
    ) -> tuple[int, Desk] | None:
        """As `core.unequal.first_expected`. Where a job waits for a slot that is late, another look is taken."""
        factors = self._paces.factors()
        free_in = [self._free_in(desk, factors[desk.index], running_of) for desk in desks]
        start = first_expected(waiting, view_of, desks, under_way, is_given, self._seconds, factors, free_in)
        if start is None and waiting and not self._is_to_look and any(desk.state is SlotState.IDLE for desk in desks):
            self._is_to_look = True
            timer = threading.Timer(_LOOK_S, self._look)
            timer.daemon = True
            timer.start()
        return start

    def _look(self) -> None:
        self._is_to_look = False
        self._look_again()

    def _seconds(self, item: Any) -> float | None:
        return self._paces.seconds(_kind(item))

    def _free_in(self, desk: Desk, factor: float, running_of: Callable[[Desk], dict[int, Any]]) -> float | None:
        if desk.state in (SlotState.IDLE, SlotState.RETURNING):
            return 0.0
        run = desk.slot.run
        item = desk.given if run is None else next(iter(running_of(desk).values()), None)
        seconds = None if item is None else self._seconds(item)
        if seconds is None:
            return None
        left = seconds * factor - (0.0 if run is None else time.monotonic() - run.started_at)
        return None if left < -_LATE * seconds * factor else max(0.0, left)


def _kind(item: Any) -> Hashable:
    view = view_of(item)
    known: Hashable = getattr(view, "workload", None)
    return known
