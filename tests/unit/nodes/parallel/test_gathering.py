"""The job waits only for what a slot computes now, and computes the rest itself."""

from __future__ import annotations

import threading

import pytest

from comfy_parallel.errors import ShareLost
from comfy_parallel.nodes.parallel.gathering import Gathering, Wait


def offered(participants: int) -> Gathering:
    """With all its shares out."""
    gathering = Gathering(participants)
    while gathering.offer_next(participants) is not None:
        pass
    return gathering


def others(failed_on: frozenset[int]) -> bool:
    """A third slot could take a share."""
    return True


def test_what_nobody_has_begun_the_job_computes_last_first() -> None:
    gathering = offered(4)
    assert gathering.begin(1)
    assert gathering.next_to_compute("c", 4) == 3
    assert not gathering.begin(3)
    gathering.give("c", 3, "ours")
    assert gathering.next_to_compute("c", 4) == 2


def test_what_was_not_offered_yet_the_job_computes_first() -> None:
    gathering = Gathering(5)
    assert [gathering.offer_next(2), gathering.offer_next(2), gathering.offer_next(2)] == [1, 2, None]
    assert gathering.next_to_compute("c", 5) == 3
    assert gathering.begin(1)
    gathering.end(1)
    assert gathering.offer_next(2) == 4


def test_values_come_in_the_order_of_the_participants() -> None:
    gathering = Gathering(3)
    for participant in (2, 0, 1):
        gathering.give("c", participant, f"of {participant}")
    gathering.give("c", 1, "late")
    assert gathering.next_to_compute("c", 3) is None
    assert gathering.given("c", 3) == ["of 0", "of 1", "of 2"]


def test_the_job_waits_for_a_share_that_runs() -> None:
    gathering = offered(2)
    assert gathering.begin(1)
    assert gathering.next_to_compute("c", 2) is Wait.WAIT
    threading.Timer(0.05, gathering.give, ("c", 1, "there")).start()
    gathering.wait(60)
    assert gathering.next_to_compute("c", 2) is None


@pytest.mark.parametrize("how", ["ended", "lost"])
def test_a_share_that_a_slot_failed_at_is_the_jobs(how: str) -> None:
    gathering = offered(2)
    assert gathering.begin(1, lambda: how == "lost")
    if how == "ended":
        gathering.end(1)
    assert gathering.next_to_compute("c", 2) == 1
    with pytest.raises(ShareLost, match="participant 1 gave nothing to node c"):
        gathering.next_to_compute("c", 2)


def test_a_share_that_one_slot_failed_at_is_left_to_another_before_it_is_the_jobs() -> None:
    gathering = offered(2)
    assert gathering.begin(1)
    assert gathering.fail(1, 3, others) == {3}
    assert gathering.next_to_compute("c", 2, others) is Wait.WAIT
    assert gathering.begin(1)
    assert gathering.fail(1, 2, others) == frozenset()
    gathering.end(1)
    assert gathering.next_to_compute("c", 2, others) == 1


def test_nobody_waits_for_another_slot_that_will_not_come() -> None:
    gathering = offered(2)
    assert gathering.begin(1)
    assert gathering.fail(1, 3, others) == {3}
    assert gathering.next_to_compute("c", 2, lambda failed_on: False) == 1
    assert not gathering.begin(1)


def test_nothing_begins_for_a_job_that_has_ended() -> None:
    gathering = offered(2)
    gathering.close()
    assert not gathering.begin(1)
    assert Gathering(1).offer_next(9) is None


def test_who_has_nothing_to_do_adds_nothing() -> None:
    gathering = Gathering(3)
    for participant, values in enumerate(("of 0", "of 1", None)):
        gathering.give("c", participant, values)
    assert gathering.next_to_compute("c", 3) is None
    assert gathering.given("c", 3) == ["of 0", "of 1", None]
