"""A job that is shared out, as its nodes see it in the process of the front."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from comfy_parallel.core.fan_out import Plan
from comfy_parallel.fleet.tensors import unpacked
from comfy_parallel.nodes.parallel.gathering import Gathering, Wait

POLL_S = 0.1  # An interrupt sets a flag and wakes nobody.
Values = list[list[Any]]  # For each output of a collector the values of one participant.
Finish = Callable[[Sequence[Any]], Any]


@dataclass(slots=True)
class Round:
    """Shares that are made together. `most`: how many slots may compute them at once; None for any number.

    `items`: what the node that hands out items has for each participant.
    """

    plan: Plan
    gathering: Gathering = field(default_factory=Gathering)
    most: int | None = None
    items: Sequence[Any] = ()


class Children(Protocol):
    """What a job has queued for other slots."""

    def offer(self, round: Round) -> None:
        """Queue what was not offered yet, as far as may be out at once."""

    def may_take(self, failed_on: frozenset[int]) -> bool:
        """Whether a slot that is not among these could soon take a share."""


class Job(Protocol):
    """What nodes need of the job that they are part of; `participant` 0 is the job itself, others are its shares."""

    participant: int
    finish: dict[str, Finish]

    @property
    def plans(self) -> Sequence[Plan]: ...

    def start(self) -> None:
        """Offer the shares that are known before any node runs."""

    def open(self, puller: str, items: Sequence[Any]) -> None:
        """A node has these items, a share for each."""

    def item(self, puller: str, participant: int) -> Any:
        """What a participant gets of that node."""

    def give(self, collector: str, participant: int, values: Any) -> None:
        """Leave what a participant has for a collector."""

    def next_to_compute(self, collector: str, check: Callable[[], None]) -> int | None:
        """The participant whose share the job is to compute now; None once all have given theirs.

        Waits while others compute. `check()` is called all the while, and ends the waiting by an exception.
        """

    def collected(self, collector: str) -> list[Any]:
        """What all participants gave, in their order, without those that had nothing to do."""

    def leave_out(self, node_id: str, participants: Iterable[int]) -> bool:
        """These participants get nothing of what a node gives out; whether the caller is one of them."""


def plan_of(job: Job, collector: str) -> Plan | None:
    """The plan with this collector; None when it is not one of the job's: a node has made it."""
    return next((plan for plan in job.plans if collector in plan.collectors), None)


def puller_plan(job: Job, node_id: str) -> Plan | None:
    """The plan of the items that this node hands out."""
    return next((plan for plan in job.plans if plan.puller == node_id), None)


def participants_in(job: Job) -> int:
    """How many there are of the shares that are known before any node runs."""
    return next((plan.participants for plan in job.plans if plan.puller is None), 1)


class FanOut:
    """The job or one of its shares. All shares have the job's rounds; a share has one of them."""

    def __init__(self, prompt_id: str, rounds: Sequence[Round], participant: int = 0) -> None:
        self.prompt_id, self.rounds, self.participant = prompt_id, list(rounds), participant
        self.finish: dict[str, Finish] = {}
        self.children: Children | None = None
        self.is_started = self.is_waiting = self.has_nothing_to_do = False

    @property
    def plans(self) -> Sequence[Plan]:
        return [round.plan for round in self.rounds]

    def start(self) -> None:
        if self.is_started or self.participant or self.children is None:  # It may run again, for want of memory.
            return
        self.is_started = True
        for round in self.rounds:
            if round.plan.puller is None and round.plan.is_worth_sharing:
                self.children.offer(round)

    def open(self, puller: str, items: Sequence[Any]) -> None:
        round = next(one for one in self.rounds if one.plan.puller == puller)
        round.items, round.most = items, round.plan.participants if round.most is None else round.most
        round.plan = round.plan.opened(len(items), uuid.uuid4().hex)
        round.gathering.open(len(items))
        if self.children is not None:
            self.children.offer(round)

    def item(self, puller: str, participant: int) -> Any:
        return unpacked(self.raw_item(puller, participant))

    def raw_item(self, puller: str, participant: int) -> Any:
        """As `item`; packed when it came so."""
        return next(one for one in self.rounds if one.plan.puller == puller).items[participant]

    def give(self, collector: str, participant: int, values: Any) -> None:
        self._round_of(collector).gathering.give(collector, participant, values)

    def next_to_compute(self, collector: str, check: Callable[[], None]) -> int | None:
        gathering = self._round_of(collector).gathering
        while True:
            check()
            found = self.ask_next(collector)
            if not isinstance(found, Wait):
                return found
            gathering.wait(POLL_S)

    def ask_next(self, collector: str) -> int | Wait | None:
        """As `next_to_compute`, without waiting."""
        round = self._round_of(collector)
        may_take = self.children.may_take if self.children is not None else lambda failed: False
        found = round.gathering.next_to_compute(collector, round.plan.shares_of(collector), may_take)
        self.is_waiting = isinstance(found, Wait)
        return found

    def collected(self, collector: str) -> list[Any]:
        return [unpacked(one) for one in self.given(collector) if one is not None]

    def given(self, collector: str) -> list[Any]:
        """What each participant gave, in their order; packed when it came so, None of who had nothing to do."""
        round = self._round_of(collector)
        return round.gathering.given(collector, round.plan.shares_of(collector))

    def leave_out(self, node_id: str, participants: Iterable[int]) -> bool:
        left_out = set(participants)
        for round in self.rounds:
            for collector in round.plan.collectors_below(node_id):
                for participant in left_out:
                    round.gathering.give(collector, participant, None)
        self.has_nothing_to_do = self.participant in left_out
        return self.has_nothing_to_do

    def _round_of(self, collector: str) -> Round:
        return next(round for round in self.rounds if collector in round.plan.collectors)

    def close(self) -> None:
        """The job has ended: no share is to begin any more."""
        for round in self.rounds:
            round.gathering.close()
