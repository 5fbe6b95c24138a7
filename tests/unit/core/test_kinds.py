"""Jobs go to the kind of slot that suits their nodes, and how their last run went."""

from __future__ import annotations

import pytest

from comfy_parallel.core.kinds import EAGER, UNSAFE, USUAL, Kinds, Steps

SD15, SDXL = frozenset({"KSampler", "FreeU"}), frozenset({"KSampler"})


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (Steps(20, 0, 1.0), EAGER),
        (Steps(20, 0, 3.0), USUAL),  # The GPU takes longer than Python's calls.
        (Steps(1, 19, 0.5), USUAL),  # The first one is eager so that the others are recorded.
        (Steps(10, 10, 0.5), USUAL),
        (Steps(0, 0, 0.5), USUAL),
    ],
)
def test_what_ran_eagerly_and_fast_goes_to_processes(steps: Steps, expected: object) -> None:
    kinds = Kinds()
    kinds.note(SD15, steps)
    assert kinds.choose(SD15, is_unsafe=False) == expected
    assert kinds.choose(SDXL, is_unsafe=False) == USUAL


def test_what_is_unsafe_runs_in_processes_only() -> None:
    kinds = Kinds()
    assert kinds.choose(SD15, is_unsafe=True) == UNSAFE
    assert (UNSAFE.is_bound, EAGER.is_bound) == (True, False)


def test_the_last_run_counts_and_one_without_steps_says_nothing() -> None:
    kinds = Kinds()
    kinds.note(SD15, Steps(20, 0, 1.0))
    kinds.note(SD15, Steps(0, 0, 1.0))
    assert kinds.choose(SD15, is_unsafe=False) == EAGER
    kinds.note(SD15, Steps(1, 19, 1.0))
    assert kinds.choose(SD15, is_unsafe=False) == USUAL


def test_it_counts_what_it_chose() -> None:
    kinds = Kinds()
    kinds.note(SD15, Steps(20, 0, 1.0))
    for workflow, is_unsafe in ((SD15, False), (SD15, True), (SDXL, False), (SDXL, False)):
        kinds.choose(workflow, is_unsafe=is_unsafe)
    assert kinds.chosen == {"unsafe": 1, "eager": 1, "usual": 2}
    assert kinds.eager_workflows == 1


def test_it_does_not_remember_without_end() -> None:
    kinds = Kinds()
    for number in range(3000):
        kinds.note(number, Steps(20, 0, 1.0))
    assert kinds.eager_workflows == 1000
    assert kinds.choose(2999, is_unsafe=False) == EAGER
    assert kinds.choose(0, is_unsafe=False) == USUAL
