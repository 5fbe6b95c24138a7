"""A job that is shared out, in a process or on a machine of its own: who has shared it keeps what it is made of, and is
asked for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy_parallel.core.fan_out import Classes, Plan
from comfy_parallel.core.tiles import Tile
from comfy_parallel.fleet import plain_values, questions, worker_side
from comfy_parallel.fleet.remote import answering
from comfy_parallel.fleet.tensors import Packed, packed, unpacked
from comfy_parallel.nodes.parallel import offering
from comfy_parallel.nodes.parallel.gathering import Wait
from comfy_parallel.nodes.parallel.job import FanOut, Finish
from comfy_parallel.nodes.parallel.painting import Piece
from comfy_parallel.slots.slot import current_slot

QUESTION = "shares"
_OWN = b""  # in the place of what the job's own process has itself
Ask = Callable[..., Any]

plain_values.make_known(Plan, Piece, Tile)


@dataclass(frozen=True, slots=True)
class Form:
    """How values go from one side to the other: `pack` and `unpack` them; `kept` is what the asked side keeps of one.

    `pause_s`: between two questions for the same.
    """

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]
    kept: Callable[[Any], Any]
    pause_s: float


# Between processes of one machine: bytes, which the front does not look into.
PACKED = Form(lambda value: bytes(packed(value)), lambda value: unpacked(Packed(value)), Packed, 0.02)
# Between machines: values, which `fleet.plain_values` writes.
PLAIN = Form(unpacked, lambda value: value, lambda value: value, 0.1)

# The side that computes.


def job_here(prompt: Mapping[str, Any], classes: Classes) -> FarJob | None:
    """What the front says of the job that this process runs; None when it is not shared out."""
    return job_of(prompt, classes, lambda *asked: worker_side.ask(QUESTION, *asked), PACKED)


def job_of(prompt: Mapping[str, Any], classes: Classes, ask: Ask, form: Form) -> FarJob | None:
    """What whoever is asked says of the job with this workflow; None when it is not shared out."""
    if not any(node.get("class_type") in classes.collectors for node in prompt.values()):
        return None
    found = ask("role")
    return None if found is None else FarJob(ask, form, *form.unpack(found))


class FarJob:
    """As `job.FanOut`, where the job or a share of it is computed. What the job computes itself stays there."""

    is_waiting = False

    def __init__(self, ask: Ask, form: Form, participant: int, plans: Sequence[Plan]) -> None:
        self._ask, self._form = ask, form
        self.participant, self.plans = participant, list(plans)
        self.finish: dict[str, Finish] = {}
        self._own: dict[tuple[str, int], Any] = {}
        self._items: dict[str, Sequence[Any]] = {}

    def start(self) -> None:
        self._ask("start")

    def open(self, puller: str, items: Sequence[Any]) -> None:
        self._items[puller] = items
        self.plans[:] = self._form.unpack(self._ask("open", puller, [self._form.pack(item) for item in items]))

    def item(self, puller: str, participant: int) -> Any:
        return unpacked(self.raw_item(puller, participant))

    def raw_item(self, puller: str, participant: int) -> Any:
        if puller in self._items:
            return self._items[puller][participant]
        return self._form.unpack(self._ask("item", puller))

    def give(self, collector: str, participant: int, values: Any) -> None:
        if self.participant == 0:
            self._own[collector, participant] = values
        told = _OWN if self.participant == 0 and values is not None else self._form.pack(values)
        self._ask("give", collector, participant, told)

    def next_to_compute(self, collector: str, check: Callable[[], None]) -> int | None:
        while True:
            check()
            found = self.ask_next(collector)
            if not isinstance(found, Wait):
                return found
            time.sleep(self._form.pause_s)

    def ask_next(self, collector: str) -> int | Wait | None:
        is_there, found = self._ask("next", collector)
        return found if is_there else Wait.WAIT

    def collected(self, collector: str) -> list[Any]:
        return [unpacked(one) for one in self.given(collector) if one is not None]

    def given(self, collector: str) -> list[Any]:
        """What each participant gave; None of who had nothing to do."""
        told = dict(self._ask("collected", collector))
        count = max(told, default=-1) + 1
        return [self._one(collector, one, told[one]) if one in told else None for one in range(count)]

    def _one(self, collector: str, participant: int, value: Any) -> Any:
        return self._own[collector, participant] if _is_own(value) else self._form.unpack(value)

    def leave_out(self, node_id: str, participants: Iterable[int]) -> bool:
        return bool(self._ask("leave_out", node_id, list(participants)))


# The side that has shared it. It is called in the slot whose process or machine asks, and does not wait.


def _answer_by(form: Form) -> Callable[..., Any]:
    answers: dict[str, Callable[..., Any]] = {
        "role": lambda job: form.pack((job.participant, list(job.plans))),
        "start": lambda job: job.start(),
        "open": lambda job, puller, items: _open(form, job, puller, items),
        "item": lambda job, puller: form.pack(job.raw_item(puller, job.participant)),
        "give": lambda job, collector, one, values: job.give(collector, one, form.kept(values)),
        "next": _next,
        "collected": lambda job, collector: _collected(form, job, collector),
        "leave_out": lambda job, node_id, participants: job.leave_out(node_id, participants),
    }

    def answer(what: str, *args: Any) -> Any:
        slot = current_slot()
        job = None if slot is None else offering.running.get(slot.index)
        if job is not None:
            return answers[what](job, *args)
        if what == "role":
            return None
        raise RuntimeError("its job has ended")

    return answer


def _open(form: Form, job: FanOut, puller: str, items: Sequence[Any]) -> Any:
    job.open(puller, [form.kept(item) for item in items])
    return form.pack(list(job.plans))


def _next(job: FanOut, collector: str) -> tuple[bool, int | None]:
    found = job.ask_next(collector)
    return (False, None) if isinstance(found, Wait) else (True, found)


def _collected(form: Form, job: FanOut, collector: str) -> list[tuple[int, Any]]:
    """What others gave; nothing in the place of what the job has itself."""
    given = enumerate(job.given(collector))
    return [(one, value if _is_own(value) else form.pack(value)) for one, value in given if value is not None]


def _is_own(value: Any) -> bool:
    return isinstance(value, bytes) and value == _OWN


questions.answer_by(QUESTION, _answer_by(PACKED))
questions.answer_by(answering.QUESTION, _answer_by(PLAIN))
