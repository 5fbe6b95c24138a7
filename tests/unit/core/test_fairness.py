"""Fair shares of the queue."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_parallel.core.fairness import FairShare


class Queue:
    """Jobs that are served one at a time, in the order of their places."""

    def __init__(self) -> None:
        self.share, self.waiting, self.number = FairShare(), list[Any](), 0

    def put(self, party: str, count: int = 1) -> None:
        for _ in range(count):
            place = self.share.place(party, self.number, is_idle=not self.waiting)
            heapq.heappush(self.waiting, (place, self.number, party))
            self.number += 1

    def serve(self, count: int = 1, seconds: dict[str, float] | None = None) -> str:
        served = ""
        for _ in range(count):
            place, _number, party = heapq.heappop(self.waiting)
            self.share.started(place)
            self.share.ended(party, (seconds or {}).get(party, 1.0))
            served += party
        return served


def test_one_party_is_served_in_order() -> None:
    queue = Queue()
    queue.put("a", 5)
    assert [item[1] for item in sorted(queue.waiting)] == [0, 1, 2, 3, 4]


def test_who_sends_one_job_does_not_wait_for_a_hundred_of_another() -> None:
    queue = Queue()
    queue.put("a", 100)
    queue.serve(10)
    queue.put("b")
    assert "b" in queue.serve(2)


def test_parties_take_turns() -> None:
    queue = Queue()
    queue.put("a", 6)
    queue.put("b", 6)
    queue.put("c", 6)
    assert Counter(queue.serve(9)) == {"a": 3, "b": 3, "c": 3}


def test_who_was_away_has_saved_nothing_up() -> None:
    queue = Queue()
    queue.put("a", 50)
    queue.serve(40)
    queue.put("b", 20)
    assert Counter(queue.serve(10)) == {"a": 5, "b": 5}


def test_long_jobs_get_fewer_turns() -> None:
    queue = Queue()
    seconds = {"a": 4.0, "b": 1.0}
    queue.put("a", 4)
    queue.put("b", 4)
    queue.serve(8, seconds)  # Now it is known how long they run.
    queue.put("a", 40)
    queue.put("b", 40)
    turns = Counter(queue.serve(40, seconds))
    assert turns["a"] * 4 == pytest.approx(turns["b"], rel=0.3)


def test_places_are_on_the_scale_of_the_hosts_numbers() -> None:
    share = FairShare()
    assert share.place("a", 70, is_idle=True) == 70
    assert share.place("b", 71, is_idle=False) == 70
    assert share.place("b", 72, is_idle=True) == 72


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(0, 60))
def test_nothing_is_lost_and_each_partys_jobs_stay_in_order(parties: list[str], served_first: int) -> None:
    queue = Queue()
    for party in parties[: len(parties) // 2]:
        queue.put(party)
    first = min(served_first, len(queue.waiting))
    order = [heapq.nsmallest(first, queue.waiting)]
    queue.serve(first)
    for party in parties[len(parties) // 2 :]:
        queue.put(party)
    order.append(sorted(queue.waiting))
    for party in "abc":
        numbers = [number for part in order for _place, number, one in part if one == party]
        assert numbers == sorted(numbers)
    assert sum(map(len, order)) == len(parties)
