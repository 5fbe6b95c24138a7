"""No schedule ends before the bound that the simulation compares with, and the scheduler comes close to it."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.schedule_bound import Work, lower_bound
from benchmarks.schedule_simulation import KNOWN, LOAD_S, UNKNOWN, OneSlot, Ours, simulate, trace


def best_makespan(jobs: list[Work], slownesses: list[float], load_s: float) -> float:
    """Of all schedules: each assignment to slots in each order."""
    best = float("inf")
    for order in itertools.permutations(jobs):
        for places in itertools.product(range(len(slownesses)), repeat=len(jobs)):
            free, held = [0.0] * len(slownesses), [None] * len(slownesses)
            for job, place in zip(order, places, strict=True):
                load = 0.0 if held[place] == job.models else load_s
                free[place] = max(free[place], job.came) + load + job.seconds * slownesses[place]
                held[place] = job.models  # type: ignore[call-overload]
            best = min(best, max(free))
    return best


@pytest.mark.parametrize("slownesses", [[1.0], [1.0, 1.0], [1.0, 3.0]])
@pytest.mark.parametrize("seed", range(8))
def test_no_schedule_ends_before_it(slownesses: list[float], seed: int) -> None:
    dice = random.Random(seed)
    jobs = [
        Work(dice.choice([0.0, 0.0, 3.0, 9.0]), dice.uniform(0.5, 12), dice.choice("ab"))
        for _ in range(6 if len(slownesses) == 1 else 4)
    ]
    load_s = dice.choice([0.0, 1.0, 5.0])
    bound = lower_bound(jobs, slownesses, load_s)
    assert 0.5 * best_makespan(jobs, slownesses, load_s) < bound <= best_makespan(jobs, slownesses, load_s) + 1e-6


def test_a_model_that_one_slot_cannot_finish_is_loaded_twice() -> None:
    jobs = [Work(0.0, 1.0, "a") for _ in range(20)]
    assert lower_bound(jobs, [1.0, 1.0], 5.0) == pytest.approx(15.0)  # 10 seconds of work and a load for each slot


@pytest.mark.parametrize("kind", UNKNOWN + KNOWN)
@pytest.mark.parametrize("count", [2, 8])
def test_the_scheduler_comes_close_to_it(kind: str, count: int) -> None:
    slots = [OneSlot(index) for index in range(count)]
    found = simulate(trace(kind, 250 * count, count, random.Random(1)), slots, Ours(slots, 16), LOAD_S)
    assert 1.0 <= found["makespan / bound"] <= 1.05
