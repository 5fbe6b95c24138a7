"""The states of a slot."""

from __future__ import annotations

import pytest

from comfy_parallel.core.states import CLOSED, TRANSITIONS, SlotEvent, SlotState, next_state

S, E = SlotState, SlotEvent


def after(*events: SlotEvent, state: SlotState = S.STARTING) -> SlotState:
    for event in events:
        state = next_state(state, event)
    return state


def test_a_slot_runs_one_job_after_another() -> None:
    once = (E.READY, E.OFFER, E.TAKE, E.END)
    assert after(*once) is S.RETURNING
    assert after(*once, *once, E.READY) is S.IDLE


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((E.READY, E.LEAVE), S.AWAY),
        ((E.READY, E.OFFER, E.WITHDRAW), S.IDLE),
        ((E.READY, E.TAKE), S.RUNNING),
        ((E.READY, E.TAKE, E.LEAVE), S.AWAY),
        ((E.READY, E.DIE), S.STARTING),
        ((E.READY, E.TAKE, E.END, E.DIE), S.STARTING),
        ((E.READY, E.PAUSE, E.READY, E.LEAVE), S.PAUSED),
        ((E.READY, E.PAUSE, E.RESUME, E.READY), S.IDLE),
        ((E.READY, E.TAKE, E.PAUSE), S.DRAINING),
        ((E.READY, E.TAKE, E.PAUSE, E.END, E.READY), S.PAUSED),
        ((E.READY, E.TAKE, E.PAUSE, E.RESUME, E.END), S.RETURNING),
        ((E.READY, E.TAKE, E.FAIL, E.END, E.DIE), S.FAILED),
        ((E.SUSPEND, E.READY, E.RESUME), S.STARTING),
        ((E.READY, E.OFFER, E.PAUSE), S.PAUSED),
        ((E.READY, E.OFFER, E.PAUSE, E.TAKE), S.DRAINING),
        ((E.READY, E.OFFER, E.PAUSE, E.TAKE, E.END), S.PAUSED),
        ((E.READY, E.OFFER, E.PAUSE, E.RESUME, E.TAKE), S.RUNNING),
        ((E.READY, E.PAUSE, E.RESUME, E.LEAVE), S.AWAY),
        ((E.READY, E.PAUSE, E.PAUSE), S.PAUSED),
        ((E.READY, E.TAKE, E.PAUSE, E.PAUSE, E.END), S.PAUSED),
        ((E.READY, E.TAKE, E.PAUSE, E.LEAVE), S.PAUSED),
        ((E.READY, E.TAKE, E.END, E.PAUSE, E.READY), S.PAUSED),
        ((E.READY, E.LEAVE, E.PAUSE, E.READY), S.PAUSED),
        ((E.PAUSE, E.DIE), S.PAUSED),
        ((E.FAIL, E.TAKE, E.END), S.FAILED),
    ],
)
def test_where_events_lead(events: tuple[SlotEvent, ...], state: SlotState) -> None:
    assert after(*events) is state


@pytest.mark.parametrize("state", [state for state in SlotState if state is not S.IDLE])
def test_only_an_idle_slot_is_offered_a_job(state: SlotState) -> None:
    with pytest.raises(ValueError, match=f"a slot that is {state.value} cannot offer"):
        next_state(state, E.OFFER)


def test_every_state_has_a_row_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(SlotState)
    assert all(set(row.values()) - {state} for state, row in TRANSITIONS.items())


@pytest.mark.parametrize("state", list(SlotState))
def test_every_slot_can_be_paused_and_every_closed_one_resumed(state: SlotState) -> None:
    assert next_state(state, E.PAUSE) in CLOSED
    assert (E.RESUME in TRANSITIONS[state]) is (state in CLOSED)


def test_what_clients_see() -> None:
    assert {state.shown for state in (S.IDLE, S.OFFERED, S.RETURNING, S.AWAY)} == {"idle"}
    assert [S.STARTING.shown, S.RUNNING.shown, S.PAUSED.shown] == ["starting", "running", "paused"]
