"""Suspends slots that fail jobs which are not to blame, and tries them again; see `core.breaker`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from comfy_parallel.core.breaker import Breaker, JobEnd, Limits, Suspension
from comfy_parallel.core.states import CLOSED, SlotEvent, SlotState
from comfy_parallel.errors import DeviceError
from comfy_parallel.slots.dispatcher import Dispatcher
from comfy_parallel.slots.items import client_of, is_item
from comfy_parallel.slots.slot import Ended, Slot

logger = logging.getLogger(__name__)


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.name = "comfy_parallel-breaker"
    timer.start()


class Breaking:
    """Is told of every job's end, on its slot's thread. `queues`: all slots'.

    `check(device)` uses a device once and raises `DeviceError`; `after(seconds, act)` has `act` called then.
    """

    def __init__(
        self,
        queues: Sequence[Any],
        limits: Limits,
        check: Callable[[str], object],
        after: Callable[[float, Callable[[], None]], None] = _after,
    ) -> None:
        self._dispatcher: Dispatcher = queues[0].front._dispatcher
        self._check, self._after = check, after
        self._breaker = Breaker(limits, len(queues))
        self._last: dict[int, Ended] = {}
        self._suspensions: dict[int, Suspension] = {}  # the latest of each slot

    def job_ended(self, slot: Slot, item: Any) -> None:
        """The slot's last job has ended, and was this item."""
        last = slot.stats.latest
        if last is None or last is self._last.get(slot.index) or last.outcome == "interrupted":
            return
        self._last[slot.index] = last  # A node pack may end a job twice.
        is_bound = getattr(item, "target", None) is not None
        end = JobEnd(slot.index, _kind_of(item), last.outcome == "succeeded", last.ran_s, is_bound)
        with self._dispatcher.mutex:
            open_slots = [desk.index for desk in self._dispatcher.desks if desk.slot.state not in CLOSED]
            suspension, cleared = self._breaker.ended(end, open_slots)
            for index in cleared:
                self._resume(index, "its jobs failed on other slots as well")
            if suspension is not None and slot.state not in CLOSED:
                self._suspend(slot, suspension)

    def _suspend(self, slot: Slot, suspension: Suspension) -> None:
        slot.change(SlotEvent.SUSPEND)
        slot.stats.suspensions += 1
        slot.why_suspended = (
            f"it failed {suspension.failures} jobs in a row that are not known to be at fault; it is tried again after"
            f" {suspension.pause_s:g} s"
        )
        logger.error(
            "%s is suspended: %s. Jobs for any slot go to the others, those bound to it wait; POST /parallel/resume"
            " resumes it at once",
            slot.name,
            slot.why_suspended,
        )
        self._suspensions[slot.index] = suspension
        self._after(suspension.pause_s, lambda: self._try(slot, suspension))
        self._dispatcher.dispatch()

    def _try(self, slot: Slot, suspension: Suspension) -> None:
        """The pause of this suspension is over; the slot may have been resumed meanwhile, and suspended anew."""
        if slot.state is not SlotState.SUSPENDED or self._suspensions[slot.index] is not suspension:
            return
        try:
            self._check(slot.device)
        except DeviceError as error:
            with self._dispatcher.mutex:
                pause_s = self._breaker.again(slot.index)
                slot.why_suspended = f"{error}; it is tried again after {pause_s:g} s"
            logger.error("%s stays suspended: %s", slot.name, slot.why_suspended)
            self._after(pause_s, lambda: self._try(slot, suspension))
            return
        with self._dispatcher.mutex:
            self._breaker.tried(slot.index)
            self._resume(slot.index, "it is tried with one job")

    def _resume(self, index: int, why: str) -> None:
        desk = self._dispatcher.desks[index]
        if desk.slot.state is not SlotState.SUSPENDED:
            return
        logger.warning("%s is resumed: %s", desk.slot.name, why)
        self._dispatcher.resume(desk)
        self._dispatcher.dispatch()


def _kind_of(item: Any) -> Any:
    """The client, and the classes of the job's nodes: what differs among jobs of one workflow is left out."""
    if not is_item(item) or not isinstance(item[2], dict):
        return None
    classes = {str(node.get("class_type")) for node in item[2].values() if isinstance(node, dict)}
    return str(client_of(item)), frozenset(classes)
