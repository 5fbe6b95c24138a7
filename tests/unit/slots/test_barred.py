"""Jobs that some slots cannot run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.core.scope import Scope, scoped
from comfy_parallel.errors import CannotRunThere
from comfy_parallel.http import jobs, status
from comfy_parallel.slots import items
from tests.fakes import host_item, take

REASON = "cannot run on remote0: no model x.safetensors"


@pytest.fixture
def lacking() -> Iterator[set[str]]:
    """Slot 1 cannot run the jobs of these ids."""
    ids: set[str] = set()
    items.when_to_bar(lambda item: {1: REASON} if item[1] in ids else {})
    yield ids
    items.when_to_bar(None)


def test_a_job_goes_only_where_it_can_run(front: Any, lacking: set[str]) -> None:
    lacking.add("a")
    take_of(front, 0, "first")
    front.put(host_item("a"))
    front.put(host_item("b"))
    assert take(front.slot_queues[1]) == "b"
    assert [item[1] for item in front.snapshot().unassigned] == ["a"]


def test_one_that_is_bound_there_is_refused(front: Any, lacking: set[str]) -> None:
    lacking.add("a")
    with scoped(Scope(target=1)), pytest.raises(CannotRunThere) as refused:
        front.put(host_item("a"))
    assert (refused.value.status, refused.value.message) == (400, REASON)
    assert front.get_tasks_remaining() == 0


def test_it_is_judged_again_when_that_has_changed(front: Any, lacking: set[str]) -> None:
    lacking.add("a")
    take_of(front, 0, "first")
    front.put(host_item("a"))
    told = [one["cannot_run"] for one in queues(front)]
    assert told == [{}, {"a": REASON}]
    lacking.clear()
    assert queues(front)[1]["cannot_run"] == {"a": REASON}  # Nobody has said that it has changed.
    items.judge_again()
    assert queues(front)[1]["cannot_run"] == {}
    with front.mutex:
        front.not_empty.notify()
    assert take(front.slot_queues[1]) == "a"


def test_a_job_that_is_moved_there_says_so_and_waits(front: Any, lacking: set[str]) -> None:
    lacking.add("a")
    take_of(front, 0, "first")
    front.put(host_item("a"))
    assert jobs._changed(front, "a", {"slot": 1}) == {
        "prompt_id": "a",
        "gpu_id": 1,
        "priority": 0,
        "cannot_run": REASON,
    }
    assert [item[1] for item in front.snapshot().pending[1]] == ["a"]


def queues(front: Any) -> Any:
    import json

    return json.loads(status.queue_all_json(front, lambda slot: []))["queues"]


def take_of(front: Any, slot: int, prompt_id: str) -> None:
    front.slot_queues[slot].put(host_item(prompt_id))
    assert take(front.slot_queues[slot]) == prompt_id
