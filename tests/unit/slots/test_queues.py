"""The front queue and the slots' queues: order, places, scopes, history, and no deadlock."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.core.scope import AUTO, Scope, scoped
from comfy_parallel.core.states import SlotState
from comfy_parallel.errors import BadRequest, JobLost
from comfy_parallel.slots.items import QueueItem, when_to_run_alone, who_takes_turns
from comfy_parallel.slots.slot import Run, entered, interrupt_job
from tests.fakes import (
    OlderPromptQueue,
    PromptQueue,
    failed,
    host_item,
    in_thread,
    make_front,
    run_all,
    run_next,
    succeeded,
    take,
)

pytestmark = pytest.mark.timeout(120)

SOON_S = 60.0
TURN = {"1": {"class_type": "Chooser"}}


def put(front: Any, *prompt_ids: str, target: int | str | None = AUTO, number: float = 0, **extra: Any) -> None:
    """Submit jobs as requests do."""
    for prompt_id in prompt_ids:
        with scoped(Scope(target=target)):
            front.put(host_item(prompt_id, number, **extra))


def waiting_ids(front: Any) -> list[str]:
    return [item[1] for item in front.get_current_queue()[1]]


def wait_until_waiting(*queues: Any) -> None:
    """Return when a thread is waiting in `get` of each of these queues."""
    reached = threading.Event()
    while not all(queue.slot.state is SlotState.IDLE and queue.is_asked for queue in queues):
        assert not reached.wait(0.001)


# Order.


def test_jobs_run_in_the_order_in_which_they_came(front: Any) -> None:
    put(front, "a", "b", "c")
    assert run_all(front.slot_queues[0]) == ["a", "b", "c"]


def test_the_hosts_number_goes_before_arrival(front: Any) -> None:
    put(front, "second", number=1)
    put(front, "third", number=1)
    put(front, "first", number=-1)
    assert run_all(front.slot_queues[0]) == ["first", "second", "third"]


def test_pinned_and_unassigned_jobs_have_one_order(front: Any) -> None:
    put(front, "a")
    put(front, "b", target=0)
    put(front, "c")
    put(front, "d", target=0, number=-1)
    assert run_all(front.slot_queues[0]) == ["d", "a", "b", "c"]


def test_jobs_that_compare_by_nothing_but_arrival_never_compare_their_prompts(front: Any) -> None:
    put(front, *(["same"] * 20))
    assert run_all(front.slot_queues[0]) == ["same"] * 20


# Places.


def test_a_pinned_job_runs_on_its_slot_only(front: Any) -> None:
    put(front, "a", target=1)
    assert take(front.slot_queues[0]) is None
    assert take(front.slot_queues[1]) == "a"


def test_a_job_pinned_to_a_busy_slot_does_not_hold_up_an_idle_one(front: Any) -> None:
    first, second = front.slot_queues
    put(front, "running", target=0)
    assert take(first) == "running"
    put(front, "pinned", target=0)
    put(front, "free")
    assert take(second) == "free"
    assert take(second) is None


def test_unassigned_jobs_are_bound_when_a_slot_takes_them(front: Any) -> None:
    put(front, "a", "b")
    assert [front.gpu_id_of("a"), front.gpu_id_of("b")] == [None, None]
    assert take(front.slot_queues[1]) == "a"
    assert take(front.slot_queues[0]) == "b"
    assert [front.gpu_id_of("a"), front.gpu_id_of("b")] == [1, 0]


def test_where_a_job_is_or_was(front: Any) -> None:
    put(front, "done", target=1)
    run_next(front.slot_queues[1])
    put(front, "running", target=0)
    take(front.slot_queues[0])
    put(front, "pinned", target=1)
    put(front, "open")
    ids = ("done", "running", "pinned", "open", "unknown")
    assert [front.gpu_id_of(prompt_id) for prompt_id in ids] == [1, 0, 1, None, None]


def test_where_thousands_of_jobs_are_takes_one_look(front: Any) -> None:
    names = [str(number) for number in range(5_000)]
    for number, name in enumerate(names):
        put(front, name, target=number % 2)
    run_next(front.slot_queues[1])
    began = time.thread_time()  # Others may keep the processor.
    found = front.gpu_ids([*names, "unknown"])
    assert time.thread_time() - began < 0.5
    assert list(found.values()) == [*(number % 2 for number in range(5_000)), None]


def test_jobs_of_one_id_run_in_turn_and_others_do_not_wait(front: Any) -> None:
    first, second = front.slot_queues
    put(front, "same", "same", "other")
    assert take(first) == "same"
    assert take(second) == "other"
    front.task_done(0, {}, status=succeeded())
    assert take(first) == "same"


def test_a_job_that_waits_for_its_namesake_starts_when_that_ends(front: Any) -> None:
    first, second = front.slot_queues
    put(front, "same", client_id="a")
    put(front, "same", client_id="b")
    assert take(first) == "same"
    taken = in_thread(second.get, 60)
    wait_until_waiting(second)
    front.task_done(0, {}, status=succeeded())
    assert taken.result(SOON_S)[0][1] == "same"


def test_a_request_learns_where_its_job_went(front: Any) -> None:
    for target, placed in ((1, 1), (AUTO, None)):
        with scoped(Scope(target=target)) as _, scoped(scope := Scope(target=target)):
            front.put(host_item("a"))
        assert scope.placed == placed


def test_the_body_may_name_the_slot(front: Any) -> None:
    front.put(host_item("a", target_gpu=1))
    front.put(host_item("b", target_gpu="0"))
    assert (take(front.slot_queues[0]), take(front.slot_queues[1])) == ("b", "a")


def test_the_header_wins_over_the_body(front: Any) -> None:
    put(front, "a", target=0, target_gpu=1)
    assert take(front.slot_queues[1]) is None
    assert take(front.slot_queues[0]) == "a"


def test_a_body_that_names_no_slot_queues_nothing(front: Any) -> None:
    with pytest.raises(BadRequest, match="extra_data.target_gpu"):
        front.put(host_item("a", target_gpu=2))
    assert front.get_tasks_remaining() == 0


def test_the_default_slot_is_for_jobs_that_name_none(front: Any) -> None:
    front.default_slot = 1
    put(front, "default", target=None)
    put(front, "auto", target=AUTO)
    put(front, "named", target=0)
    assert run_all(front.slot_queues[0]) == ["auto", "named"]
    assert run_all(front.slot_queues[1]) == ["default"]


def test_a_job_queued_by_a_running_job_stays_on_its_slot(front: Any) -> None:
    front.default_slot = 0
    with entered(front.slot_queues[1].slot):
        front.put(host_item("follow-up"))
        front.put(host_item("anywhere", target_gpu="auto"))
    assert take(front.slot_queues[0]) == "anywhere"
    assert take(front.slot_queues[1]) == "follow-up"


def test_a_slots_own_put_binds_to_it(front: Any) -> None:
    front.slot_queues[1].put(host_item("a"))
    assert take(front.slot_queues[0]) is None
    assert take(front.slot_queues[1]) == "a"


def test_idle_slots_leave_a_job_to_the_one_that_ran_its_clients_last(front: Any) -> None:
    first, second = front.slot_queues
    put(front, "a", target=1, client_id="c")
    run_next(second)
    takers = {queue: in_thread(queue.get, SOON_S) for queue in (first, second)}
    wait_until_waiting(first, second)
    put(front, "b", client_id="c")
    item, _ = takers[second].result(SOON_S)
    assert item[1] == "b"
    put(front, "end", target=0)
    assert takers[first].result(SOON_S)[0][1] == "end"


def test_a_job_does_not_wait_for_the_busy_slot_that_ran_its_clients_last(front: Any) -> None:
    put(front, "a", target=1, client_id="c")
    assert take(front.slot_queues[1]) == "a"
    put(front, "b", client_id="c")
    assert take(front.slot_queues[0]) == "b"


# Waiting.


def test_get_gives_up_after_its_timeout(front: Any) -> None:
    assert front.slot_queues[0].get(timeout=0) is None
    assert front.slot_queues[0].get(timeout=0.01) is None
    assert front.slot_queues[0].slot.state.shown == "idle"


@pytest.mark.parametrize("target", [0, AUTO])
def test_a_waiting_slot_wakes_for_a_job(front: Any, target: Any) -> None:
    taken = in_thread(front.slot_queues[0].get, SOON_S)
    wait_until_waiting(front.slot_queues[0])
    put(front, "a", target=target)
    assert taken.result(SOON_S)[0][1] == "a"


def test_a_waiting_slot_wakes_for_a_flag_and_returns_no_job(front: Any) -> None:
    taken = in_thread(front.slot_queues[0].get, 60)
    wait_until_waiting(front.slot_queues[0])
    front.set_flag("free_memory", True)
    assert taken.result(SOON_S) is None


def test_all_waiting_slots_wake_when_several_jobs_come(front: Any) -> None:
    taken = [in_thread(queue.get, 60) for queue in front.slot_queues]
    wait_until_waiting(*front.slot_queues)
    with front.mutex:
        put(front, "a", "b")
    assert {future.result(SOON_S)[0][1] for future in taken} == {"a", "b"}


def test_a_job_given_to_a_slot_that_is_deleted_before_its_worker_wakes_is_not_run(front: Any) -> None:
    first, _ = front.slot_queues
    taken = in_thread(first.get, 60)
    wait_until_waiting(first)
    with front.mutex:
        put(front, "a")
        assert waiting_ids(front) == ["a"]
        assert front.delete_queue_item(lambda item: item[1] == "a")
    put(front, "b")
    assert taken.result(SOON_S)[0][1] == "b"


def taken_by_second_while_first_returns(front: Any) -> Any:
    """Slot 0 has run a job of client `a` and has not come back yet; what slot 1 takes, which waits."""
    first, second = front.slot_queues
    put(front, "a1", client_id="a")
    run_next(first)
    taken = in_thread(second.get, 60)
    wait_until_waiting(second)
    return taken


def test_the_next_job_of_a_client_waits_for_its_slot_to_come_back(front: Any) -> None:
    """The client hears of the end before the worker asks for the next job: the host collects garbage in between."""
    first, second = front.slot_queues
    other = taken_by_second_while_first_returns(front)
    put(front, "a2", client_id="a")
    assert waiting_ids(front) == ["a2"]
    assert second.is_asked
    assert take(first) == "a2"
    put(front, "b1", client_id="b")
    assert other.result(SOON_S)[0][1] == "b1"


def test_a_clients_jobs_do_not_wait_while_another_of_its_slots_is_free(front: Any) -> None:
    first, second = front.slot_queues
    for queue in (second, first):
        put(front, "earlier", target=queue.slot.index, client_id="a")
        run_next(queue)
    put(front, "next", client_id="a")
    assert take(second) == "next"


def test_a_job_of_another_client_does_not_wait_for_a_slot_to_come_back(front: Any) -> None:
    other = taken_by_second_while_first_returns(front)
    put(front, "b1", client_id="b")
    assert other.result(SOON_S)[0][1] == "b1"


def test_a_job_does_not_wait_for_a_slot_whose_worker_died(front: Any) -> None:
    first, _ = front.slot_queues
    other = taken_by_second_while_first_returns(front)
    put(front, "a2", client_id="a")
    first.fail_running(RuntimeError("it died after its job"))
    assert other.result(SOON_S)[0][1] == "a2"


def test_a_slot_that_comes_back_to_a_job_of_its_own_leaves_the_next_one_to_others(front: Any) -> None:
    first, _ = front.slot_queues
    other = taken_by_second_while_first_returns(front)
    put(front, "own", target=0, number=-1)
    put(front, "a2", client_id="a")
    assert take(first) == "own"
    assert other.result(SOON_S)[0][1] == "a2"


def test_only_the_slot_that_is_to_take_a_job_is_woken(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = front.slot_queues
    woken: list[Any] = []
    for queue in (first, second):
        notify = queue.not_empty.notify
        monkeypatch.setattr(
            queue.not_empty, "notify", lambda n=1, queue=queue, notify=notify: woken.append(queue) or notify(n)
        )
    taken = [in_thread(queue.get, 60) for queue in (first, second)]
    wait_until_waiting(first, second)
    put(front, "any")
    assert taken[0].result(SOON_S)[0][1] == "any"
    put(front, "own", target=1)
    assert taken[1].result(SOON_S)[0][1] == "own"
    assert woken == [first, second]


def test_the_running_job_is_a_deep_copy_that_keeps_what_the_queue_knows_of_it(front: Any) -> None:
    item = QueueItem(host_item("a"))
    item.arrival, item.target, item.queued_at = 7, 1, 2.5
    copied = item.deep_copy()
    assert copied == item
    assert type(copied) is QueueItem
    assert copied[2] is not item[2]
    assert (copied.arrival, copied.target, copied.queued_at) == (7, 1, 2.5)


# What nodes do to the queue.


def test_a_node_that_pushes_a_plain_tuple_and_wakes_one_waiter_gets_it_run(front: Any) -> None:
    first, second = front.slot_queues
    in_thread(second.get, 60)  # The longest waiter is woken first, and would leave the job to slot 0.
    wait_until_waiting(second)
    taken = in_thread(first.get, 60)
    wait_until_waiting(first)
    with front.mutex:
        heapq.heappush(front.queue, host_item("pushed"))
        front.not_empty.notify()
    assert taken.result(SOON_S)[0][1] == "pushed"


def test_plain_tuples_and_queued_jobs_share_one_order(front: Any) -> None:
    put(front, "c", number=2)
    for number, prompt_id in ((3, "d"), (1, "b")):
        heapq.heappush(front.queue, host_item(prompt_id, number))
    put(front, "a", number=0)
    heapq.heappush(front.queue, host_item("first of its number", 2))
    assert run_all(front.slot_queues[0]) == ["a", "b", "first of its number", "c", "d"]


def test_a_node_that_wraps_task_done_sees_every_slots_jobs(front: Any) -> None:
    seen = []
    original = front.task_done

    def watched(item_id: int, history_result: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(item_id)
        original(item_id, history_result, *args, **kwargs)

    front.task_done = watched
    put(front, "a", target=0)
    put(front, "b", target=1)
    run_next(front.slot_queues[0])
    run_next(front.slot_queues[1])
    assert seen == [0, 1]
    assert list(front.history) == ["a", "b"]


def test_a_pack_whose_task_done_takes_less_than_the_hosts_gives_works_and_keys_stay_out_of_the_history(
    front: Any,
) -> None:
    original, seen = front.task_done, []

    def older(item_id: int, history_result: Any, status: Any) -> None:
        seen.append(item_id)
        original(item_id, history_result, status)

    front.task_done = older
    put(front, "a")
    _, item_id = front.slot_queues[0].get(timeout=0)
    front.slot_queues[0].task_done(
        item_id, {"outputs": {}}, status=succeeded(), process_item=lambda item: item[:5] + item[6:]
    )
    assert seen == [item_id]
    assert front.history["a"]["status"]["status_str"] == "success"
    assert "secret" not in str(front.history["a"]["prompt"])


def test_when_a_packs_get_has_given_a_job_the_other_slots_ask_it_again(front: Any) -> None:
    """It may keep more jobs in a store of its own, and give the queue one at a time."""
    first, second = front.slot_queues
    plain_get = front.get
    front.get = lambda timeout=None: plain_get(timeout)
    waiting = in_thread(second.get, 60)
    wait_until_waiting(second)
    put(front, "bound", target=0)
    assert take(first) == "bound"
    assert waiting.result(SOON_S) is None


def test_a_pack_that_puts_a_waiting_job_into_another_slots_list_does_not_double_it(front: Any) -> None:
    """It looks into the list of the slot that asks, which does not show what another slot is about to take."""
    first, second = front.slot_queues
    plain_get, stored = front.get, host_item("a")

    def get(timeout: float | None = None) -> Any:
        if not front.queue:
            heapq.heappush(front.queue, stored)
        return plain_get(timeout)

    front._dispatcher.ask(first._desk)
    with scoped(Scope(target=AUTO)):
        front.put(stored)
    assert first.slot.state is SlotState.OFFERED
    front.get = get
    assert second.get(0) is None
    with entered(first.slot):
        assert plain_get(0)[0][1] == "a"
    assert waiting_ids(front) == []


def test_a_job_that_nobody_runs_cannot_be_done(front: Any) -> None:
    with pytest.raises(KeyError):
        front.task_done(99, {}, status=succeeded())


def test_inside_a_slot_only_its_own_job_runs(front: Any) -> None:
    for target, prompt_id in enumerate(("a", "b")):
        put(front, prompt_id, target=target)
        take(front.slot_queues[target])

    def running() -> list[str]:
        return [item[1] for item in front.currently_running.values()]

    assert running() == ["a", "b"]
    with entered(front.slot_queues[1].slot):
        assert running() == ["b"]


def test_what_runs_cannot_be_replaced(front: Any) -> None:
    front.currently_running = {}
    with pytest.raises(AttributeError, match="cannot be replaced"):
        front.currently_running = {0: host_item("a")}


# What clients see and change.


def test_the_queue_is_the_hosts_own_class_by_name_and_kind(front: Any) -> None:
    assert isinstance(front, PromptQueue)
    assert all(isinstance(queue, PromptQueue) for queue in front.slot_queues)
    assert type(front).__name__ == "PromptQueue"
    assert type(front).__module__ == PromptQueue.__module__
    assert type(front).ExecutionStatus is PromptQueue.ExecutionStatus


def test_what_remains_counts_all_that_runs_and_waits(front: Any) -> None:
    put(front, "a", "b")
    put(front, "c", target=0)
    put(front, "d", target=1)
    assert front.get_tasks_remaining() == 4
    take(front.slot_queues[1])
    assert front.get_tasks_remaining() == 4
    run_next(front.slot_queues[0])
    assert front.get_tasks_remaining() == 3
    assert front.server.remaining[-1] == 3


def test_the_current_queue_is_that_of_the_scope(front: Any) -> None:
    put(front, "running", target=1)
    take(front.slot_queues[1])
    put(front, "pinned 0", target=0)
    put(front, "pinned 1", target=1)
    put(front, "open")
    shown = {}
    for slot in (None, 0, 1):
        with scoped(Scope(slot=slot)):
            running, pending = front.get_current_queue()
        shown[slot] = ([item[1] for item in running], sorted(item[1] for item in pending))
    assert shown == {
        None: (["running"], ["open", "pinned 0", "pinned 1"]),
        0: ([], ["pinned 0"]),
        1: (["running"], ["pinned 1"]),
    }


def test_the_current_queue_is_a_copy(front: Any) -> None:
    put(front, "a")
    front.get_current_queue()[1][0][2].clear()
    assert front.queue[0][2] != {}
    assert front.get_current_queue_volatile()[1][0] is front.queue[0]


def test_a_snapshot_shows_waiting_jobs_in_the_order_in_which_they_run(front: Any) -> None:
    for number in (5, 1, 4, 2, 3):
        put(front, f"open {number}", number=number)
        put(front, f"pinned {number}", number=number, target=1)
    heapq.heappush(front.queue, host_item("pushed", 3))
    seen = front.snapshot()
    assert [item[1] for item in seen.unassigned] == ["open 1", "open 2", "pushed", "open 3", "open 4", "open 5"]
    assert [[item[1] for item in pending] for pending in seen.pending] == [[], [f"pinned {n}" for n in (1, 2, 3, 4, 5)]]
    assert seen.running == [[], []]
    assert run_all(front.slot_queues[0]) == [item[1] for item in seen.unassigned]


@pytest.mark.parametrize(("slot", "left"), [(None, []), (0, ["open", "pinned 1"]), (1, ["open", "pinned 0"])])
def test_wiping_empties_the_queues_of_the_scope(front: Any, slot: int | None, left: list[str]) -> None:
    put(front, "open")
    put(front, "pinned 0", target=0)
    put(front, "pinned 1", target=1)
    with scoped(Scope(slot=slot)):
        front.wipe_queue()
    assert sorted(waiting_ids(front)) == left
    assert front.server.remaining[-1] == len(left)


@pytest.mark.parametrize(
    ("slot", "prompt_id", "is_deleted"),
    [
        (None, "open", True),
        (None, "pinned 1", True),
        (None, "unknown", False),
        (None, "running", False),
        (1, "pinned 1", True),
        (0, "pinned 1", False),
        (1, "open", False),
    ],
)
def test_deleting_reaches_waiting_jobs_of_the_scope(
    front: Any, slot: int | None, prompt_id: str, is_deleted: bool
) -> None:
    put(front, "running", target=0)
    take(front.slot_queues[0])
    put(front, "open")
    put(front, "pinned 1", target=1)
    with scoped(Scope(slot=slot)):
        assert front.delete_queue_item(lambda item: item[1] == prompt_id) is is_deleted
    assert (prompt_id in waiting_ids(front)) is (prompt_id in ("open", "pinned 1") and not is_deleted)
    assert front.server.remaining[-1] == front.get_tasks_remaining()


def test_order_survives_a_deletion(front: Any) -> None:
    for number in range(20):
        put(front, str(number), number=number)
    front.delete_queue_item(lambda item: item[1] == "0")
    front.delete_queue_item(lambda item: item[1] == "7")
    assert run_all(front.slot_queues[0]) == [str(number) for number in range(20) if number not in (0, 7)]


def test_every_slot_gets_its_own_copy_of_a_flag(front: Any) -> None:
    front.set_flag("unload_models", True)
    for queue in front.slot_queues:
        with entered(queue.slot):
            assert front.get_flags(reset=False) == {"unload_models": True}
            assert queue.get_flags() == {"unload_models": True}
            assert queue.get_flags() == {}
    assert front.get_flags() == {}


def test_a_flag_of_one_slot_stays_there(front: Any) -> None:
    with scoped(Scope(slot=1)):
        front.set_flag("free_memory", True)
    first, second = front.slot_queues
    assert (first.get_flags(), second.get_flags()) == ({}, {"free_memory": True})
    second.set_flag("unload_models", True)
    assert (first.get_flags(), second.get_flags()) == ({}, {"unload_models": True})


def test_jobs_go_before_flags(front: Any) -> None:
    put(front, "a")
    front.set_flag("free_memory", True)
    assert take(front.slot_queues[0]) == "a"


def test_all_slots_have_one_history_in_the_order_in_which_jobs_ended(front: Any) -> None:
    put(front, "a", target=0)
    put(front, "b", target=1)
    items = [queue.get(timeout=0) for queue in front.slot_queues]
    for queue, (_, item_id) in reversed(list(zip(front.slot_queues, items, strict=True))):
        queue.task_done(item_id, {"outputs": {"1": "image"}}, status=succeeded())
    assert [(key, entry["gpu_id"]) for key, entry in front.get_history().items()] == [("b", 1), ("a", 0)]
    assert front.slot_queues[0].get_history("b") == front.get_history("b")
    assert front.history["a"]["outputs"] == {"1": "image"}


@pytest.mark.parametrize("through", ["front", "slot"])
def test_wiping_the_history_wipes_it_for_all(front: Any, through: str) -> None:
    put(front, "a", "b")
    run_all(front.slot_queues[0])
    (front if through == "front" else front.slot_queues[1]).wipe_history()
    assert front.history == front.slot_queues[0].history == front.slot_queues[1].history == {}
    put(front, "c")
    run_all(front.slot_queues[0])
    assert list(front.slot_queues[1].history) == ["c"]


def test_one_history_entry_can_be_deleted(front: Any) -> None:
    put(front, "a", "b")
    run_all(front.slot_queues[0])
    front.slot_queues[1].delete_history_item("a")
    assert list(front.history) == ["b"]


def test_interrupting_by_id_says_whether_the_job_runs(front: Any) -> None:
    put(front, "a", target=1)
    take(front.slot_queues[1])
    put(front, "waiting", target=1)
    assert front.interrupt_if_running("waiting") is False
    assert front.slot_queues[0].interrupt_if_running("a") is True
    assert front.slot_queues[1].slot.run.interrupted


# Counting.


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (succeeded(("execution_success", {})), {"succeeded": 1}),
        (None, {"succeeded": 1}),
        (failed(("execution_error", {"exception_type": "ValueError"})), {"failed": 1}),
        (failed(), {"failed": 1}),
        (failed(("execution_error", {"exception_type": "torch.OutOfMemoryError"})), {"failed": 1, "out_of_memory": 1}),
        (failed(("execution_interrupted", {})), {"interrupted": 1}),
    ],
    ids=["success", "no status", "error", "error without message", "out of memory", "interrupted"],
)
def test_outcomes_are_counted_per_slot(front: Any, status: Any, expected: dict[str, int]) -> None:
    put(front, "a")
    _, item_id = front.slot_queues[1].get(timeout=0)
    front.slot_queues[1].task_done(item_id, {}, status=status)
    names = ("succeeded", "failed", "interrupted", "out_of_memory")
    zeros = dict.fromkeys(names, 0)
    stats = front.slot_queues[1].slot.stats
    assert {name: getattr(stats, name) for name in names} == {**zeros, **expected}
    assert front.slot_queues[0].slot.stats.succeeded == 0


def test_seconds_of_waiting_and_running_are_summed(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    put(front, "a", target=0)
    now[0] = 103.0
    item, item_id = front.slot_queues[0].get(timeout=0)
    slot = front.slot_queues[0].slot
    slot.run = Run(item[1], started_at=now[0])
    now[0] = 110.0
    front.task_done(item_id, {}, status=succeeded())
    assert (slot.stats.wait_seconds, slot.stats.busy_seconds) == (3.0, 7.0)
    assert slot.run is None


def test_a_slot_is_running_from_take_to_done(front: Any) -> None:
    queue = front.slot_queues[0]
    assert queue.slot.state.shown == "starting"
    assert take(queue) is None
    assert queue.slot.state.shown == "idle"
    put(front, "a", client_id="c")
    _, item_id = queue.get(timeout=0)
    assert (queue.slot.state.shown, queue.slot.run.prompt_id, queue.slot.run.client_id) == ("running", "a", "c")
    assert interrupt_job("a")
    queue.task_done(item_id, {}, status=succeeded())
    assert queue.slot.state.shown == "idle"


# Jobs that cannot be run.


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"inner": value}
    return value


@pytest.mark.parametrize("host_class", [PromptQueue, OlderPromptQueue])
def test_a_job_too_deep_to_be_copied_ends_as_an_error_and_the_queue_goes_on(host_class: type) -> None:
    front = make_front("cpu", host_class=host_class)
    number, prompt_id, _, extra, outputs, sensitive = host_item("deep", client_id="c")
    parts = (number, prompt_id, nested(3_000), extra, outputs)
    front.put((*parts, sensitive) if host_class is PromptQueue else parts)
    put(front, "next")
    assert take(front.slot_queues[0]) == "next"
    entry = front.history["deep"]
    assert entry["status"]["status_str"] == "error"
    assert entry["gpu_id"] == 0
    ((_, message),) = entry["status"]["messages"]
    assert message["exception_type"] == "RecursionError"
    assert "secret" not in [*entry["prompt"][5:]]
    assert [(event, client) for event, _, client in front.server.sent] == [("execution_error", "c"), ("executing", "c")]
    assert front.slot_queues[0].slot.stats.failed == 1


def test_a_failed_job_keeps_its_keys_out_of_the_history(front: Any) -> None:
    put(front, "a", target=0)
    take(front.slot_queues[0])
    assert front.slot_queues[0].fail_running(RuntimeError("died")) == ["a"]
    assert len(front.history["a"]["prompt"]) == 5
    assert "secret" not in repr(front.history)


def test_a_job_that_left_logging_broken_ends_after_that_was_put_back(front: Any) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise KeyError("by the job")

    factory = logging.getLogRecordFactory()
    front.job_ends = lambda: logging.setLogRecordFactory(factory)
    put(front, "a", target=0)
    take(front.slot_queues[0])
    logging.setLogRecordFactory(broken)
    try:
        assert front.slot_queues[0].fail_running(RuntimeError("died")) == ["a"]
    finally:
        logging.setLogRecordFactory(factory)
    assert front.history["a"]["status"]["status_str"] == "error"


@pytest.mark.parametrize("most_attempts", [1, 2, 4])
def test_a_job_that_loses_its_processes_begins_as_often_as_is_allowed(front: Any, most_attempts: int) -> None:
    front.ledger.most_attempts = most_attempts
    queue = front.slot_queues[0]
    put(front, "a", target=0)
    for _ in range(most_attempts):
        assert front.history == {}
        take(queue)
        queue.fail_running(JobLost("its process ended", has_begun=True, may_run_again=True))
    assert front.history["a"]["status"]["status_str"] == "error"


def test_a_job_of_nobody_fails_without_telling_anybody(front: Any) -> None:
    put(front, "a", target=0)
    take(front.slot_queues[0])
    front.slot_queues[0].fail_running(RuntimeError())
    assert front.server.sent == []
    ((_, message),) = front.history["a"]["status"]["messages"]
    assert message["exception_message"].endswith("RuntimeError")


@pytest.mark.parametrize(("last", "named"), [("1", ("1", "Node")), ("of an earlier job", ("", "")), (None, ("", ""))])
def test_a_failed_job_names_the_node_that_ran(front: Any, last: str | None, named: tuple[str, str]) -> None:
    put(front, "a", target=0)
    take(front.slot_queues[0])
    front.server.last_node_id = last
    front.slot_queues[0].fail_running(RuntimeError("died"))
    ((_, message),) = front.history["a"]["status"]["messages"]
    assert (message["node_id"], message["node_type"]) == named
    assert front.server.last_node_id is None


@pytest.mark.parametrize("prompt", [None, [], {"1": "no node"}])
def test_a_job_that_a_node_made_up_fails_all_the_same(front: Any, prompt: Any) -> None:
    front.put((0, "a", prompt, {}, [], {}))
    take(front.slot_queues[0])
    front.server.last_node_id = "1"
    assert front.slot_queues[0].fail_running(RuntimeError("died")) == ["a"]
    assert front.history["a"]["status"]["status_str"] == "error"


def test_a_job_that_cannot_be_copied_for_another_reason_is_not_lost(front: Any) -> None:
    queue = front.slot_queues[0]
    put(front, "locked", target=0, lock=threading.Lock())
    with pytest.raises(TypeError) as failure:
        queue.get(timeout=0)
    assert queue.fail_running(failure.value) == ["locked"]
    assert front.history["locked"]["status"]["status_str"] == "error"
    assert queue.slot.state != "running"


def test_a_failing_job_ends_although_a_nodes_task_done_fails(front: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a node's mistake")

    front.task_done = broken
    put(front, "a", target=0)
    take(front.slot_queues[0])
    with pytest.raises(ValueError, match="a node's mistake"):
        front.slot_queues[0].fail_running(RuntimeError("died"))
    assert front.history["a"]["status"]["status_str"] == "error"
    assert front.currently_running == {}
    assert front.slot_queues[0].slot.state != "running"


# Many threads.


def test_a_thousand_jobs_on_four_slots_run_once_each() -> None:
    front = make_front("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    count = 1000
    targets = [AUTO, 0, 1, 2, 3]
    ran: list[list[str]] = [[] for _ in front.slot_queues]

    def submit(first: int) -> None:
        for job in range(first, count, 4):
            put(front, str(job), target=targets[job % 5], client_id=str(job % 7))

    def work(index: int) -> None:
        with entered(front.slot_queues[index].slot):
            while (prompt_id := run_next(front.slot_queues[index])) != "end":
                if prompt_id is not None:
                    ran[index].append(prompt_id)

    submitters = [in_thread(submit, first) for first in range(4)]
    workers = [in_thread(work, index) for index in range(4)]
    for submitter in submitters:
        submitter.result(SOON_S)
    for index in range(4):
        put(front, "end", target=index, number=1)
    for worker in workers:
        worker.result(SOON_S)
    assert Counter(job for jobs in ran for job in jobs) == Counter(map(str, range(count)))
    for index, jobs in enumerate(ran):
        assert all(targets[int(job) % 5] in (AUTO, index) for job in jobs)
        assert all(front.history[job]["gpu_id"] == index for job in jobs)
    assert front.get_tasks_remaining() == 0
    assert sum(queue.slot.stats.succeeded for queue in front.slot_queues) == count + 4


def test_slots_that_put_take_and_end_jobs_at_once_never_wait_for_each_other(front: Any) -> None:
    """N full queues with a front that sums over them deadlock here: the server asks for the sum at each change."""
    rounds = 300
    stop = threading.Event()

    def work(index: int) -> int:
        queue = front.slot_queues[index]
        for number in range(rounds):
            queue.put(host_item(f"{index}-{number}", number))
            assert run_next(queue) == f"{index}-{number}"
        return rounds

    def look() -> int:
        looks = 0
        while not stop.is_set():
            front.snapshot()
            front.get_tasks_remaining()
            front.get_current_queue()
            looks += 1
        return looks

    watcher = in_thread(look)
    workers = [in_thread(work, index) for index in range(2)]
    assert [worker.result(SOON_S) for worker in workers] == [rounds, rounds]
    stop.set()
    assert watcher.result(SOON_S) > 0
    assert len(front.history) == 2 * rounds


# Jobs that run alone.


@pytest.fixture
def alone() -> Iterator[None]:
    """Jobs whose workflow is about "alone" run alone."""
    when_to_run_alone(lambda workflow: "alone" in str(workflow))
    yield
    when_to_run_alone(None)


def put_alone(front: Any, prompt_id: str) -> None:
    number, _, _, *rest = host_item(prompt_id)
    with scoped(Scope(target=AUTO)):
        front.put((number, prompt_id, {"1": {"class_type": "alone"}}, *rest))


@pytest.mark.usefixtures("alone")
def test_a_job_that_runs_alone_waits_for_the_others_and_the_next_ones_for_it(front: Any) -> None:
    first, second = front.slot_queues[:2]
    put(front, "a")
    _, running = first.get(timeout=0)
    put_alone(front, "b")
    put(front, "c")
    assert take(second) is None
    assert front.snapshot().waiting_to_run_alone == ["b"]
    first.task_done(running, {}, status=succeeded())
    item, item_id = first.get(timeout=0)
    assert item[1] == "b"
    assert front.snapshot().waiting_to_run_alone == []
    assert take(second) is None
    first.task_done(item_id, {}, status=succeeded())
    assert take(first) == "c"


def test_jobs_that_take_turns_run_one_after_the_other_and_are_overtaken_by_others(front: Any) -> None:
    who_takes_turns(lambda workflow: frozenset(("pack",)) if workflow is TURN else frozenset())
    try:
        first, second = front.slot_queues[:2]
        for prompt_id, workflow in (("one", TURN), ("two", TURN), ("plain", {})):
            item = host_item(prompt_id)
            front.put((*item[:2], workflow, *item[3:]))
        taken = first.get(timeout=0)
        assert (taken[0][1], run_next(second)) == ("one", "plain")
        assert take(second) is None
        first.task_done(taken[1], {"outputs": {}}, status=succeeded())
        assert take(second) == "two"
    finally:
        who_takes_turns(None)
