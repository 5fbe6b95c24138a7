"""A GPU that is lost to this process: its slots fail, the jobs bound to them end with the reason, the others go on.

After a failed device assert or an illegal memory access every call on that device fails, until the process has ended.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comfy_parallel.core.device_errors import Fate, fate_of
from comfy_parallel.core.states import SlotEvent, SlotState
from comfy_parallel.errors import DeviceError
from comfy_parallel.slots.dispatcher import Dispatcher
from comfy_parallel.slots.ended_unrun import end_as_error
from comfy_parallel.slots.items import error_text, is_item, view_of
from comfy_parallel.slots.slot import Slot, current_slot

logger = logging.getLogger(__name__)

_MOST_CAUSES = 20
_LINKS: tuple[Any, ...] = (BaseException.__cause__, BaseException.__context__)  # A node's class may say otherwise.
_ANSWERS_WITHIN_S = 60.0
_REMEDY = "restart ComfyUI to use it again (COMFY_PARALLEL_EXIT_ON_FAILED=1 ends it for that)"


class LostDevices:
    """Looks at the errors of jobs.

    Args:
        queues: all slots'.
        check: uses a device once, and raises `DeviceError`.
        leave: has the process end, because a slot failed; it is called when the job that failed has been noted.
        tell: is told at once which slot failed, and why.
    """

    def __init__(
        self,
        queues: Sequence[Any],
        check: Callable[[str], object],
        leave: Callable[[], object] | None = None,
        tell: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._front: Any = queues[0].front
        self._dispatcher: Dispatcher = self._front._dispatcher
        self._dispatcher.refuse_waiting = self.refuse_waiting
        self._check, self._leave, self._tell = check, leave, tell
        self._is_to_leave = False

    def look(self, slot: Slot, error: BaseException) -> str | None:
        """An error on the slot's thread: was a device lost? The reason, when the slot has failed because of that."""
        reason, fate = _worst(error)
        if fate is Fate.USABLE or slot.process is not None:
            return None
        if not _has_failed(slot):
            for one in self._lost(slot, fate):
                self._fail(one, reason)
            if slot.run is None:
                self.job_ended(slot, None)
        return slot.why_suspended if _has_failed(slot) else None

    def job_ended(self, slot: Slot, item: Any) -> None:
        """A job has ended, and is in the history."""
        if self._is_to_leave and self._leave is not None and _has_failed(slot):
            self._is_to_leave = False
            self._leave()

    def refuse_waiting(self) -> None:
        """End what waits for slots that have failed. The caller holds the queue's lock."""
        for desk in self._dispatcher.desks:
            if _has_failed(desk.slot):
                self._end_bound(desk.slot)

    def _lost(self, slot: Slot, fate: Fate) -> list[Slot]:
        """The slots whose device is lost. A job may use the devices of others, too."""
        threads = [desk.slot for desk in self._dispatcher.desks if desk.slot.process is None]
        if ":" not in slot.device:  # It answers whatever happened to a GPU that the job used.
            return [slot] if fate is Fate.LOST else []
        if not self._answers(slot.device):
            return [one for one in threads if one.device == slot.device]
        others = {one.device for one in threads if ":" in one.device} - {slot.device} if fate is Fate.LOST else set()
        lost = {device for device in sorted(others) if not self._answers(device)}
        return [one for one in threads if one.device in lost]

    def _answers(self, device: str) -> bool:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(self._is_usable(device)), daemon=True)
        thread.start()
        thread.join(_ANSWERS_WITHIN_S)
        return found == [True]

    def _is_usable(self, device: str) -> bool:
        try:
            self._check(device)
        except DeviceError as error:
            return "out of memory" in str(error)
        return True

    def _fail(self, slot: Slot, reason: str) -> None:
        with self._dispatcher.mutex:
            if _has_failed(slot):
                return
            desk = self._dispatcher.desks[slot.index]
            self._dispatcher.close(desk, SlotEvent.FAIL)
            slot.why_suspended = f"its device is lost to this process: {reason}; {_REMEDY}"
            self._front.closing.note_failed(slot.index)
            self._dispatcher.ledger.blame(self._dispatcher.running_of(desk))
            self._is_to_leave = True
            logger.critical("%s has failed: %s. Jobs for any slot go to the others", slot.name, slot.why_suspended)
            self._end_bound(slot)
            self._dispatcher.dispatch()
        self._tell(slot.why_suspended)

    def _end_bound(self, slot: Slot) -> None:
        taken = [desk.given for desk in self._dispatcher.desks]  # Their workers are about to run them.
        waiting = [item for item in self._dispatcher.waiting if is_item(item) and view_of(item).target == slot.index]
        for item in waiting:
            if any(item is one for one in taken):
                continue
            self._dispatcher.drop_waiting(item)
            if view_of(item).share is None:  # Its parent computes a share itself.
                reason = f"it was bound to {slot.name}, which has failed: {slot.why_suspended}"
                end_as_error(self._front, view_of(item), reason)
        if waiting:
            self._front.server.queue_updated()


def _has_failed(slot: Slot) -> bool:
    return slot.state is SlotState.FAILED


_lost: LostDevices | None = None


def use(lost: LostDevices | None) -> None:
    """Have errors looked at by this one; None: by nobody."""
    global _lost
    _lost = lost


def look(slot: Slot | None, error: BaseException) -> str | None:
    """As `LostDevices.look`, of the one in use."""
    return None if _lost is None or slot is None else _lost.look(slot, error)


def telling_of_lost_devices(handle_error: Callable[..., None]) -> Callable[..., None]:
    """Wrap the host's `PromptExecutor.handle_execution_error`, which tells the client and the history of a failure."""

    @functools.wraps(handle_error)
    def handle_execution_error(
        self: Any, prompt_id: Any, prompt: Any, current_outputs: Any, executed: Any, error: Any, ex: Any
    ) -> None:
        slot = current_slot()
        reason = look(slot, ex) if isinstance(ex, BaseException) else None
        if slot is not None and reason is not None:
            text = f"{error.get('exception_message', '')}\n\n{slot.name} has failed: {reason}"
            error = {**error, "exception_message": text}
        handle_error(self, prompt_id, prompt, current_outputs, executed, error, ex)

    return handle_execution_error


def _worst(error: BaseException) -> tuple[str, Fate]:
    """Of an error and what caused it, the first line of the one that says most of the device."""
    found = [(text, fate_of(text)) for text in map(error_text, _causes(error))]
    order = (Fate.LOST, Fate.ASK, Fate.USABLE)
    text, fate = min(found, key=lambda one: order.index(one[1]))
    return (text.splitlines() or [""])[0], fate


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    following = [error]
    while following and len(seen) < _MOST_CAUSES:
        one = following.pop()
        if not any(one is other for other in seen):
            seen.append(one)
            yield one
            following += [other for link in _LINKS if (other := link.__get__(one)) is not None]
