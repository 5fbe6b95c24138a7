"""Seconds of kinds and factors of slots are learnt from ends of jobs."""

from __future__ import annotations

import random

import pytest

from comfy_parallel.core.pace import Paces

SECONDS = {"short": 2.0, "long": 40.0, "other": 9.0}


def learnt(factors: list[float], *, jobs: int = 300, noise: float = 0.1, seed: int = 1) -> Paces:
    paces, dice = Paces(len(factors)), random.Random(seed)
    for _ in range(jobs):
        slot, kind = dice.randrange(len(factors)), dice.choice(list(SECONDS))
        paces.note(slot, kind, SECONDS[kind] * factors[slot] * dice.lognormvariate(0, noise))
    return paces


def test_slots_of_different_speed_are_told_apart() -> None:
    paces = learnt([1.0, 1.0, 2.0, 4.0])
    assert paces.are_unequal
    first, second, third, fourth = paces.factors()
    assert second / first == pytest.approx(1, rel=0.25)
    assert third / first == pytest.approx(2, rel=0.25)
    assert fourth / first == pytest.approx(4, rel=0.25)
    for kind, seconds in SECONDS.items():
        assert paces.seconds(kind) is not None
        assert (paces.seconds(kind) or 0) * fourth == pytest.approx(4 * seconds, rel=0.3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("slots", "noise"), [(4, 0.15), (2, 0.8), (16, 0.4)])
def test_equal_slots_stay_equal_also_with_noise(slots: int, noise: float, seed: int) -> None:
    paces, dice = Paces(slots), random.Random(seed)
    for _ in range(200 * slots):
        paces.note(dice.randrange(slots), "kind", 10 * dice.lognormvariate(0, noise))
        assert not paces.are_unequal


def test_nothing_is_said_before_enough_is_known() -> None:
    paces = Paces(2)
    assert paces.seconds("short") is None
    assert list(paces.factors()) == [1.0, 1.0]
    paces.note(0, "short", 1.0)
    paces.note(1, "short", 9.0)
    assert not paces.are_unequal
    assert paces.seconds("short") == pytest.approx(1.0, rel=1)


def test_what_came_out_of_a_cache_is_no_measurement() -> None:
    paces = Paces(2)
    paces.note(0, "short", 0.01)
    assert paces.seconds("short") is None


def test_kinds_are_forgotten_the_oldest_first() -> None:
    paces = Paces(1)
    for kind in range(1500):
        paces.note(0, kind, 1.0)
    assert paces.seconds(0) is None
    assert paces.seconds(1499) is not None
