"""Where a request or a job is meant to go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from comfy_parallel.core import scope
from comfy_parallel.core.scope import AUTO, Scope, current_scope, note_placed, parse_target, scoped
from comfy_parallel.errors import BadRequest

NUM_SLOTS = 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("3", 3),
        (" 2 ", 2),
        ("\t1\n", 1),
        ("03", 3),
        (0, 0),
        (3, 3),
        ("auto", AUTO),
        (" auto ", AUTO),
    ],
)
def test_targets_that_name_a_slot_or_any(value: Any, expected: int | str) -> None:
    parsed = parse_target(value, NUM_SLOTS, "X-TARGET-GPU")
    assert (parsed, type(parsed)) == (expected, type(expected))


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "4",
        4,
        "-1",
        -1,
        "+1",
        "1.0",
        1.0,
        0.0,
        "1e0",
        "0x1",
        "1_0",
        "1 2",
        "1,2",
        "Auto",
        "AUTO",
        "none",
        "null",
        "cuda:0",
        "٠",  # Arabic-Indic zero
        "１",  # fullwidth one
        "²",
        "১",  # Bengali one
        True,
        False,
        None,
        [],
        [0],
        {},
        {"slot": 0},
        float("nan"),
        float("inf"),
        10**30,
        -(10**30),
        "9" * 5000,
        "1\x00",
        b"1",
    ],
    ids=lambda value: repr(value)[:20],
)
def test_everything_else_is_refused_and_never_clamped(value: Any) -> None:
    with pytest.raises(BadRequest) as refusal:
        parse_target(value, NUM_SLOTS, "X-TARGET-GPU")
    error = refusal.value
    assert error.type == "invalid_target_gpu"
    assert "X-TARGET-GPU" in error.message
    assert "from 0 to 3" in error.details
    assert AUTO in error.details
    assert len(error.message) < 150


def test_with_one_slot_the_refusal_offers_slot_zero() -> None:
    with pytest.raises(BadRequest) as refusal:
        parse_target("1", 1, "extra_data.target_gpu")
    assert "set extra_data.target_gpu to 0, or to auto, or leave it out" in refusal.value.details


@pytest.mark.parametrize(("slot", "covered"), [(None, [0, 1, 2]), (1, [1])])
def test_a_scope_covers_its_slot_or_all(slot: int | None, covered: list[int]) -> None:
    assert [index for index in range(3) if Scope(slot=slot).covers(index)] == covered


def test_scopes_nest_and_end() -> None:
    outer, inner = Scope(slot=0), Scope(slot=1)
    everything = current_scope()
    with scoped(outer):
        with scoped(inner):
            assert current_scope() is inner
        assert current_scope() is outer
    assert current_scope() is everything


def test_a_scope_ends_with_an_error_too() -> None:
    everything = current_scope()
    with pytest.raises(KeyError), scoped(Scope(slot=0)):
        raise KeyError
    assert current_scope() is everything


def test_requests_at_the_same_time_have_scopes_of_their_own() -> None:
    both_entered = asyncio.Event()

    async def request(slot: int, entered: list[int]) -> int | None:
        with scoped(Scope(slot=slot)):
            entered.append(slot)
            if len(entered) == 2:
                both_entered.set()
            await both_entered.wait()
            return current_scope().slot

    async def both() -> list[int | None]:
        entered: list[int] = []
        return await asyncio.gather(request(0, entered), request(1, entered))

    assert asyncio.run(asyncio.wait_for(both(), 60)) == [0, 1]


def test_a_request_learns_where_its_job_was_placed() -> None:
    with scoped(Scope()) as _:
        note_placed(2)
        assert current_scope().placed == 2


def test_outside_requests_a_placement_leaves_no_trace() -> None:
    note_placed(2)
    assert current_scope().placed is None
    assert scope.Scope().placed is None
