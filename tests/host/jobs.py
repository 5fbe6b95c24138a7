"""Small jobs that several test files submit, jobs that keep their slot busy, and what a job's history tells."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.host.server import JSON, POLL_S, HostServer, WebSocketClient
from tests.host.workflows import Workflow, node

HOLD_S = 600.0  # longer than any test waits: a held job ends only by an interrupt


def quick(value: int) -> Workflow:
    """Shows a number; jobs with different numbers share nothing in a cache."""
    return {"value": node("CPTConstInt", value=value), "out": node("CPTOut", value=["value", 0])}


def progress(seed: int, *, steps: int = 3, ms: int = 1) -> Workflow:
    """Reports each step, and can be interrupted between steps."""
    return {"work": node("CPTProgress", steps=steps, ms=ms, seed=seed), "out": node("CPTOut", value=["work", 0])}


def hold(seed: int = 0) -> Workflow:
    """Keeps its slot until it is interrupted."""
    return {"hold": node("CPTSleep", seconds=HOLD_S, seed=seed), "out": node("CPTOut", value=["hold", 0])}


def meet(key: str, parties: int, *, timeout: float = 120.0) -> Workflow:
    """Ends once `parties` jobs with this key run at the same time; fails after `timeout` seconds."""
    return {
        "meet": node("CPTRendezvous", key=key, parties=parties, timeout=timeout),
        "out": node("CPTOut", value=["meet", 1]),
    }


def new_key() -> str:
    return uuid.uuid4().hex


def outcome(entry: JSON) -> str:
    """`success`, `interrupted` or `error`, out of a history entry."""
    kinds = [kind for kind, _ in entry["status"]["messages"]]
    ends = [kind for kind in kinds if kind in ("execution_success", "execution_interrupted", "execution_error")]
    assert len(ends) == 1, f"a job ends once: {kinds}"
    return ends[0].removeprefix("execution_")


def message(entry: JSON, kind: str) -> JSON:
    """What a history entry holds of one kind of event."""
    found: JSON = dict(entry["status"]["messages"])[kind]
    return found


def shown(entry: JSON) -> Any:
    """What CPTOut showed."""
    return entry["outputs"]["out"]["value"][0]


def interrupt(server: HostServer, job_id: str | None = None, slot: int | str | None = None) -> None:
    """Interrupt a job, a slot's job, or everything."""
    headers = {} if slot is None else {"X-TARGET-GPU": str(slot)}
    body = {} if job_id is None else {"prompt_id": job_id}
    status, reply = server.request("POST", "/interrupt", body, headers=headers)
    assert status == 200, reply


def queue_ids(server: HostServer, slot: int | str | None = None) -> tuple[list[str], list[str]]:
    """The ids of the running and of the waiting jobs that `GET /queue` shows."""
    headers = {} if slot is None else {"X-TARGET-GPU": str(slot)}
    status, reply = server.request("GET", "/queue", headers=headers)
    assert status == 200, reply
    return [item[1] for item in reply["queue_running"]], [item[1] for item in reply["queue_pending"]]


def start_held(server: HostServer, watcher: WebSocketClient, slot: int | str | None, seed: int = 0) -> str:
    """Submit a job that keeps its slot busy; returns its id once its node runs."""
    job_id: str = server.submit(hold(seed), slot, watcher.client_id)["prompt_id"]
    watcher.wait_for(lambda event: event["type"] == "executing" and event["data"].get("prompt_id") == job_id)
    return job_id


def release(server: HostServer, *job_ids: str) -> dict[str, JSON]:
    """End held jobs; returns their history entries."""
    for job_id in job_ids:
        interrupt(server, job_id)
    return server.wait(job_ids)


@contextmanager
def held(server: HostServer, *slots: int) -> Iterator[list[str]]:
    """Keep slots busy inside the block; yields one job id per slot, in the order of `slots`."""
    with server.websocket() as watcher:
        job_ids: list[str] = []
        try:
            job_ids += [start_held(server, watcher, slot) for slot in slots]
            yield job_ids
        finally:
            release(server, *job_ids)


def eventually(holds: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    """Return once this holds; fail with these words when it does not."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(POLL_S)


def slots_shown(server: HostServer) -> list[JSON]:
    """What `/queue/all` tells of each slot."""
    found: list[JSON] = server.request("GET", "/queue/all")[1]["queues"]
    return found


def await_states(server: HostServer, expected: list[str]) -> list[JSON]:
    """The slots, once they are in these states.

    One is judged after its job has come into the history, and one that is resumed may start yet.
    """
    deadline = time.monotonic() + 60
    shown = slots_shown(server)
    while [slot["state"] for slot in shown] != expected:
        assert time.monotonic() < deadline, shown
        time.sleep(POLL_S)
        shown = slots_shown(server)
    return shown


def run_on_each(server: HostServer, workflows: Sequence[Workflow]) -> list[JSON]:
    """Run workflow i on slot i, all at once; returns their history entries."""
    ids = [server.submit(workflow, slot)["prompt_id"] for slot, workflow in enumerate(workflows)]
    entries = server.wait(ids)
    return [entries[job_id] for job_id in ids]


def await_idle(server: HostServer, timeout_s: float = 120) -> None:
    """Return once nothing runs and nothing waits; every job submitted before is then in the history."""
    deadline = time.monotonic() + timeout_s
    while any(queue_ids(server)):
        assert time.monotonic() < deadline, f"the queue is not empty after {timeout_s} s"
        time.sleep(POLL_S)
