"""A broken slot is told from broken jobs."""

from __future__ import annotations

import random

import pytest

from comfy_parallel.core.breaker import Breaker, JobEnd, Limits, Suspension

LIMITS = Limits(in_a_row=3, fast_s=5, first_pause_s=10, longest_pause_s=40)
ALL = range(4)


def fail(breaker: Breaker, slot: int, kind: str = "k", ran_s: float = 0.1, open_slots: object = ALL) -> object:
    return breaker.ended(JobEnd(slot, kind, False, ran_s), open_slots)  # type: ignore[arg-type]


def succeed(breaker: Breaker, slot: int, kind: str = "k") -> object:
    return breaker.ended(JobEnd(slot, kind, True, 1.0), ALL)


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(LIMITS, len(ALL))


def test_failures_in_a_row_suspend(breaker: Breaker) -> None:
    assert [fail(breaker, 1) for _ in range(3)] == [(None, []), (None, []), (Suspension(1, 10, 3), [])]


def test_a_success_or_a_slow_failure_between_does_not(breaker: Breaker) -> None:
    for _ in range(5):
        assert [fail(breaker, 1) for _ in range(2)] == [(None, [])] * 2
        assert succeed(breaker, 1, "other") == (None, [])
    assert [fail(breaker, 1, ran_s=60) for _ in range(9)] == [(None, [])] * 9


def test_one_clients_jobs_that_are_bound_to_it_say_nothing_and_several_clients_do(breaker: Breaker) -> None:
    bound = JobEnd(1, "k", False, 0.1, is_bound=True)
    assert [breaker.ended(bound, ALL) for _ in range(20)] == [(None, [])] * 20
    assert breaker.ended(bound._replace(kind="another client's"), ALL) == (Suspension(1, 10, 21), [])


def test_off_is_off() -> None:
    breaker = Breaker(Limits(in_a_row=0), 2)
    assert [fail(breaker, 0, open_slots=range(2)) for _ in range(99)] == [(None, [])] * 99


def test_the_last_open_slot_goes_on(breaker: Breaker) -> None:
    assert [fail(breaker, 1, open_slots=[1]) for _ in range(9)] == [(None, [])] * 9


def test_when_the_same_fails_on_two_others_the_jobs_were_to_blame(breaker: Breaker) -> None:
    for _ in range(3):
        fail(breaker, 0)
    assert fail(breaker, 1) == (None, [])
    assert fail(breaker, 2) == (None, [0])
    assert [fail(breaker, 0) for _ in range(2)] == [(None, [])] * 2


def test_of_two_slots_one_other_is_enough() -> None:
    breaker = Breaker(LIMITS, 2)
    for _ in range(3):
        fail(breaker, 0, open_slots=range(2))
    assert fail(breaker, 1, open_slots=[1]) == (None, [0])


def test_what_succeeds_elsewhere_was_not_to_blame(breaker: Breaker) -> None:
    for _ in range(3):
        fail(breaker, 0)
    fail(breaker, 1)
    succeed(breaker, 1)
    assert fail(breaker, 2) == (None, [])
    assert fail(breaker, 3, "another") == (None, [])


def test_all_kinds_that_it_failed_have_to_fail_elsewhere(breaker: Breaker) -> None:
    fail(breaker, 0, "a")
    fail(breaker, 0, "b")
    assert fail(breaker, 0, "b") == (Suspension(0, 10, 3), [])
    assert [fail(breaker, slot, "a") for slot in (1, 2)] == [(None, [])] * 2
    assert fail(breaker, 1, "b") == (None, [])
    assert fail(breaker, 2, "b") == (None, [0])


def test_pauses_grow_while_it_keeps_failing_and_start_again_after_a_success(breaker: Breaker) -> None:
    for _ in range(3):
        fail(breaker, 0)
    for pause_s in (20, 40, 40):
        breaker.tried(0)
        suspended = fail(breaker, 0)
        assert suspended == (Suspension(0, pause_s, suspended[0].failures), [])  # type: ignore[index]
    assert breaker.again(0) == 40
    breaker.tried(0)
    succeed(breaker, 0)
    assert [fail(breaker, 0) for _ in range(3)][-1] == (Suspension(0, 10, 3), [])


def test_a_broken_slot_of_four_costs_few_jobs_and_broken_jobs_cost_no_slot() -> None:
    """Each job goes to the first slot that is not suspended; a pause is 20 jobs long."""
    chance = random.Random(3)
    for broken in (set(), {0}, {1, 2}):
        breaker, suspended, failed = Breaker(LIMITS, 4), {}, 0
        for number in range(400):
            for slot in [slot for slot, until in suspended.items() if until <= number]:
                del suspended[slot]
                breaker.tried(slot)
            slot = min(slot for slot in ALL if slot not in suspended)
            kind = chance.choice(["good", "good", "good", "bad"])
            is_bad = kind == "bad" or slot in broken
            failed += is_bad and kind == "good"
            suspension, cleared = breaker.ended(
                JobEnd(slot, kind, not is_bad, 0.1), [other for other in ALL if other not in suspended]
            )
            for other in cleared:
                suspended.pop(other, None)
            if suspension is not None:
                suspended[suspension.slot] = number + 2 * suspension.pause_s
        assert failed <= 25 * len(broken)
