"""Jobs without a sign of life."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.errors import JobStalled, StalledAndWaitsAgain
from comfy_parallel.slots import stalls
from comfy_parallel.slots.slot import Run, Slot, entered, set_slots
from comfy_parallel.slots.stalls import Stalls

AFTER_S = 30.0


@pytest.fixture
def slot() -> Iterator[Slot]:
    made = Slot(0, "cpu")
    set_slots((made,))
    made.run = Run("job", started_at=100.0, alive_at=100.0)
    yield made
    set_slots(())


def run_of(slot: Slot) -> Run:
    assert slot.run is not None
    return slot.run


@pytest.mark.parametrize(
    ("policy", "error"), [("report", None), ("fail", JobStalled), ("requeue", StalledAndWaitsAgain)]
)
def test_a_silent_job_is_told_once_and_treated_as_wanted(
    slot: Slot, policy: str, error: type[BaseException] | None, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Stalls(AFTER_S, policy)
    watch.look(129.0)
    assert caplog.text == ""
    watch.look(130.0)
    assert "job job is stalled: no sign of life for 30 s" in caplog.text
    assert (run_of(slot).interrupted, run_of(slot).stalls) == (error is not None, 1)
    with entered(slot):
        if error is None:
            stalls.raise_if_stalled()
        else:
            with pytest.raises(error, match="COMFY_PARALLEL_STALL_S"):
                stalls.raise_if_stalled()
            stalls.raise_if_stalled()  # once
    caplog.clear()
    for later in (159.0, 161.0, 200.0, 300.0):
        watch.look(later)
    assert len(caplog.records) == (0 if policy == "report" else 1)


def test_a_sign_of_life_is_enough(slot: Slot, caplog: pytest.LogCaptureFixture) -> None:
    watch = Stalls(AFTER_S, "fail")
    for now in range(110, 400, 20):
        run_of(slot).alive_at = float(now)
        watch.look(now + 5.0)
    assert caplog.text == ""


def test_a_process_is_ended(slot: Slot) -> None:
    told: list[str] = []

    class Process:
        def kill(self, reason: str) -> None:
            told.append(reason)

    process: Any = Process()
    slot.process = process
    Stalls(AFTER_S, "fail").look(500.0)
    assert told == ["job job gave no sign of life for 30 s (COMFY_PARALLEL_STALL_S)"]
    assert not run_of(slot).interrupted


def test_it_looks_until_it_is_ended(slot: Slot, caplog: pytest.LogCaptureFixture) -> None:
    run_of(slot).alive_at = 0.0
    with caplog.at_level(logging.ERROR):
        end = Stalls(0.04, "report").start()
        for _ in range(3000):
            if run_of(slot).stalls:
                break
            time.sleep(0.02)
        end()
    assert run_of(slot).stalls
