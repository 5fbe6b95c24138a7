"""The states of a slot and what leads from one to another. One table; a step that is not in it is a fault."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class SlotState(str, Enum):
    """What a slot does. Only an idle one is given jobs."""

    STARTING = "starting"  # Its worker has not asked for a job yet.
    IDLE = "idle"  # Its worker waits for a job.
    OFFERED = "offered"  # A job was laid out for it, which its worker has not taken yet.
    RUNNING = "running"
    RETURNING = "returning"  # Its job has ended, and its worker has not come back yet.
    AWAY = "away"  # Its worker left without a job: it tidies up, or has flags to handle.
    DRAINING = "draining"  # It ends its job and takes no other.
    PAUSED = "paused"
    SUSPENDED = "suspended"  # It failed its jobs in a row.
    FAILED = "failed"  # Its device is lost.

    @property
    def shown(self) -> str:
        """The word that clients see: they need not know how a worker comes and goes."""
        return _SHOWN.get(self, self.value)


class SlotEvent(str, Enum):
    """What happens to a slot."""

    READY = "ready"  # Its worker asks for a job.
    OFFER = "offer"
    WITHDRAW = "withdraw"  # The offered job is no longer there for it.
    TAKE = "take"
    LEAVE = "leave"  # Its worker goes without a job, or hands one back.
    END = "end"  # Its job has ended, however it did.
    DIE = "die"  # Its worker died, and will be started again.
    PAUSE = "pause"
    RESUME = "resume"  # after a pause, a suspension or a failure; a worker that waits says that it is ready
    SUSPEND = "suspend"
    FAIL = "fail"


S, E = SlotState, SlotEvent
_SHOWN = {S.OFFERED: "idle", S.RETURNING: "idle", S.AWAY: "idle"}
_CLOSING = {E.PAUSE: S.PAUSED, E.SUSPEND: S.SUSPENDED, E.FAIL: S.FAILED}
_ABSENT = {E.READY: S.IDLE, E.DIE: S.STARTING, **_CLOSING}
CLOSED = frozenset((S.DRAINING, S.PAUSED, S.SUSPENDED, S.FAILED))  # They take no other job.


def _closed(state: SlotState) -> dict[SlotEvent, SlotState]:
    """Whatever its worker does, a closed slot stays so until it is resumed or closed for another reason."""
    stays = dict.fromkeys((E.READY, E.LEAVE, E.END, E.DIE, E.WITHDRAW, E.TAKE), state)
    return {**stays, **_CLOSING, E.RESUME: S.STARTING}


TRANSITIONS: Mapping[SlotState, Mapping[SlotEvent, SlotState]] = {
    # Resumed when its worker was about to come back from asking, with a job or without.
    S.STARTING: {**_ABSENT, E.TAKE: S.RUNNING, E.LEAVE: S.AWAY},
    S.AWAY: _ABSENT,
    S.RETURNING: _ABSENT,
    # A worker may take a job that was not offered: one that a node pack keeps in a queue of its own.
    S.IDLE: {**_ABSENT, E.OFFER: S.OFFERED, E.TAKE: S.RUNNING, E.LEAVE: S.AWAY},
    S.OFFERED: {E.TAKE: S.RUNNING, E.WITHDRAW: S.IDLE, **_CLOSING},
    S.RUNNING: {E.END: S.RETURNING, E.LEAVE: S.AWAY, E.PAUSE: S.DRAINING, E.FAIL: S.FAILED},
    S.DRAINING: {
        E.END: S.PAUSED,
        E.LEAVE: S.PAUSED,
        E.PAUSE: S.DRAINING,
        E.RESUME: S.RUNNING,
        E.FAIL: S.FAILED,
    },
    S.PAUSED: {**_closed(S.PAUSED), E.TAKE: S.DRAINING},  # a job that its worker, or a node pack, had already
    S.SUSPENDED: _closed(S.SUSPENDED),
    S.FAILED: _closed(S.FAILED),
}


def next_state(state: SlotState, event: SlotEvent) -> SlotState:
    """The state after an event.

    Raises:
        ValueError: when this cannot happen in this state.
    """
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise ValueError(f"a slot that is {state.value} cannot {event.value}")
    return following
