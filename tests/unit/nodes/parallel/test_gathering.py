"""The job waits only for what a slot computes now, and computes the rest itself."""

from __future__ import annotations

import threading

import pytest

from comfy_parallel.errors import ShareLost
from comfy_parallel.nodes.parallel.gathering import Gathering


class Stop(Exception):
    """As the host's interrupt."""


def test_what_nobody_has_begun_the_job_computes_last_first() -> None:
    gathering = Gathering(4)
    for participant in (1, 2, 3):
        gathering.offer(participant)
    assert gathering.begin(1)
    assert gathering.next_to_compute("c", 4) == 3
    assert not gathering.begin(3)
    gathering.give("c", 3, "ours")
    assert gathering.next_to_compute("c", 4) == 2


def test_values_come_in_the_order_of_the_participants() -> None:
    gathering = Gathering(3)
    for participant in (2, 0, 1):
        gathering.give("c", participant, f"of {participant}")
    gathering.give("c", 1, "late")
    assert gathering.next_to_compute("c", 3) is None
    assert gathering.collected("c", 3) == ["of 0", "of 1", "of 2"]


def test_the_job_waits_for_a_share_that_runs() -> None:
    gathering = Gathering(2)
    gathering.offer(1)
    assert gathering.begin(1)
    threading.Timer(0.05, gathering.give, ("c", 1, "there")).start()
    assert gathering.next_to_compute("c", 2) is None


@pytest.mark.parametrize("how", ["ended", "lost"])
def test_a_share_that_a_slot_failed_at_is_the_jobs(how: str) -> None:
    gathering = Gathering(2)
    gathering.offer(1)
    assert gathering.begin(1, lambda: how == "lost")
    if how == "ended":
        threading.Timer(0.05, gathering.end, (1,)).start()
    assert gathering.next_to_compute("c", 2) == 1
    with pytest.raises(ShareLost, match="participant 1 gave nothing to node c"):
        gathering.next_to_compute("c", 2)


def test_waiting_ends_by_an_interrupt() -> None:
    gathering = Gathering(2)
    gathering.offer(1)
    assert gathering.begin(1)
    is_stopped = threading.Event()

    def check() -> None:
        if is_stopped.is_set():
            raise Stop

    threading.Timer(0.05, is_stopped.set).start()
    with pytest.raises(Stop):
        gathering.next_to_compute("c", 2, check)


def test_nothing_begins_for_a_job_that_has_ended() -> None:
    gathering = Gathering(2)
    gathering.offer(1)
    gathering.close()
    assert not gathering.begin(1)


def test_who_has_nothing_to_do_adds_nothing() -> None:
    gathering = Gathering(3)
    for participant, values in enumerate(("of 0", "of 1", None)):
        gathering.give("c", participant, values)
    assert gathering.next_to_compute("c", 3) is None
    assert gathering.collected("c", 3) == ["of 0", "of 1"]
