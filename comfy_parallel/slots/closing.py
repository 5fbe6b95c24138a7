"""Closing slots and opening them again: pause, drain, resume.

A paused slot ends its job and takes no other. A draining one does the same, and new jobs that could only run there are
refused; a server drains when all of its slots do.
"""

from __future__ import annotations

from collections.abc import Iterable

from comfy_parallel.core.states import CLOSED, SlotEvent, SlotState
from comfy_parallel.errors import Draining, SlotFailed
from comfy_parallel.slots.dispatcher import Dispatcher


class Closing:
    """Pauses, drains and resumes slots, by their numbers; each as often as one likes."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._draining: set[int] = set()
        self._failed: set[int] = set()
        self._is_stopping = False

    def pause(self, gpu_ids: Iterable[int]) -> None:
        """These slots end their jobs and take no others. A failed one stays failed, for its device is lost."""
        with self._dispatcher.mutex:
            for gpu_id in gpu_ids:
                desk = self._dispatcher.desks[gpu_id]
                if desk.slot.state is not SlotState.FAILED:
                    self._dispatcher.close(desk, SlotEvent.PAUSE)
            self._dispatcher.dispatch()

    def drain(self, gpu_ids: Iterable[int]) -> None:
        """As `pause`; and new jobs that could only run on these slots are refused."""
        chosen = list(gpu_ids)
        with self._dispatcher.mutex:
            self._draining.update(chosen)
            self.pause(chosen)

    def resume(self, gpu_ids: Iterable[int]) -> None:
        """These slots take jobs again, whatever had closed them.

        Raises:
            Draining: when the server is about to end.
        """
        with self._dispatcher.mutex:
            if self._is_stopping:
                raise Draining("the server", "it is about to end; wait until it has been started again")
            self._draining.difference_update(chosen := list(gpu_ids))
            self._failed.difference_update(chosen)
            for gpu_id in chosen:
                if self._dispatcher.desks[gpu_id].slot.state in CLOSED:
                    self._dispatcher.resume(self._dispatcher.desks[gpu_id])
            self._dispatcher.dispatch()

    def unless_failed(self, gpu_id: int | None) -> int | None:
        """The slot of jobs that name none; None, which is any, where it has failed."""
        return None if gpu_id in self._failed else gpu_id

    def note_failed(self, gpu_id: int) -> None:
        """This slot has failed: new jobs that could only run there are refused until it is resumed."""
        with self._dispatcher.mutex:
            self._failed.add(gpu_id)

    def drain_for_good(self) -> None:
        """Drain all slots; none can be resumed, because the server is about to end."""
        with self._dispatcher.mutex:
            self._is_stopping = True
            self.drain(range(len(self._dispatcher.desks)))

    def refuses(self, target: int | str | None) -> bool:
        """Whether new jobs for this slot are refused; with another target, those for any slot."""
        closed = self._draining | self._failed
        return target in closed or (bool(closed) and len(closed) == len(self._dispatcher.desks))

    def check(self, target: int | str | None) -> None:
        """Refuse a new job that could only run where no new ones are taken.

        Raises:
            Draining: as its slot, or the whole server, drains.
            SlotFailed: as the device of its slot, or of every slot, is lost.
        """
        if not (self._draining or self._failed) or not self.refuses(target):
            return
        desks = self._dispatcher.desks
        if target in self._failed or len(self._failed) == len(desks):
            slot = desks[target if isinstance(target, int) else 0].slot
            raise SlotFailed(slot.name, str(slot.why_suspended))
        if len(self._draining | self._failed) == len(desks):
            raise Draining("the server", "send the job again later, or to another server")
        raise Draining(f"slot {target}", "send the job again later, or to another slot")
