"""Runs a job that has a collector as one parent, and a job for each other participant that any slot may take."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from comfy_parallel.core.fan_out import Plan, plan
from comfy_parallel.core.shares import Share
from comfy_parallel.core.states import SlotState
from comfy_parallel.nodes.parallel.gathering import Gathering
from comfy_parallel.slots.slot import Slot, current_slot, interrupt_job, slots, slots_in_all

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class FanOut:
    """One job and its shares, while it runs. `participant` 0 is the job itself."""

    prompt_id: str
    plan: Plan
    gathering: Gathering
    participant: int = 0
    children: dict[str, int] = field(default_factory=dict)
    has_nothing_to_do: bool = False

    def leave_out(self, node_id: str, participants: Iterable[int]) -> None:
        """These participants get nothing of what this node gives out, so they compute nothing from it.

        If the slot that calls runs the share of one of them, that ends before the next node.
        """
        for participant in participants:
            for collector in self.plan.collectors_below(node_id):
                self.gathering.give(collector, participant, None)
            if participant == self.participant and (run := _here().run) is not None:
                self.has_nothing_to_do = run.interrupted = True


_RUNNING: ContextVar[FanOut | None] = ContextVar("comfy_parallel_fan_out", default=None)
_children: dict[str, FanOut] = {}  # What is queued for other slots, by the id of its job.

current = _RUNNING.get
_collectors: frozenset[str] = frozenset()
_sources: frozenset[str] = frozenset()
_branching: frozenset[str] = frozenset()


def use(collectors: Collection[str], sources: Collection[str], branching: Collection[str] = ()) -> None:
    """Share out the jobs that have nodes of the classes `collectors`; `sources` give each participant its own.

    `branching` are the collectors that take another branch of the workflow from each participant.
    """
    global _collectors, _sources, _branching
    _collectors, _sources, _branching = frozenset(collectors), frozenset(sources), frozenset(branching)


def default_participants() -> int:
    """How many shares a job is made of that does not say."""
    return slots_in_all()


def fanning_out(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptExecutor.execute`."""

    @functools.wraps(execute)
    def execute_shares(
        self: Any, prompt: Any, prompt_id: Any, extra_data: Any = None, execute_outputs: Any = (), **kwargs: Any
    ) -> Any:
        run = functools.partial(execute, self, prompt, prompt_id, extra_data or {}, execute_outputs, **kwargs)
        slot = current_slot()
        if slot is None or slot.process is not None or not _collectors:  # Such a process computes all shares itself.
            return run()
        if slot.run is not None and slot.run.share is not None:
            return _run_share(self, _children.pop(prompt_id, None), slot, run)
        planned = plan(prompt, execute_outputs, _collectors, _sources, default_participants(), _branching)
        if planned is None:
            return run()
        job = FanOut(prompt_id, planned, Gathering(planned.participants))
        return _run_parent(self.server.prompt_queues[slot.index], job, run)

    return execute_shares


def starting_shares(add_message: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptExecutor.add_message`, which tells what of a job is cached before it computes.

    A job whose collectors are all cached needs nobody.
    """

    @functools.wraps(add_message)
    def add_message_and_start(self: Any, event: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        job = current()
        if event == "execution_cached" and job is not None and job.participant == 0:
            cached = set(data.get("nodes", ()))
            is_first = not job.children  # A job that ran out of memory runs once more.
            if is_first and job.plan.is_worth_sharing and not cached.issuperset(job.plan.collectors):
                _offer(self.server.prompt_queues[_here().index], job)
        return add_message(self, event, data, *args, **kwargs)

    return add_message_and_start


def _here() -> Slot:
    slot = current_slot()
    if slot is None:
        raise RuntimeError("a share was begun outside of all slots")
    return slot


def _run_parent(queue: Any, job: FanOut, run: Callable[[], Any]) -> Any:
    token = _RUNNING.set(job)
    try:
        return run()
    finally:
        _RUNNING.reset(token)
        job.gathering.close()
        for child_id in job.children:
            _children.pop(child_id, None)
            if not queue.front.shares.drop(child_id):
                interrupt_job(child_id)


def _offer(queue: Any, job: FanOut) -> None:
    """Queue each share with the job's own number: a slot that is free takes it before what came later."""
    item = queue.running_items()[0]
    helpers = _helpers(_here())
    if not helpers:
        return
    number, _, _, extra_data, _, *rest = item
    for participant in range(1, job.plan.participants):
        child_id = str(uuid.uuid4())
        share = Share(job.prompt_id, participant, job.plan.participants)
        _children[child_id] = FanOut(job.prompt_id, job.plan, job.gathering, participant)
        job.children[child_id] = participant
        job.gathering.offer(participant)
        own = {key: value for key, value in extra_data.items() if key != "gpu_id"}
        told = {**own, "comfy_parallel": {"prompt_id": job.prompt_id, "participant": participant}}
        prompt = job.plan.child_prompt(participant)
        queue.front.shares.put(
            (number, child_id, prompt, told, job.plan.collectors_of(participant), *rest),
            share,
            item,
            helpers[participant % len(helpers)],
        )


def _helpers(own: Slot) -> list[int | None]:
    """The slots for shares, None for any. A slot in a process of its own cannot take one: what it makes stays there."""
    if all(slot.process is None for slot in slots()):
        return [None]
    return [slot.index for slot in slots() if slot.process is None and slot is not own]


def _run_share(executor: Any, job: FanOut | None, slot: Slot, run: Callable[[], Any]) -> Any:
    """Run a share, unless its job has ended or computes it itself by now."""
    if job is None or not job.gathering.begin(job.participant, lambda: slot.state is SlotState.FAILED):
        executor.success, executor.status_messages = True, []
        executor.history_result = {"outputs": {}, "meta": {}}
        executor.server.client_id = None
        return None
    token = _RUNNING.set(job)
    executor.status_messages = []
    try:
        return run()
    finally:
        _RUNNING.reset(token)
        executor.server.client_id = None  # The host would tell the client of the end of a job that it does not know.
        _tell_end(job, slot, dict(executor.status_messages))
        job.gathering.end(job.participant)


def _tell_end(job: FanOut, slot: Slot, messages: dict[str, Any]) -> None:
    """Who interrupts a share means the job. A share that failed is run again by the job itself, on its own slot."""
    if job.gathering.is_closed or job.has_nothing_to_do or "execution_success" in messages:
        return
    if "execution_interrupted" in messages:
        interrupt_job(job.prompt_id)
        return
    error = messages.get("execution_error") or {}
    logger.warning(
        "comfy_parallel: %s failed at the share of participant %d of job %s, which the job's own slot runs again: %s",
        slot.name,
        job.participant,
        job.prompt_id,
        error.get("exception_message") or "its worker died",
    )
