"""Which slot takes which waiting job."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass
from typing import Any

import pytest

from comfy_parallel.core.schedule import UnderWay, first_alone, first_start, slot_for
from comfy_parallel.core.states import SlotState

S = SlotState


@dataclass(order=True)
class Job:
    """A job as the schedule sees it, in the order in which jobs came."""

    number: int
    prompt_id: str = "job"
    client_id: Any = "client"
    target: int | None = None
    is_alone: bool = False
    turns: frozenset[str] = frozenset()
    most_at_once: int | None = None
    models: frozenset[str] = frozenset()
    barred: frozenset[int] = frozenset()
    standing: Any = 0
    passed: int = 0
    kind: str | None = None
    is_bound_to_kind: bool = False
    not_on: frozenset[int] = frozenset()


@dataclass
class OneSlot:
    """A slot as the schedule sees it."""

    index: int
    state: SlotState = S.IDLE
    last_client_id: Any = "nobody"
    is_alone: bool = False
    models: frozenset[str] = frozenset()
    kind: str = "thread"


def slots(*states: SlotState, last: dict[int, Any] | None = None) -> list[OneSlot]:
    return [OneSlot(index, state, (last or {}).get(index, "nobody")) for index, state in enumerate(states)]


def start(
    jobs: list[Job],
    all_slots: list[OneSlot],
    under_way: tuple[str, ...] = (),
    given: tuple[Job, ...] = (),
    affinity: int = 0,
) -> Any:
    """The number of the job that starts next, and its slot's."""
    heapq.heapify(jobs)

    def is_given(job: Job) -> bool:
        return any(job is one for one in given)

    last = first_alone(jobs, lambda job: job, all_slots, is_given)
    way = UnderWay(under_way, under_way)  # Each of these jobs is of a client of its own name.
    found = first_start(jobs, lambda job: job, all_slots, way, is_given, last, affinity)
    return None if found is None else (jobs[found[0]].number, found[1].index)


@pytest.mark.parametrize(
    ("client_id", "last_clients", "states", "chosen"),
    [
        ("a", {}, (S.IDLE, S.IDLE, S.IDLE), 0),
        ("a", {}, (S.RUNNING, S.IDLE, S.IDLE), 1),
        ("a", {2: "a"}, (S.IDLE, S.IDLE, S.IDLE), 2),
        ("a", {1: "a", 2: "a"}, (S.IDLE, S.IDLE, S.IDLE), 1),
        ("a", {2: "a"}, (S.IDLE, S.IDLE, S.RUNNING), 0),
        ("a", {0: "b"}, (S.IDLE, S.IDLE), 0),
        (None, {}, (S.IDLE, S.IDLE), 0),
        (None, {1: None}, (S.IDLE, S.IDLE), 1),
        (None, {0: "a"}, (S.IDLE,), 0),
        ("a", {1: "a"}, (S.IDLE, S.RETURNING), None),
        ("a", {0: "a", 1: "a"}, (S.IDLE, S.RETURNING), 0),
        ("b", {1: "a"}, (S.IDLE, S.RETURNING), 0),
        ("a", {1: "a"}, (S.IDLE, S.AWAY), 0),
        ("a", {}, (S.OFFERED, S.PAUSED, S.SUSPENDED, S.FAILED, S.DRAINING, S.STARTING), None),
    ],
)
def test_the_slot_of_a_job(
    client_id: Any, last_clients: dict[int, Any], states: tuple[SlotState, ...], chosen: int | None
) -> None:
    slot = slot_for(Job(0, client_id=client_id), slots(*states, last=last_clients))
    assert (None if slot is None else slot.index) == chosen


@pytest.mark.parametrize("state", [state for state in SlotState if state is not S.IDLE])
def test_a_bound_job_waits_for_its_slot(state: SlotState) -> None:
    assert slot_for(Job(0, target=0), slots(state, S.IDLE)) is None
    assert slot_for(Job(0, target=1), slots(state, S.IDLE)).index == 1  # type: ignore[union-attr]


def test_jobs_start_in_their_order() -> None:
    assert start([Job(3), Job(1), Job(2)], slots(S.IDLE)) == (1, 0)


def test_no_job_holds_up_one_that_can_start() -> None:
    jobs = [Job(0, target=0), Job(1, target=0), Job(2, "same"), Job(3, client_id="a"), Job(4)]
    busy = slots(S.RUNNING, S.IDLE, S.RETURNING, last={2: "a"})
    assert start(jobs, busy, under_way=("same",)) == (4, 1)


def test_jobs_of_one_id_run_in_turn() -> None:
    jobs = [Job(0, "same"), Job(1, "same")]
    assert start(jobs, slots(S.RUNNING, S.IDLE), under_way=("same",)) is None
    assert start(jobs, slots(S.IDLE, S.IDLE)) == (0, 0)


def test_what_has_a_slot_is_not_given_again() -> None:
    first, second = Job(0), Job(1, "other")
    assert start([first, second], slots(S.OFFERED, S.IDLE), given=(first,)) == (1, 1)
    assert start([first], slots(S.OFFERED, S.IDLE), given=(first,)) is None


def test_nothing_starts_without_jobs_or_without_idle_slots() -> None:
    assert start([], slots(S.IDLE)) is None
    assert start([Job(0)], slots(S.RUNNING)) is None
    assert start([Job(0)], []) is None


def test_it_is_quick_although_ten_thousand_jobs_wait_for_a_busy_slot() -> None:
    jobs = [Job(number, target=0) for number in range(10_000)]
    busy = slots(S.RUNNING, S.IDLE)
    began = time.thread_time()  # Others may keep the processor.
    for _ in range(10):
        assert start(jobs, busy) is None
    assert (time.thread_time() - began) / 10 < 0.1


# Jobs that take turns.


def test_jobs_that_need_the_same_for_themselves_run_one_at_a_time_beside_others() -> None:
    one, other, plain = (
        Job(n, prompt_id=str(n), turns=turns) for n, turns in enumerate(map(frozenset, ("a", "b", "")))
    )
    way = UnderWay(("other",), ("other",), frozenset("a"))
    assert slot_for(one, slots(S.IDLE, S.RUNNING), way) is None
    assert [slot_for(job, slots(S.IDLE, S.RUNNING), way).index for job in (other, plain)] == [0, 0]  # type: ignore[union-attr]
    assert slot_for(one, slots(S.IDLE, S.RUNNING), UnderWay(("other",), ("other",))).index == 0  # type: ignore[union-attr]


# Jobs that run alone.


@pytest.mark.parametrize("state", [S.OFFERED, S.RUNNING, S.DRAINING])
def test_a_job_that_runs_alone_waits_until_the_other_slots_have_drained(state: SlotState) -> None:
    job = Job(0, is_alone=True)
    assert slot_for(job, slots(S.IDLE, state), UnderWay(("other",), ("other",))) is None
    assert slot_for(job, slots(S.IDLE, S.RETURNING)).index == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("state", [S.OFFERED, S.RUNNING, S.DRAINING])
def test_no_job_starts_beside_one_that_runs_alone(state: SlotState) -> None:
    both = slots(S.IDLE, state)
    both[1].is_alone = True
    assert start([Job(1), Job(2, target=0)], both, ("other",)) is None


def test_jobs_behind_one_that_waits_to_run_alone_let_it_go_first() -> None:
    jobs = [Job(1), Job(2, is_alone=True), Job(3), Job(4, target=1)]
    assert start(jobs, slots(S.IDLE, S.IDLE, S.RUNNING), ("other",)) == (1, 0)
    assert start(jobs[1:], slots(S.IDLE, S.IDLE, S.RUNNING), ("other",)) is None
    assert start(jobs[1:], slots(S.IDLE, S.IDLE, S.RETURNING)) == (2, 0)


def test_a_job_that_runs_alone_waits_for_its_slot_and_others_for_it() -> None:
    jobs = [Job(1, target=1, is_alone=True), Job(2)]
    assert start(jobs, slots(S.IDLE, S.RUNNING), ("other",)) is None
    assert start(jobs, slots(S.IDLE, S.IDLE)) == (1, 1)


@pytest.mark.parametrize("state", [S.PAUSED, S.SUSPENDED, S.FAILED])
def test_nobody_waits_for_one_whose_slot_takes_no_jobs(state: SlotState) -> None:
    assert start([Job(1, target=1, is_alone=True), Job(2)], slots(S.IDLE, state)) == (2, 0)


def test_the_host_s_number_goes_before_a_wait_to_run_alone() -> None:
    assert start([Job(2, is_alone=True), Job(1)], slots(S.IDLE, S.RUNNING), ("other",)) == (1, 0)


# Models.

A, B = frozenset({"a.safetensors"}), frozenset({"b.safetensors"})


def holding(*models: frozenset[str], states: tuple[SlotState, ...] = ()) -> list[OneSlot]:
    made = slots(*(states or (S.IDLE,) * len(models)))
    for slot, held in zip(made, models, strict=True):
        slot.models = held
    return made


def chosen(job: Job, all_slots: list[OneSlot]) -> int | None:
    slot = slot_for(job, all_slots)
    return None if slot is None else slot.index


def test_a_job_goes_where_its_models_are() -> None:
    assert chosen(Job(1, models=B), holding(A, B)) == 1
    assert chosen(Job(1, models=A | B), holding(A, A | B)) == 1
    assert chosen(Job(1, models=A | B), holding(A, B)) == 0, "half of them is no reason"
    assert chosen(Job(1), holding(A, frozenset())) == 0, "a job without models has no preference"


def test_models_count_more_than_the_clients_last_job() -> None:
    both = holding(A, B)
    both[0].last_client_id = "client"
    assert chosen(Job(1, models=B), both) == 1
    both[0].state = S.RETURNING
    assert chosen(Job(1, models=B), both) == 1
    assert chosen(Job(1, models=A), both) is None, "it waits for the slot that comes back with both"


def test_a_job_overtakes_one_whose_models_the_slot_does_not_hold() -> None:
    jobs = [Job(1, models=A), Job(2, models=A), Job(3, models=B), Job(4, models=B)]
    busy = holding(A, B, states=(S.RUNNING, S.IDLE))
    assert start(jobs, busy, ("other",), affinity=1) == (3, 1)
    assert start(jobs, busy, ("other",)) == (1, 1)
    jobs[0].passed = 2
    assert start(jobs, busy, ("other",), affinity=3) == (3, 1)
    assert start(jobs, busy, ("other",), affinity=1) == (1, 1), "no more often than allowed, or than there are slots"


def test_with_many_slots_more_jobs_overtake_and_further_ones() -> None:
    far = [*(Job(number, models=A) for number in range(900)), Job(900, models=B)]
    busy = [OneSlot(index, S.RUNNING, models=A) for index in range(63)] + [OneSlot(63, models=B)]
    far[0].passed = 63
    assert start(far, busy, ("other",), affinity=16) == (900, 63)
    far[0].passed = 64
    assert start(far, busy, ("other",), affinity=16) == (0, 63)


@pytest.mark.parametrize(
    "kept_back",
    [
        Job(2, models=B, standing=1),
        Job(2, models=B, target=0),
        Job(2, models=B, prompt_id="other"),
        Job(2, models=B, is_alone=True),
        Job(2, models=B, most_at_once=1),
        Job(2),
    ],
)
def test_what_overtakes_may_start_there_itself(kept_back: Job) -> None:
    busy = holding(A, B, states=(S.RUNNING, S.IDLE))
    assert start([Job(1, models=A), kept_back], busy, ("other",), affinity=8) == (1, 1)


def test_only_the_next_jobs_overtake() -> None:
    far = [*(Job(number, models=A) for number in range(600)), Job(600, models=B)]
    busy = holding(A, B, states=(S.RUNNING, S.IDLE))
    assert start(far, busy, ("other",), affinity=8) == (0, 1)
    assert start(far[500:], busy, ("other",), affinity=8) == (600, 1)


# The order of one client's jobs.


def test_a_client_runs_no_more_jobs_than_it_may() -> None:
    one = [Job(1, client_id="a", most_at_once=2), Job(2, client_id="b")]
    assert start(one, slots(S.IDLE, S.RUNNING), ("a",)) == (1, 0)
    assert slot_for(one[0], slots(S.IDLE), UnderWay(("x", "y"), ("a", "a"))) is None
    assert slot_for(one[1], slots(S.IDLE), UnderWay(("x", "y"), ("a", "a"))) is not None


def test_jobs_in_order_do_not_overtake_each_other() -> None:
    bound_first = [Job(1, client_id="a", target=1, most_at_once=1), Job(2, client_id="a", most_at_once=1)]
    assert start(bound_first, slots(S.IDLE, S.RUNNING), ("other",)) is None
    assert start(bound_first, slots(S.IDLE, S.IDLE)) == (1, 1)


def test_jobs_of_nobody_have_no_order() -> None:
    jobs = [Job(1, client_id=None, target=1, most_at_once=1), Job(2, client_id=None, most_at_once=1)]
    assert start(jobs, slots(S.IDLE, S.RUNNING), ("other",)) == (2, 0)


# Kinds of slots.


def mixed(*states: SlotState) -> list[OneSlot]:
    """The first slot runs in a thread, the others in processes."""
    made = slots(*states)
    for slot in made[1:]:
        slot.kind = "process"
    return made


@pytest.mark.parametrize(("kind", "expected"), [(None, 0), ("thread", 0), ("process", 1)])
def test_a_job_goes_to_the_kind_that_suits_it(kind: str | None, expected: int) -> None:
    slot = slot_for(Job(1, kind=kind), mixed(S.IDLE, S.IDLE))
    assert slot is not None
    assert slot.index == expected


def test_the_kind_counts_more_than_models() -> None:
    all_slots = mixed(S.IDLE, S.IDLE)
    all_slots[0].models = frozenset({"a"})
    slot = slot_for(Job(1, kind="process", models=frozenset({"a"})), all_slots)
    assert slot is all_slots[1]


def test_a_job_that_suits_another_kind_does_not_wait() -> None:
    slot = slot_for(Job(1, kind="process"), mixed(S.IDLE, S.RUNNING))
    assert slot is not None
    assert slot.index == 0


def test_a_job_that_is_bound_to_a_kind_waits_for_it_and_lets_others_go_first() -> None:
    bound = Job(1, kind="process", is_bound_to_kind=True)
    assert slot_for(bound, mixed(S.IDLE, S.RUNNING)) is None
    assert start([bound, Job(2)], mixed(S.IDLE, S.RUNNING)) == (2, 0)
    assert start([bound, Job(2)], mixed(S.RUNNING, S.IDLE)) == (1, 1)
