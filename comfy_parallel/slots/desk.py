"""Where one slot finds the job that it is given, and who a job comes from."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from comfy_parallel.core.states import SlotState
from comfy_parallel.slots.items import view_of
from comfy_parallel.slots.slot import Run, Slot


class Asker(NamedTuple):
    """Who submits a job: as `Scope.peer`, `Scope.party` and `Scope.is_in_turn`."""

    peer: str | None = None
    party: Any = None
    is_in_turn: bool = False


NOBODY = Asker()


class Desk:
    """Where one slot finds the job that it is given. `inbox` holds it until the slot's worker takes it.

    A node pack that replaces the queue's `get` takes from a list, as the host's own does: this one.
    """

    def __init__(self, slot: Slot, mutex: Any) -> None:
        self.slot = slot
        self.inbox: list[Any] = []
        self.given: Any = None  # the job in `inbox` that also still is among those that wait
        self.is_asked = False  # The worker is in the queue's `get`, or in what a node pack has put in its place.
        self.taken: list[int] = []  # the numbers of the jobs that it has taken in this `get`
        self.runs: Any = None  # what it runs of these; the host takes that out of its own table before it has ended
        self.left_out: dict[str, Any] = {}  # what the host gives with the end of its job, and a node pack does not take
        self.is_poked = False  # Its worker is to ask again.
        self.has_declined = False  # It was given a job, and went to sleep again without taking it.
        self.woken = threading.Condition(mutex)
        self.flags: dict[str, Any] = {}

    def run_of(self, item: Any) -> Run:
        """A run of this job on this slot."""
        view = view_of(item)
        return Run(
            view.prompt_id,
            view.client_id,
            view.peer,
            view.share,
            is_alone=view.is_alone,
            turns=view.turns,
            party=view.party,
            has_to_load=not view.models <= self.models,
        )

    @property
    def index(self) -> int:
        return self.slot.index

    @property
    def kind(self) -> str:
        return self.slot.kind

    @property
    def last_client_id(self) -> Any:
        return self.slot.last_client_id

    @property
    def models(self) -> frozenset[str]:
        return self.slot.models

    @property
    def is_alone(self) -> bool:
        """Whether the slot runs, or is about to run, a job that runs alone."""
        run = self.slot.run
        return run.is_alone if run is not None else self.given is not None and bool(view_of(self.given).is_alone)

    @property
    def state(self) -> SlotState:
        """As the schedule sees it."""
        return SlotState.AWAY if self.has_declined else self.slot.state
