"""Interrupting jobs: the flag belongs to one run of one job, never to the process."""

from __future__ import annotations

from comfy_parallel.core.scope import current_scope
from comfy_parallel.slots.askers import meant_by
from comfy_parallel.slots.slot import Run, current_runs, current_slot, slots


def request_interrupt() -> int:
    """Interrupt what the caller means and return how many running jobs that is.

    Inside a slot: its own job. In a request: the job that the request names, else those of whoever asks, on the slot
    that it names or on all. Else: every running job.
    """
    runs = _meant_runs()
    for run in runs:
        run.interrupted = True
    current_scope().note_interrupted(run.prompt_id for run in runs)
    return len(runs)


def clear_interrupt() -> None:
    """What the host does before each job, and what a node may do during one.

    A run is born without the flag, so the host's clearing must do nothing: a flag that is already
    there came between dequeue and start, and belongs to this job.
    """
    slot = current_slot()
    run = slot.run if slot is not None else None
    if run is None:
        return
    if run.started:
        run.interrupted = False
    run.started = True


def is_interrupted() -> bool:
    """Whether the calling slot's job is to stop; outside slots, whether any job is."""
    slot = current_slot()
    if slot is None:
        return any(run.interrupted for run in current_runs())
    return slot.run is not None and slot.run.interrupted


def take_interrupt() -> bool:
    """True once per interrupt of the calling slot's job; it waits while the slot records a graph."""
    slot = current_slot()
    if slot is None or slot.run is None or not slot.run.interrupted or slot.is_recording:
        return False
    slot.run.interrupted = False
    return True


def _meant_runs() -> list[Run]:
    slot = current_slot()
    if slot is not None:
        return [slot.run] if slot.run is not None else []
    scope = current_scope()
    if scope.prompt_id is not None:
        return [run for run in current_runs() if run.prompt_id == scope.prompt_id]
    return meant_by(scope, [run for other in slots() if scope.covers(other.index) and (run := other.run) is not None])
