"""Runs a job that has a collector as one parent, and a job for each other share that any slot may take."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any

from comfy_parallel.core.fan_out import Classes, plans
from comfy_parallel.core.states import SlotState
from comfy_parallel.fleet import worker_side
from comfy_parallel.fleet.remote import asking
from comfy_parallel.host import facts
from comfy_parallel.nodes.parallel import choice, elsewhere, offering
from comfy_parallel.nodes.parallel.gathering import Gathering
from comfy_parallel.nodes.parallel.job import FanOut, Job, Round
from comfy_parallel.slots.slot import Slot, current_slot, interrupt_job, slots_in_all

logger = logging.getLogger(__name__)

_RUNNING: ContextVar[Job | None] = ContextVar("comfy_parallel_fan_out", default=None)
_classes = Classes()

current = _RUNNING.get


def use(classes: Classes) -> None:
    """Share out the jobs that have collectors of these classes."""
    global _classes
    _classes = classes


def fanning_out(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the host's `PromptExecutor.execute`."""

    @functools.wraps(execute)
    def execute_shares(
        self: Any, prompt: Any, prompt_id: Any, extra_data: Any = None, execute_outputs: Any = (), **kwargs: Any
    ) -> Any:
        run = functools.partial(execute, self, prompt, prompt_id, extra_data or {}, execute_outputs, **kwargs)
        slot = current_slot()
        if slot is None or not _classes.collectors:
            return run()
        if worker_side.has_front():
            return _as(elsewhere.job_here(prompt, _classes), run)
        if slot.run is not None and slot.run.share is not None:
            return _run_share(self, prompt_id, slot, run)
        if asking.ASKS in (extra_data or {}):
            return _run_for_other_server(self.server, prompt, prompt_id, slot, run)
        if not offering.takes_shares(slot):  # Who computes it shares it out, if it can.
            return run()
        only = choice.slots_of(extra_data)
        planned = plans(prompt, execute_outputs, _classes, choice.count(extra_data, slots_in_all()))
        if not planned:
            return run()
        job = FanOut(prompt_id, [Round(one, Gathering(1 if one.puller else one.participants)) for one in planned])
        return _run_parent(self.server.prompt_queues[slot.index], slot, job, only, run)

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
            if any(not cached.issuperset(plan.collectors) for plan in job.plans if plan.puller is None):
                job.start()
        return add_message(self, event, data, *args, **kwargs)

    return add_message_and_start


def _as(job: Job | None, run: Callable[[], Any]) -> Any:
    """Run what is part of this job."""
    token = _RUNNING.set(job)
    try:
        return run()
    finally:
        _RUNNING.reset(token)


def _run_for_other_server(server: Any, prompt: Any, job_id: str, slot: Slot, run: Callable[[], Any]) -> Any:
    """Run a job, or a share of one, that another server has shared out."""
    told, client_id = {"prompt_id": job_id}, slot.run.client_id if slot.run is not None else None
    line = asking.Line(job_id, lambda: server.send_sync(asking.TOLD, told, client_id), facts.raise_if_interrupted)
    try:
        job = elsewhere.job_of(prompt, _classes, line.ask, elsewhere.PLAIN)
        if job is None:
            return run()
        offering.running[slot.index] = job
        return _as(job, run)
    finally:
        offering.running.pop(slot.index, None)
        line.close()


def _run_parent(queue: Any, slot: Slot, job: FanOut, only: Collection[int] | None, run: Callable[[], Any]) -> Any:
    job.children = children = offering.Queued(queue, slot, job, only)
    offering.running[slot.index] = job
    try:
        return _as(job, run)
    finally:
        del offering.running[slot.index]
        job.close()
        children.end()


def _run_share(executor: Any, child_id: str, slot: Slot, run: Callable[[], Any]) -> Any:
    """Run a share, unless its job has ended or computes it itself by now."""
    found = offering.taken(child_id)
    if found is None or not found[1].gathering.begin(found[0].participant, lambda: slot.state is SlotState.FAILED):
        executor.success, executor.status_messages = True, []
        executor.history_result = {"outputs": {}, "meta": {}}
        executor.server.client_id = None
        return None
    job, round, children = found
    executor.status_messages = []
    offering.running[slot.index] = job
    try:
        return _as(job, run)
    finally:
        del offering.running[slot.index]
        executor.server.client_id = None  # The host would tell the client of the end of a job that it does not know.
        if not _is_tried_again(job, round, children, slot, dict(executor.status_messages)):
            round.gathering.end(job.participant)
        children.offer(round)


def _is_tried_again(job: FanOut, round: Round, children: Any, slot: Slot, messages: dict[str, Any]) -> bool:
    """Whether a share is queued once more. Who interrupts a share means the job."""
    gathering = round.gathering
    if gathering.is_closed or job.has_nothing_to_do or "execution_success" in messages:
        return False
    if "execution_interrupted" in messages:
        interrupt_job(job.prompt_id)
        return False
    failed_on = gathering.fail(job.participant, slot.index, children.may_take)
    error = messages.get("execution_error") or {}
    logger.warning(
        "comfy_parallel: %s failed at the share of participant %d of job %s, which %s: %s",
        slot.name,
        job.participant,
        job.prompt_id,
        "another slot tries" if failed_on else "the job's own slot runs again",
        error.get("exception_message") or "its worker died",
    )
    if failed_on:
        children.put(round, job.participant, failed_on)
    return bool(failed_on)
