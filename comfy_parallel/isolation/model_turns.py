"""One model is used by one slot at a time, whoever cached it and handed it to two: slots take turns, node by node.

A slot has its turn from the moment it loads a model, or begins to sample or encode with it, to the end of the node
that does so. It then finds the model as one worker alone would: as loaded by itself, with another job's patches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from comfy_parallel.errors import ComfyParallelError
from comfy_parallel.isolation import loaded_models
from comfy_parallel.slots.slot import Slot, SlotLocal, current_slot

_LOOK_AGAIN_S = 0.1  # after which a waiting job sees that it was interrupted


_SO = (
    ": a node pack hands its loaded models to several jobs. Submit the job again; if it happens again, let the pack's"
    " jobs run alone: COMFY_PARALLEL_PACKS=NAME_OF_THE_PACK=alone"
)


class CrossedModels(ComfyParallelError):
    """Two jobs each use a model that the other one needs before its node can end."""


@dataclass(slots=True, eq=False)
class _Use:
    """Who uses a model: the slot that has it in its list, and the slot whose turn it is."""

    owner: Slot
    holder: Slot | None = None
    is_shared: bool = False  # More than one slot has used it. All such models have one turn: else turns could cross.


_changed = threading.Condition()
_uses: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()
_held: SlotLocal[list[_Use]] = SlotLocal(list)
_goes_on: SlotLocal[bool] = SlotLocal(bool)
_waits_for: dict[Slot, Slot] = {}
_shared_holder: Slot | None = None


def take(models: Sequence[Any], while_waiting: Callable[[], None]) -> None:
    """Have the calling slot's turn for these models, once no other slot uses one; does nothing outside of slots.

    `while_waiting` is called now and then, and may raise.

    Raises:
        CrossedModels: when the other slot waits for a model that this one uses.
    """
    slot = current_slot()
    if slot is None:
        return
    with _changed:
        uses = [_use_of(model, slot) for model in models]
        try:
            while (other := _in_the_way(uses, slot)) is not None:
                _waits_for[slot] = other
                _check_ways(slot)
                _check_rest(slot, other)
                _changed.wait(_LOOK_AGAIN_S)
                while_waiting()
        finally:
            _waits_for.pop(slot, None)
        _give(uses, slot)
        for model, use in zip(models, uses, strict=True):
            if use.owner is not slot:
                loaded_models.hand_over(model, slot)
                use.owner = slot


def node_ended(*, is_going_on: bool) -> None:
    """The calling slot's turn ends with its node; with its job, once a node of that job goes on after its end."""
    _goes_on.set(_goes_on.get() or is_going_on)
    if not _goes_on.get():
        _release()


def job_ended() -> None:
    """The calling slot's job has ended, and with it the slot's turn."""
    _goes_on.set(False)
    _release()


def _release() -> None:
    global _shared_holder
    slot = current_slot()
    if slot is None or not (held := _held.get()):
        return
    with _changed:
        for use in held:
            use.holder = None
        held.clear()
        if _shared_holder is slot:
            _shared_holder = None
        _changed.notify_all()


def unload(model: Any, unload_it: Callable[[], bool]) -> bool:
    """Carry an unloading out, unless another slot has the model by now; whether it is unloaded here."""
    slot = current_slot()
    with _changed:
        use = _uses.get(model)
        is_foreign = use is not None and slot is not None and use.owner is not slot
        if is_foreign:
            return True
        is_free = use is not None and use.holder is None
        if use is not None and is_free:
            use.holder = slot
    try:
        return unload_it()
    finally:
        if use is not None and is_free:
            with _changed:
                use.holder = None
                _changed.notify_all()


def _use_of(model: Any, slot: Slot) -> _Use:
    use = _uses.get(model)
    if use is None:
        use = _uses[model] = _Use(slot)
    use.is_shared = use.is_shared or use.owner is not slot
    return use


def _in_the_way(uses: list[_Use], slot: Slot) -> Slot | None:
    for use in uses:
        if use.holder is not None and use.holder is not slot:
            return use.holder
        if use.is_shared and _shared_holder is not None and _shared_holder is not slot:
            return _shared_holder
    return None


def _give(uses: list[_Use], slot: Slot) -> None:
    global _shared_holder
    held = _held.get()
    for use in uses:
        if use.holder is None:
            use.holder = slot
            held.append(use)
        if use.is_shared:
            _shared_holder = slot


def _check_rest(slot: Slot, other: Slot) -> None:
    """Raise when the other one's job goes on only when this one has ended."""
    if other.run is not None and other.run.is_resting:
        raise CrossedModels(f"{other.name} uses a model that {slot.name} needs, and its job waits to run alone{_SO}")


def _check_ways(slot: Slot) -> None:
    """Raise when those that are waited for wait, at last, for this slot."""
    other: Slot | None = _waits_for[slot]
    while other is not None and other is not slot:
        other = _waits_for.get(other)
    if other is slot:
        raise CrossedModels(f"{slot.name} and {_waits_for[slot].name} each use a model that the other one needs{_SO}")
