"""What each slot says of its device, also where asking fails: a GPU that is lost must not silence the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from comfy_parallel.core.shown import clipped
from comfy_parallel.core.states import SlotState
from comfy_parallel.graphs import per_slot
from comfy_parallel.host import facts
from comfy_parallel.slots import device
from comfy_parallel.slots.slot import Slot, slots
from comfy_parallel.weights.report import of_this_process

logger = logging.getLogger(__name__)

T = TypeVar("T")

_told: WeakKeyDictionary[Slot, set[str]] = WeakKeyDictionary()  # Dashboards ask every few seconds.
_REPORTED = ("device_name", "memory", "graphs", "models")
_MOST = 300  # characters of a reason


class Answers:
    """A slot's answers about its device. What cannot be answered is None, and `error` says why."""

    def __init__(self, slot: Slot, models_of: Callable[[Slot], list[dict[str, Any]]] | None = None) -> None:
        self.slot = slot
        self.error: str | None = None
        if slot.state is SlotState.FAILED:
            self.error = slot.why_suspended or "it has failed"
        if slot.process is not None:
            self._take_report(slot.process.report, slot.process.last_end)
            return
        self.device_name = self.ask(lambda: device.name(slot.device))
        self.memory = self.ask(lambda: device.memory(slot.device))
        self.graphs = self.ask(lambda: per_slot.report(slot))
        self.models = None if models_of is None else self.ask(lambda: models_of(slot))

    def _take_report(self, report: dict[str, Any], last_end: str | None) -> None:
        """What the slot's process has said last; nothing while it starts."""
        self.error = report.get("error") if report else last_end
        self.device_name, self.memory, self.graphs, self.models = map(report.get, _REPORTED)

    @property
    def report(self) -> dict[str, Any]:
        """The answers, for another process."""
        return {name: getattr(self, name) for name in ("error", *_REPORTED)}

    @property
    def health(self) -> str:
        """`ok`, or `broken` when the device or what lies on it cannot be asked."""
        return "ok" if self.error is None else "broken"

    def ask(self, question: Callable[[], T]) -> T | None:
        """The answer to one more question."""
        if self.slot.state is SlotState.FAILED:  # A device that is lost may not even answer that it is.
            return None
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - drivers and libraries raise what they like; the reply tells it
            self.error = self.error or _reason(error)
            self._log_once()
            return None

    def _log_once(self) -> None:
        told = _told.setdefault(self.slot, set())
        if self.error is not None and self.error not in told:
            told.add(self.error)
            logger.error("%s: its device does not answer: %s", self.slot.name, self.error)


def report() -> dict[str, Any]:
    """The answers of the only slot of this process, with its models and weights, for the front."""
    from comfy_parallel.isolation.loaded_models import models_of

    return {**Answers(slots()[0], models_of).report, "weights": of_this_process(facts.weight_name)}


def answers_of(slots: Iterable[Slot]) -> list[Answers]:
    """Each slot's answers, without its models."""
    return [Answers(slot) for slot in slots]


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return clipped(f"{type(error).__name__}: {lines[0]}", _MOST)
