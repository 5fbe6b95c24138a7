"""A job that is shared out, in a process of its own: the front keeps what it is made of, and is asked for it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from comfy_parallel.core.fan_out import Classes, Plan
from comfy_parallel.fleet import questions, worker_side
from comfy_parallel.fleet.tensors import Packed, packed, unpacked
from comfy_parallel.nodes.parallel import offering
from comfy_parallel.nodes.parallel.gathering import Wait
from comfy_parallel.nodes.parallel.job import FanOut, Finish
from comfy_parallel.slots.slot import current_slot

QUESTION = "shares"
_POLL_S = 0.02

# The worker's side.


def job_here(prompt: Mapping[str, Any], classes: Classes) -> FarJob | None:
    """What the front says of the job that this process runs; None when it is not shared out."""
    if not any(node.get("class_type") in classes.collectors for node in prompt.values()):
        return None
    found = _ask("role")
    return None if found is None else FarJob(*pickle.loads(found))


def _ask(what: str, *args: Any) -> Any:
    return worker_side.ask(QUESTION, what, *args)


class FarJob:
    """As `job.FanOut`, in the process that runs the job or a share of it. What the job computes itself stays there."""

    def __init__(self, participant: int, plans: Sequence[Plan]) -> None:
        self.participant, self.plans = participant, list(plans)
        self.finish: dict[str, Finish] = {}
        self._own: dict[tuple[str, int], Any] = {}
        self._items: dict[str, Sequence[Any]] = {}

    def start(self) -> None:
        _ask("start")

    def open(self, puller: str, items: Sequence[Any]) -> None:
        self._items[puller] = items
        self.plans[:] = pickle.loads(_ask("open", puller, [packed(item) for item in items]))

    def item(self, puller: str, participant: int) -> Any:
        if puller in self._items:
            return self._items[puller][participant]
        return unpacked(Packed(_ask("item", puller)))

    def give(self, collector: str, participant: int, values: Any) -> None:
        if self.participant == 0:
            self._own[collector, participant] = values
        _ask("give", collector, participant, b"" if self.participant == 0 else packed(values))

    def next_to_compute(self, collector: str, check: Callable[[], None]) -> int | None:
        while True:
            check()
            is_there, found = _ask("next", collector)
            if is_there:
                participant: int | None = found
                return participant
            time.sleep(_POLL_S)

    def collected(self, collector: str) -> list[Any]:
        given = ((one, Packed(value)) for one, value in _ask("collected", collector))
        return [self._own[collector, one] if not value else unpacked(value) for one, value in given]

    def leave_out(self, node_id: str, participants: Iterable[int]) -> bool:
        return bool(_ask("leave_out", node_id, list(participants)))


# The front's side. It is called in the slot whose process asks, and does not wait.


def _answer(what: str, *args: Any) -> Any:
    slot = current_slot()
    job = None if slot is None else offering.running.get(slot.index)
    if job is None:
        if what == "role":
            return None
        raise RuntimeError("its job has ended")
    return _ANSWERS[what](job, *args)


def _tell_role(job: FanOut) -> bytes:
    return pickle.dumps((job.participant, job.plans))


def _open(job: FanOut, puller: str, items: Sequence[bytes]) -> bytes:
    job.open(puller, [Packed(item) for item in items])
    return pickle.dumps(job.plans)


def _next(job: FanOut, collector: str) -> tuple[bool, int | None]:
    found = job.ask_next(collector)
    return (False, None) if isinstance(found, Wait) else (True, found)


def _collected(job: FanOut, collector: str) -> list[tuple[int, bytes]]:
    """What others gave; nothing in the place of what the job has itself."""
    given = enumerate(job.given(collector))
    return [(one, bytes(packed(values)) if values != b"" else b"") for one, values in given if values is not None]


_ANSWERS: dict[str, Callable[..., Any]] = {
    "role": _tell_role,
    "start": FanOut.start,
    "open": _open,
    "item": lambda job, puller: bytes(packed(job.raw_item(puller, job.participant))),
    "give": lambda job, collector, participant, values: job.give(collector, participant, Packed(values)),
    "next": _next,
    "collected": _collected,
    "leave_out": FanOut.leave_out,
}
questions.answer_by(QUESTION, _answer)
