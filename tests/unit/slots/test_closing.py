"""Pausing, draining and resuming slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from comfy_parallel.core.scope import Scope, scoped
from comfy_parallel.core.states import SlotEvent, SlotState
from comfy_parallel.errors import Draining
from comfy_parallel.slots import items
from tests.fakes import host_item, in_thread, make_front, run_all, run_next, succeeded, take

S, E = SlotState, SlotEvent
WAIT_S = 60.0


@pytest.fixture
def front() -> Any:
    """Two slots, whose workers have asked for jobs and have gone away again."""
    made = make_front("cpu", "cpu")
    for queue in made.slot_queues:
        assert take(queue) is None
    return made


@pytest.fixture
def run_alone() -> Any:
    """Jobs whose id begins with `alone` run alone."""
    items.when_to_run_alone(lambda prompt: any(node["inputs"]["text"].startswith("alone") for node in prompt.values()))
    yield
    items.when_to_run_alone(None)


def states(front: Any) -> list[SlotState]:
    return [queue.slot.state for queue in front.slot_queues]


def waiting(front: Any) -> list[str]:
    seen = front.snapshot()
    return [item[1] for items in (*seen.pending, seen.unassigned) for item in items]


def end(queue: Any) -> None:
    """End what the slot runs."""
    queue.task_done(next(iter(queue.currently_running)), {"outputs": {}}, status=succeeded())


def asking(front: Any, index: int) -> Any:
    """The slot's worker, waiting on a thread of its own; its next job and that one's number."""
    queue = front.slot_queues[index]
    future = in_thread(queue.get, WAIT_S)
    with front.mutex:
        while queue.slot.state is not S.IDLE:
            front.slot_queues[index].not_empty.wait(0.01)
    return future


def submit(front: Any, prompt_id: str, target: Any = None) -> None:
    """As a client's request does."""
    with scoped(Scope(target=target)):
        front.put(host_item(prompt_id))


def test_a_paused_slot_takes_nothing_and_the_other_takes_all_that_is_bound_to_none(front: Any) -> None:
    front.closing.pause([0])
    front.put(host_item("a"))
    front.slot_queues[0].put(host_item("bound"))
    assert run_all(front.slot_queues[0]) == []
    assert run_all(front.slot_queues[1]) == ["a"]
    assert waiting(front) == ["bound"]
    front.closing.resume([0])
    assert run_all(front.slot_queues[0]) == ["bound"]


def test_a_running_job_ends_and_no_other_follows(front: Any) -> None:
    queue = front.slot_queues[0]
    queue.put(host_item("a"))
    queue.put(host_item("b"))
    assert take(queue) == "a"
    front.closing.pause([0])
    assert queue.slot.state.shown == "draining"
    front.closing.pause([0])
    assert queue.slot.state is S.DRAINING
    end(queue)
    assert queue.slot.state.shown == "paused"
    assert take(queue) is None
    assert list(front.get_history()) == ["a"]
    front.closing.resume([0])
    assert run_all(queue) == ["b"]


def test_a_slot_that_is_resumed_while_it_drains_goes_on(front: Any) -> None:
    queue = front.slot_queues[0]
    for name in "ab":
        queue.put(host_item(name))
    take(queue)
    front.closing.pause([0])
    front.closing.resume([0])
    assert queue.slot.state is S.RUNNING
    end(queue)
    assert run_all(queue) == ["b"]


def test_resuming_wakes_a_worker_that_waits(front: Any) -> None:
    worker = asking(front, 0)
    front.closing.pause([0, 1])
    front.put(host_item("a"))
    assert waiting(front) == ["a"]
    assert not worker.done()
    front.closing.resume([0])
    assert worker.result(WAIT_S)[0][1] == "a"
    assert states(front) == [S.RUNNING, S.PAUSED]


def test_a_job_that_was_laid_out_for_a_slot_goes_to_another(front: Any) -> None:
    first, second = asking(front, 0), asking(front, 1)
    with front.mutex:  # so that no worker takes it before the slot is paused
        front.put(host_item("a"))
        assert states(front) == [S.OFFERED, S.IDLE]
        front.closing.pause([0])
        assert states(front) == [S.PAUSED, S.OFFERED]
    assert second.result(WAIT_S)[0][1] == "a"
    assert waiting(front) == []
    assert not first.done()
    front.closing.resume([0])
    front.slot_queues[0].put(host_item("b"))
    assert first.result(WAIT_S)[0][1] == "b"


def test_a_job_that_was_laid_out_and_is_bound_waits(front: Any) -> None:
    worker = asking(front, 0)
    with front.mutex:
        front.slot_queues[0].put(host_item("a"))
        front.closing.pause([0])
        assert (states(front)[0], waiting(front)) == (S.PAUSED, ["a"])
    front.closing.resume([0])
    assert worker.result(WAIT_S)[0][1] == "a"


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_job_that_a_packs_get_has_taken_out_already_runs_once(front: Any, is_resumed: bool) -> None:
    """It has popped it from the list, and is paused before it has noted it as running."""
    queue = front.slot_queues[0]

    def packs_get(timeout: float | None = None) -> Any:
        del front.get  # The other slot asks as ever.
        item = front.queue.pop(0)
        front.closing.pause([0, 1])
        front.closing.resume([0, 1] if is_resumed else [1])
        assert run_all(front.slot_queues[1]) == []
        return item, 7

    front.put(host_item("a"))
    queue.put(host_item("next"))
    front.get = packs_get
    taken, item_id = queue.get(timeout=0)
    assert (taken[1], queue.slot.state) == ("a", S.RUNNING if is_resumed else S.DRAINING)
    queue.task_done(item_id, {"outputs": {}}, status=succeeded())
    assert queue.slot.state is (S.RETURNING if is_resumed else S.PAUSED)
    assert (waiting(front), list(front.get_history())) == (["next"], ["a"])
    front.closing.resume([0])
    assert run_all(queue) == ["next"]


def test_when_all_are_paused_jobs_wait_and_none_is_lost(front: Any) -> None:
    front.closing.pause([0, 1])
    for name in "abc":
        submit(front, name)
    submit(front, "bound", 1)
    assert [run_all(queue) for queue in front.slot_queues] == [[], []]
    assert sorted(waiting(front)) == ["a", "b", "bound", "c"]
    front.closing.resume([1])
    assert run_all(front.slot_queues[1]) == ["a", "b", "c", "bound"]


def test_a_job_that_runs_alone_waits_for_a_draining_slot_and_then_takes_the_other(front: Any, run_alone: None) -> None:
    first, second = front.slot_queues
    first.put(host_item("a"))
    take(first)
    front.closing.pause([0])
    front.put(host_item("alone"))
    front.put(host_item("b"))
    assert take(second) is None
    end(first)
    assert run_all(second) == ["alone", "b"]


def test_a_job_that_runs_alone_and_is_bound_to_a_paused_slot_holds_nobody_up(front: Any, run_alone: None) -> None:
    front.closing.pause([0])
    front.slot_queues[0].put(host_item("alone"))
    front.put(host_item("b"))
    assert run_all(front.slot_queues[1]) == ["b"]
    front.closing.resume([0])
    assert run_all(front.slot_queues[0]) == ["alone"]


def test_a_slot_that_runs_a_job_alone_can_be_paused(front: Any, run_alone: None) -> None:
    first, second = front.slot_queues
    first.put(host_item("alone"))
    front.put(host_item("b"))
    assert take(first) == "alone"
    front.closing.pause([0])
    assert take(second) is None
    end(first)
    assert run_all(second) == ["b"]


@pytest.mark.parametrize("closing", [E.SUSPEND, E.FAIL])
def test_a_suspended_and_a_failed_slot_are_resumed(front: Any, closing: SlotEvent) -> None:
    queue = front.slot_queues[0]
    queue.slot.change(closing)
    queue.put(host_item("a"))
    assert run_all(queue) == []
    front.closing.resume([0])
    assert run_all(queue) == ["a"]


def test_a_failed_slot_that_is_paused_stays_failed(front: Any) -> None:
    front.slot_queues[0].slot.change(E.FAIL)
    front.closing.pause([0, 1])
    assert states(front) == [S.FAILED, S.PAUSED]


def test_a_slot_that_failed_with_a_job_and_is_resumed_runs_it_on(front: Any) -> None:
    queue = front.slot_queues[0]
    queue.put(host_item("a"))
    take(queue)
    queue.slot.change(E.FAIL)
    front.closing.resume([0])
    assert queue.slot.state is S.RUNNING
    end(queue)
    assert queue.slot.state is S.RETURNING


def test_resuming_what_is_open_changes_nothing(front: Any) -> None:
    take_states = states(front)
    front.closing.resume([0, 1])
    assert states(front) == take_states


def test_a_worker_that_dies_in_a_paused_slot_leaves_it_paused(front: Any) -> None:
    queue = front.slot_queues[0]
    queue.put(host_item("a"))
    take(queue)
    front.closing.pause([0])
    assert queue.fail_running(RuntimeError("died")) == ["a"]
    assert queue.slot.state is S.PAUSED
    queue.put(host_item("b"))
    assert take(queue) is None
    front.closing.resume([0])
    assert run_next(queue) == "b"


def test_a_paused_slot_handles_what_it_is_to_free(front: Any) -> None:
    front.closing.pause([0])
    worker = in_thread(front.slot_queues[0].get, WAIT_S)
    front.set_flag("free_memory", True)
    assert worker.result(WAIT_S) is None
    assert front.slot_queues[0].get_flags() == {"free_memory": True}
    assert states(front)[0] is S.PAUSED


def test_a_slot_that_is_paused_before_its_worker_starts_stays_so() -> None:
    front = make_front("cpu")
    front.closing.pause([0])
    front.put(host_item("a"))
    assert take(front.slot_queues[0]) is None
    front.closing.resume([0])
    assert take(front.slot_queues[0]) == "a"


# Draining.


def test_a_draining_slot_refuses_what_is_bound_to_it_and_nothing_else(front: Any) -> None:
    front.closing.drain([0])
    with pytest.raises(Draining, match="slot 0 is draining"):
        submit(front, "bound", 0)
    submit(front, "other", 1)
    submit(front, "auto")
    assert sorted(run_all(front.slot_queues[1])) == ["auto", "other"]
    assert waiting(front) == []


@pytest.mark.parametrize("close", [lambda c: c.drain([0, 1]), lambda c: (c.drain([1]), c.drain([0, 0]))])
def test_a_server_drains_when_all_its_slots_do(front: Any, close: Callable[[Any], None]) -> None:
    front.put(host_item("before"))
    close(front.closing)
    for target in (None, "auto", 0, 1):
        with pytest.raises(Draining, match="the server is draining"):
            submit(front, "a", target)
    assert waiting(front) == ["before"]
    front.closing.resume([0])
    submit(front, "after")
    assert run_all(front.slot_queues[0]) == ["before", "after"]


def test_the_default_slot_of_jobs_that_name_none_is_meant_as_well(front: Any) -> None:
    front.default_slot = 1
    front.closing.drain([1])
    with pytest.raises(Draining, match="slot 1"):
        submit(front, "a")


def test_a_pause_does_not_refuse(front: Any) -> None:
    front.closing.pause([0, 1])
    submit(front, "a")
    assert waiting(front) == ["a"]


def test_what_a_running_job_queues_is_kept(front: Any) -> None:
    queue = front.slot_queues[0]
    queue.put(host_item("a"))
    take(queue)
    front.closing.drain([0, 1])
    queue.put(host_item("of a"))
    assert waiting(front) == ["of a"]


def test_a_server_that_is_about_to_end_cannot_be_resumed(front: Any) -> None:
    front.closing.drain_for_good()
    with pytest.raises(Draining, match="the server"):
        front.closing.resume([0])
    assert states(front) == [S.PAUSED, S.PAUSED]
