"""With COMFY_PARALLEL_WORKERS=auto jobs go to the kind of slot that suits them, and others learn from how they ran."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.core.shares import Share
from comfy_parallel.fleet import choosing
from comfy_parallel.fleet.choosing import Choosing
from comfy_parallel.slots.items import QueueItem, when_to_run_alone
from tests.fakes import make_slots

SAFE, UNSAFE = {"1": {"class_type": "Safe"}}, {"1": {"class_type": "Unsafe"}}


def is_unsafe(workflow: Any) -> bool:
    return bool(workflow == UNSAFE)


def item(workflow: Any, target: int | None = None) -> QueueItem:
    queued = QueueItem((0, "id", workflow, {}, []))
    queued.target = target
    return queued


@pytest.fixture
def mixed() -> Any:
    """A slot in a thread, and one in a process."""
    made = make_slots("cpu", "cpu")
    made[1].process = SimpleNamespace(report={}, kind="process")  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("workflow", "target", "expected"),
    [
        (SAFE, None, ("thread", False)),
        (UNSAFE, None, ("process", True)),
        (UNSAFE, 1, ("process", True)),
        (UNSAFE, 0, (None, False)),  # Who names a slot in a thread gets it, and the job runs alone there.
    ],
)
def test_each_job_has_its_kind(mixed: Any, workflow: Any, target: int | None, expected: Any) -> None:
    queued = item(workflow, target)
    Choosing(is_unsafe).choose(queued)
    assert (queued.kind, queued.is_bound_to_kind) == expected


def test_a_share_has_none(mixed: Any) -> None:
    queued = item(UNSAFE)
    queued.share = Share("parent", 1, 2)
    Choosing(is_unsafe).choose(queued)
    assert (queued.kind, queued.is_bound_to_kind) == (None, False)


def test_what_is_bound_to_processes_does_not_run_alone(mixed: Any) -> None:
    when_to_run_alone(is_unsafe)
    try:
        queued, named = item(UNSAFE), item(UNSAFE, 0)
        Choosing(is_unsafe).choose(queued)
        Choosing(is_unsafe).choose(named)
        assert (queued.is_alone, named.is_alone) == (False, True)
        queued.must_run_alone()
        assert (queued.is_alone, queued.is_bound_to_kind) == (True, False)
    finally:
        when_to_run_alone(None)


def test_it_learns_from_the_steps_of_each_job(mixed: Any) -> None:
    told = {"on": True, "eager": {"reason": 100}, "replays": 100}
    choices = Choosing(is_unsafe, lambda slot: told)
    mixed[0].stats.latest = SimpleNamespace(ran_s=1.0)
    choices.job_ended(mixed[0], item(UNSAFE))
    told = {"on": True, "eager": {"reason": 100, "another": 30}, "replays": 101}
    choices.job_ended(mixed[0], item(SAFE))
    queued = item(SAFE)
    choices.choose(queued)
    assert (queued.kind, queued.is_bound_to_kind) == ("process", False)
    assert choices.json == {"to_processes": {"unsafe": 0, "eager": 1}, "to_threads": 0, "eager_workflows": 1}


def test_where_nothing_is_recorded_at_all_steps_say_nothing(mixed: Any) -> None:
    choices = Choosing(is_unsafe, lambda slot: {"on": False, "eager": {"reason": 30}, "replays": 0})
    mixed[0].stats.latest = SimpleNamespace(ran_s=1.0)
    choices.job_ended(mixed[0], item(SAFE))
    assert choices.json["eager_workflows"] == 0


def test_one_kind_only_is_nothing_to_choose_between(caplog: pytest.LogCaptureFixture) -> None:
    make_slots("cpu", "cpu")
    front = SimpleNamespace(_dispatcher=SimpleNamespace(kinds=None), slot_queues=[])
    choosing.begin(front, is_unsafe)
    assert front._dispatcher.kinds is None
    assert "cuda:0,cuda:0=process" in caplog.text
