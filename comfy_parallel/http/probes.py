"""What a load balancer or an orchestrator asks: is the server alive, and should it be sent jobs?"""

from __future__ import annotations

from typing import Any

from comfy_parallel.core.states import CLOSED
from comfy_parallel.errors import Draining
from comfy_parallel.http.health import answers_of

RETRY_AFTER_S = Draining.retry_after_s


def slot_state(front: Any, gpu_id: int) -> dict[str, Any]:
    """A slot's state, and whether it refuses new jobs that are bound to it."""
    state = front.slot_queues[gpu_id].slot.state.shown
    return {"gpu_id": gpu_id, "state": state, "refuses_jobs": front.closing.refuses(gpu_id)}


def slots_health(front: Any) -> list[dict[str, Any]]:
    """Each slot's state, and whether its device answers."""
    return [
        {
            **slot_state(front, one.slot.index),
            "device": one.slot.place,
            "health": one.health,
            "error": one.error or one.slot.why_suspended,
        }
        for one in answers_of(queue.slot for queue in front.slot_queues)
    ]


def queue_health(front: Any) -> dict[str, Any]:
    """Whether a restart would find the jobs again: `ok`, `degraded` with the reason in `error`, or `off`."""
    ledger = front.ledger
    state = "ok" if ledger.keeps else "degraded" if ledger.problem is not None else "off"
    return {"state": state, "error": ledger.problem}


def degraded(front: Any) -> dict[str, str]:
    """What `GET /ready` says besides of a server that takes jobs and cannot keep them."""
    problem = front.ledger.problem
    return {} if problem is None else {"degraded": f"a restart would lose jobs: {problem}"}


def why_not_ready(front: Any) -> str | None:
    """Why the server should be sent no jobs now; None when it should."""
    if not front.is_started:
        return "the slots' workers have not been started yet"
    if front.closing.refuses(None):
        return "the server is draining"
    states = {one.slot.index: one.slot.state for one in answers_of(q.slot for q in front.slot_queues) if not one.error}
    if all(state in CLOSED for state in states.values()):
        return "no slot can take jobs: each is paused, draining, suspended, failed or without its device"
    return None
