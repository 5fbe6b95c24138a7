"""Each slot's stepper: made on first use where recording is possible, None elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_parallel.graphs.availability import why_not
from comfy_parallel.graphs.code import is_host_code, module_of
from comfy_parallel.graphs.recording import Function, Recorder, Recording
from comfy_parallel.graphs.refusal import Uncapturable, UncapturableNow
from comfy_parallel.graphs.stepper import Stepper, StepStats
from comfy_parallel.slots.slot import Slot, SlotLocal, current_slot, is_shared, slots

logger = logging.getLogger(__name__)

_BY_USER = "switched off: COMFY_PARALLEL_GRAPHS is off; set it to auto"
_off: str | None = _BY_USER  # why no slot records steps
_steppers: SlotLocal[Stepper | None] = SlotLocal(lambda: _make(current_slot()))
_between_steps: SlotLocal[list[bool]] = SlotLocal(lambda: [False])


def switch(on: bool, why_off: str = _BY_USER) -> None:
    """Turn graph stepping on or off, before the first job."""
    global _off
    _off = None if on else why_off


def of_slot() -> Stepper | None:
    """The calling slot's stepper."""
    return _steppers.get() if _off is None and current_slot() is not None else None


@contextmanager
def sampling(*code: Any) -> Iterator[None]:
    """A run of a sampler. If all that runs between its steps is the host's own, nothing changes a model's set-up there.

    Args:
        code: functions, objects and containers of such, whose code runs between the steps.
    """
    stepper = of_slot()
    if stepper is not None:
        stepper.begin_sampling()
    trusted = _between_steps.get()
    before = trusted[0]
    trusted[0] = all(map(_is_hosts, _leaves(code)))
    try:
        yield
    finally:
        trusted[0] = before


def of_step() -> Stepper | None:
    """The calling slot's stepper, for one step."""
    stepper = of_slot()
    if stepper is not None and not _between_steps.get()[0]:
        stepper.suspect()
    return stepper


def why_off(slot: Slot) -> str | None:
    """Why all steps of a slot run eagerly, and what would help; None where they are recorded."""
    return _off or why_not(slot.device)


def tell() -> None:
    """Log why, for each slot whose steps all run eagerly; where the user may have expected otherwise as a warning."""
    for slot in slots():
        if (reason := why_off(slot)) is not None:
            level = logging.WARNING if _off is None and slot.device.startswith("cuda") else logging.INFO
            logger.log(level, "%s: every step runs eagerly: %s", slot.name, reason)


def report(slot: Slot) -> dict[str, Any]:
    """Whether a slot's steps are recorded or why not, and what its stepper has done."""
    reason = why_off(slot)
    stepper = slot.values.get(_steppers)
    stats = StepStats() if stepper is None else stepper.stats
    return {
        "on": reason is None,
        "reason": reason,
        "captures": stats.captures,
        "replays": stats.replays,
        "eager": dict(stats.eager),
        "size_bytes": 0 if stepper is None else stepper.size_bytes,
    }


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_hosts(value: Any) -> bool:
    name = module_of(value)
    return is_host_code(name) or name.partition(".")[0] in ("builtins", "torch", "uuid")


def _make(slot: Slot | None) -> Stepper | None:
    if slot is None or why_off(slot) is not None:
        return None
    import torch

    device = torch.device(slot.device)
    return Stepper(device, _SlotRecorder(slot, device))


class _SlotRecorder(Recorder):
    """Makes the slot's interrupts wait for the end of a recording."""

    def __init__(self, slot: Slot, device: Any) -> None:
        super().__init__(device)
        self._slot = slot

    def record(self, forward: Function, buffers: list[Any]) -> Recording:
        self._slot.is_recording = True
        try:
            return super().record(forward, buffers)
        except Uncapturable as refusal:
            if refusal.__cause__ is not None and is_shared(self._slot):
                raise UncapturableNow(str(refusal)) from refusal.__cause__  # Another slot may have spoilt it.
            raise
        finally:
            self._slot.is_recording = False
