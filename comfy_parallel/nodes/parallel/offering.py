"""Queues the shares of a running job for other slots, and takes them back at its end."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from comfy_parallel.core.shares import Share
from comfy_parallel.core.states import SlotState
from comfy_parallel.nodes.parallel.job import FanOut, Round
from comfy_parallel.slots.slot import Slot, interrupt_job, slots

_COMES = frozenset((SlotState.IDLE, SlotState.OFFERED, SlotState.RUNNING, SlotState.RETURNING, SlotState.AWAY))
_waiting: dict[str, tuple[FanOut, Round, Any]] = {}  # What is queued, by the id of its job.
running: dict[int, Any] = {}  # A `FanOut`, or a `FarJob` of another server, by the slot that runs it.


def taken(child_id: str) -> tuple[FanOut, Round, Any] | None:
    """What a slot is to run for this id, its round and the job's other children; None when its job has ended."""
    return _waiting.pop(child_id, None)


class Queued:
    """The children of one job, which runs on `slot`. `only`: the slots that were chosen for it; None for all."""

    def __init__(self, queue: Any, slot: Slot, job: FanOut, only: Collection[int] | None) -> None:
        self._queue, self._slot, self._job, self._item = queue, slot, job, queue.running_items()[0]
        self._ids: list[str] = []
        self._barred = frozenset(
            one.index for one in slots() if not takes_shares(one) or (only is not None and one.index not in only)
        )

    def offer(self, round: Round) -> None:
        """Queue each share with the job's own number: a slot that is free takes it before what came later."""
        if not self._helpers():
            return
        most = round.plan.participants if round.most is None else round.most
        while (participant := round.gathering.offer_next(most - 1)) is not None:
            self.put(round, participant)

    def put(self, round: Round, participant: int, failed_on: frozenset[int] = frozenset()) -> None:
        """Let any slot take this share that has not failed at it."""
        number, _, _, extra_data, _, *rest = self._item
        child_id = str(uuid.uuid4())
        self._ids.append(child_id)
        _waiting[child_id] = FanOut(self._job.prompt_id, [round], participant), round, self
        own = {key: value for key, value in extra_data.items() if key != "gpu_id"}
        told = {**own, "comfy_parallel": {"prompt_id": self._job.prompt_id, "participant": participant}}
        share = Share(self._job.prompt_id, participant, round.plan.participants)
        prompt, collectors = round.plan.child_prompt(participant), round.plan.collectors_of(participant)
        self._queue.front.shares.put(
            (number, child_id, prompt, told, collectors, *rest), share, self._item, self._barred | failed_on
        )

    def _helpers(self) -> list[Slot]:
        return [one for one in slots() if one is not self._slot and one.index not in self._barred]

    def may_take(self, failed_on: frozenset[int]) -> bool:
        """Whether a slot that has not failed at a share will soon be free for it. One whose own job waits may not be:
        it could be waiting for this one."""
        free = [one for one in self._helpers() if one.index not in failed_on and one.state in _COMES]
        return any(not ((job := running.get(one.index)) and job.is_waiting) for one in free)

    def end(self) -> None:
        """The job has ended: take back what waits, and interrupt what runs."""
        for child_id in self._ids:
            _waiting.pop(child_id, None)
            if not self._queue.front.shares.drop(child_id):
                interrupt_job(child_id)


def takes_shares(slot: Slot) -> bool:
    """Whether a slot can hand over what it makes. A process of a kind that cannot runs whole jobs only."""
    return slot.process is None or bool(getattr(slot.process, "takes_shares", False))
