"""On slots of different speed a job goes where it is expected to end first."""

from __future__ import annotations

import heapq
from typing import Any

import pytest

from comfy_parallel.core.schedule import UnderWay
from comfy_parallel.core.states import SlotState
from comfy_parallel.core.unequal import LOAD_S, first_expected
from tests.unit.core.test_schedule import Job, OneSlot, S

FAST, SLOW = 0, 1


def start(
    jobs: list[Job],
    free_in: list[float | None],
    seconds: float | None = 10.0,
    factors: tuple[float, ...] = (0.5, 2.0),
    states: tuple[SlotState, ...] | None = None,
    under_way: tuple[str, ...] = (),
    models: tuple[frozenset[str], ...] = (),
) -> Any:
    heapq.heapify(jobs)
    shown = states or tuple(S.IDLE if free == 0 else S.RUNNING for free in free_in)
    slots = [OneSlot(index, state) for index, state in enumerate(shown)]
    for slot, held in zip(slots, models, strict=False):
        slot.models = held
    found = first_expected(
        jobs,
        lambda job: job,
        slots,
        UnderWay(under_way, under_way),
        lambda job: False,
        lambda job: seconds,
        factors,
        free_in,
    )
    return None if found is None else (jobs[found[0]].number, found[1].index)


@pytest.mark.parametrize(
    ("free_in", "expected"),
    [
        ([0, 0], (1, FAST)),
        ([14, 0], None),  # 14 + 5 seconds is sooner than 20.
        ([16, 0], (1, SLOW)),
        ([None, 0], (1, SLOW)),  # Nobody knows when it will be free.
        ([0, 3], (1, FAST)),
        ([3, 3], None),
    ],
)
def test_a_job_starts_where_it_ends_first(free_in: list[float | None], expected: Any) -> None:
    assert start([Job(1)], free_in) == expected


def test_the_next_jobs_count_with_what_was_promised() -> None:
    jobs = [Job(number, client_id=str(number)) for number in range(1, 6)]
    assert start(jobs, [4, 0]) == (4, SLOW), "three jobs end sooner one after the other on the fast slot: at 9, 14, 19"


def test_a_job_of_an_unknown_kind_waits_for_nobody() -> None:
    assert start([Job(1)], [1, 0], seconds=None) == (1, SLOW)
    assert start([Job(1)], [0, 0], seconds=None) == (1, FAST)


def test_models_that_a_slot_holds_save_their_load() -> None:
    held = frozenset({"a.safetensors"})
    equal = (1.0, 1.1)
    assert start([Job(1, models=held)], [0, 0], factors=equal, models=(frozenset(), held)) == (1, SLOW)
    assert start([Job(1, models=held)], [0, 0], 30 * LOAD_S, factors=equal, models=(frozenset(), held)) == (1, FAST)


@pytest.mark.parametrize("closed", [S.FAILED, S.PAUSED, S.SUSPENDED, S.DRAINING])
def test_nobody_waits_for_a_closed_slot(closed: SlotState) -> None:
    assert start([Job(1)], [0, 0], states=(closed, S.IDLE)) == (1, SLOW)


def test_bound_jobs_start_on_their_slot_whatever_others_wait_for() -> None:
    jobs = [*(Job(number) for number in range(100)), Job(100, target=SLOW, client_id="other")]
    assert start(jobs, [0.001, 0], factors=(0.0001, 2.0)) == (100, SLOW)
    assert start([Job(1, target=FAST), Job(2, target=SLOW)], [5, 0]) == (2, SLOW)


def test_ids_and_clients_keep_their_order() -> None:
    assert start([Job(1, prompt_id="a")], [0, 0], under_way=("a",)) is None
    in_order = [Job(1, most_at_once=1, target=FAST), Job(2, most_at_once=1)]
    assert start(in_order, [99, 0]) is None, "the second must not overtake the first of its client"


def test_it_decides_quickly_although_ten_thousand_wait() -> None:
    jobs = [Job(number) for number in range(10_000)]
    assert start(jobs, [14, 0], factors=(0.5, 2.0)) is not None
