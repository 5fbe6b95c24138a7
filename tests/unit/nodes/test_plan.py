"""Plans give every weight one home, within the quotas of the devices."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes.allocation import make_request, parse_request
from comfy_parallel.nodes.plan import Weight, place

GB = 1 << 30
TOTALS = {"cpu": 64 * GB, "cuda:0": 24 * GB, "cuda:1": 24 * GB}


def even(count: int, size: int) -> list[Weight]:
    return [Weight(f"w{number}", size) for number in range(count)]


def held(text: str, weights: Sequence[Weight], totals: dict[str, int] = TOTALS) -> dict[str, int]:
    return {device: size for device, size in place(parse_request(text), weights, totals).held.items() if size}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#cuda:0", {"cuda:0": 1000}),
        ("#cuda:0;0;cpu", {"cuda:0": 1000}),
        ("cuda:0,300b;cpu,*#cuda:0", {"cuda:0": 300, "cpu": 700}),
        ("cuda:0,300b#cuda:0", {"cuda:0": 300, "cpu": 700}),
        ("cpu,300b;cuda:1,200b;cuda:0,*#cuda:0", {"cuda:0": 500, "cpu": 300, "cuda:1": 200}),
        ("cuda:0,25%;cpu,75%#cuda:0", {"cuda:0": 250, "cpu": 750}),
        ("cuda:0,1%;cpu,3%#cuda:0", {"cuda:0": 250, "cpu": 750}),
        ("cuda:0,10%;cpu,*#cuda:0", {"cuda:0": 100, "cpu": 900}),
        ("cpu,*#cuda:0", {"cpu": 1000}),
    ],
)
def test_each_grammar_to_the_byte(text: str, expected: dict[str, int]) -> None:
    assert held(text, even(1000, 1)) == expected


def test_fractions_are_of_the_device() -> None:
    totals = {"cpu": 800, "cuda:0": 400}
    assert held("cuda:0,0.5;cpu,0.25#cuda:0", even(1000, 1), totals) == {"cuda:0": 800, "cpu": 200}


def test_donors_are_filled_in_order() -> None:
    totals = {"cuda:1": GB, "cpu": 64 * GB}
    weights = even(40, GB // 10)
    plan = place(make_request(compute="cuda:0", virtual_gb=3, donors="cuda:1,cpu"), weights, totals)
    assert plan.quotas == {"cuda:1": GB, "cpu": 2 * GB, "cuda:0": sum(w.size for w in weights) - 3 * GB}


def test_what_the_model_has_not_cannot_leave() -> None:
    assert held("#cuda:0;100;cpu", even(10, 100)) == {"cpu": 1000}


def test_what_cannot_move_stays_and_counts() -> None:
    weights = [Weight("fixed", 100, movable=False), *even(10, 100)]
    assert held("cuda:0,300b;cpu,*#cuda:0", weights) == {"cuda:0": 300, "cpu": 800}


def test_each_stretch_of_the_model_has_its_share() -> None:
    """What is fetched for the next layers comes while these compute."""
    for percent in (10, 25, 50, 90):
        plan = place(parse_request(f"cpu,{percent}%;cuda:0,*#cuda:0"), even(200, 100), TOTALS)
        away = [home == "cpu" for home in plan.homes.values()]
        assert sum(away) == 2 * percent
        for start in range(0, 200, 20):
            assert abs(sum(away[start : start + 20]) - percent / 5) <= 1, (percent, start)


def test_small_weights_stay_while_large_ones_can_go() -> None:
    norms = [Weight(f"n{number}", 1000) for number in range(50)]
    weights = [weight for pair in zip(even(50, GB), norms, strict=True) for weight in pair]
    half = place(parse_request("cpu,50%;cuda:0,*#cuda:0"), weights, TOTALS)
    assert [name for name, home in half.homes.items() if home == "cpu" and name.startswith("n")] == []
    whole = place(parse_request("cpu,*#cuda:0"), weights, TOTALS)
    assert whole.away == sum(weight.size for weight in weights)


def test_memory_that_is_not_known_is_told() -> None:
    with pytest.raises(AllocationError, match="memory of mps is not known"):
        place(make_request(compute="cuda:0", virtual_gb=1, donors="mps"), even(1, GB), TOTALS)


sizes = st.lists(st.integers(0, 10_000), min_size=1, max_size=60)


@given(sizes, st.integers(0, 60_000), st.integers(0, 60_000))
def test_quotas_are_kept_and_nothing_is_lost(sizes: list[int], first: int, second: int) -> None:
    weights = [Weight(f"w{number}", size) for number, size in enumerate(sizes)]
    plan = place(parse_request(f"cpu,{first}b;cuda:1,{second}b;cuda:0,*#cuda:0"), weights, TOTALS)
    assert sum(plan.held.values()) == sum(sizes) == sum(plan.quotas.values())
    assert set(plan.homes) == {weight.name for weight in weights}
    assert plan.held.get("cpu", 0) <= first
    assert plan.held.get("cuda:1", 0) <= second


@given(sizes, st.integers(1, 99))
def test_what_leaves_misses_what_was_asked_by_less_than_a_weight(sizes: list[int], percent: int) -> None:
    weights = [Weight(f"w{number}", size) for number, size in enumerate(sizes)]
    plan = place(parse_request(f"cpu,{percent}%;cuda:0,{100 - percent}%#cuda:0"), weights, TOTALS)
    assert 0 <= plan.quotas["cpu"] - plan.away <= max(sizes)


def test_a_plan_tells_itself() -> None:
    lines = place(parse_request("cuda:0,25%;cpu,75%#cuda:0"), even(4, 100), TOTALS).lines()
    assert lines[0].split() == ["cuda:0", "100", "bytes", "25.00%", "1", "weights"]
    assert lines[-1] == "300 of 400 bytes leave cuda:0"
