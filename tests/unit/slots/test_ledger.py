"""What is written down of jobs on their way through the queue, and what a restart makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from comfy_parallel.core.scope import RequestKey, Scope, scoped
from comfy_parallel.errors import KeyReused
from comfy_parallel.journal.journal import Journal, Kept
from comfy_parallel.slots.recovery import Recovery
from tests.fakes import MAX_HISTORY, OlderPromptQueue, PromptQueue, host_item, make_front, run_all, run_next, take

Restart = Callable[..., Any]


@pytest.fixture
def restart(tmp_path: Path) -> Iterator[Restart]:
    """`restart()`: a front with two slots that finds what the one before has left, as after a kill."""
    journals: list[Journal] = []

    def start(
        most_attempts: int = 2, lacks: Any = lambda workflow, names: [], host_class: type = PromptQueue, slots: int = 2
    ) -> Any:
        if journals:
            journals[-1].close()  # Writes what was told and knows nothing of what runs, as a kill.
        journals.append(Journal(tmp_path / "queue.sqlite3", ["api_key_comfy_org"]))
        front = make_front(*["cpu"] * slots, host_class=host_class)
        front.server.number = 0
        kept = journals[-1].recover()
        front.ledger.open(journals[-1], kept.next_job, lambda: int(front.server.number))
        Recovery(front, most_attempts, lacks).restore(kept)
        return front

    yield start
    if journals:
        journals[-1].close()


def waiting(front: Any) -> list[str]:
    seen = front.snapshot()
    return [item[1] for items in (*seen.pending, seen.unassigned) for item in items]


def kept(front: Any) -> Kept:
    front.ledger.flush()
    found: Kept = front.ledger.journal.recover()
    return found


def requested(front: Any, item: Any, key: str | None = None, digest: str = "d") -> Any:
    """What a request that brings this job is told: None when the job is new."""
    scope = Scope(is_submission=True, request_key=None if key is None else RequestKey(key, digest))
    with scoped(scope):
        front.put(item)
    return scope.repeated


def test_jobs_wait_again_in_order_with_their_ids_targets_clients_and_numbers(restart: Restart) -> None:
    front = restart()
    for prompt_id, number, target in (("late", 7, 1), ("a", 1, 0), ("b", 1, 1), ("first", -5, None), ("c", 1, 0)):
        front.put_on(host_item(prompt_id, number, client_id=f"client of {prompt_id}"), target)
    front.server.number = 9
    front = restart()
    seen = front.snapshot()
    assert [[item[1] for item in items] for items in seen.pending] == [["a", "c"], ["b", "late"]]
    (unassigned,) = seen.unassigned
    assert (unassigned[0], unassigned[1], unassigned.client_id) == (-5, "first", "client of first")
    assert unassigned[2] == host_item("first")[2]
    assert unassigned[4:] == (["1"], {})
    assert kept(front).counter == 0  # No job came since.
    front.put(host_item("next", 1))
    assert waiting(front).index("next") == len(waiting(front)) - 1
    assert run_all(front.slot_queues[0]) == ["first", "a", "c", "next"]


def test_changed_jobs_and_fair_shares_keep_their_order(restart: Restart) -> None:
    front = restart()
    for number, (prompt_id, party) in enumerate((("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))):
        with scoped(Scope(is_submission=True, is_in_turn=True, party=party, peer=f"peer {party}")):
            front.put(host_item(prompt_id, number))
    before = waiting(front)
    assert before == ["a1", "b1", "a2", "a3"]
    front.server.number = 4
    front = restart()
    assert waiting(front) == before
    with scoped(Scope(is_submission=True, is_in_turn=True, party="b", peer="peer b")):
        front.put(host_item("b2", 4))
    assert waiting(front).index("b2") > waiting(front).index("a2")
    front.change_waiting("a3", 1, 5)
    front = restart()
    assert (waiting(front)[0], [item[1] for item in front.snapshot().pending[1]]) == ("a3", ["a3"])
    assert [item.peer for item in front.snapshot().unassigned] == ["peer a", "peer b", "peer a", "peer b"]


def test_what_ran_runs_again_and_ends_as_an_error_after_its_attempts(restart: Restart) -> None:
    front = restart()
    front.put(host_item("runs"))
    assert take(front.slot_queues[0]) == "runs"
    front = restart()
    assert [job.attempts for job in kept(front).waiting] == [1]
    assert run_next(front.slot_queues[0]) == "runs"
    assert front.history["runs"]["attempts"] == 2
    front = restart()
    assert (waiting(front), front.history["runs"]["attempts"]) == ([], 2)

    front.put(host_item("kills"))
    for _ in range(2):
        assert take(front.slot_queues[1]) == "kills"
        front = restart()
    assert waiting(front) == []
    entry = front.history["kills"]
    ((kind, event),) = entry["status"]["messages"]
    assert (kind, entry["status"]["status_str"], entry["attempts"]) == ("execution_error", "error", 2)
    assert "COMFY_PARALLEL_ATTEMPTS=2" in event["exception_message"]
    assert list(restart().history) == ["runs", "kills"]


def test_jobs_that_ran_together_run_again_one_at_a_time_so_that_only_the_guilty_ends(restart: Restart) -> None:
    front = restart()
    front.put_on(host_item("innocent"), 0)
    front.put_on(host_item("kills"), 1)
    assert [take(queue) for queue in front.slot_queues] == ["innocent", "kills"]
    front.put(host_item("waits"))
    front = restart()
    assert front.snapshot().waiting_to_run_alone == ["innocent", "kills"]
    assert [take(queue) for queue in front.slot_queues] == ["innocent", None]
    front = restart(most_attempts=3)  # killed by something else meanwhile
    assert sorted(front.snapshot().waiting_to_run_alone) == ["innocent", "kills"]


def test_an_end_in_order_does_not_count(restart: Restart) -> None:
    front = restart()
    front.put(host_item("runs"))
    assert take(front.slot_queues[0]) == "runs"
    front.ledger.close()
    assert take(restart().slot_queues[0]) == "runs"


def test_what_was_deleted_or_cleared_does_not_come_back(restart: Restart) -> None:
    front = restart()
    for number in range(4):
        front.put(host_item(f"job-{number}"))
    assert front.delete_queue_item(lambda item: item[1] == "job-1")
    assert waiting(restart()) == ["job-0", "job-2", "job-3"]
    front = restart()
    front.wipe_queue()
    assert waiting(restart()) == []


def test_a_node_packs_new_items_for_the_same_jobs_stay_the_same_jobs(restart: Restart) -> None:
    front = restart()
    for number in range(3):
        front.put(host_item(f"job-{number}"))
    with front.mutex:
        front.queue = [tuple(item) for item in front.queue if item[1] != "job-1"]
    assert waiting(restart()) == ["job-0", "job-2"]
    front = restart()
    with front.mutex:
        front.queue = [tuple(item) for item in front.queue]
    assert run_next(front.slot_queues[0]) == "job-0"
    front = restart()
    assert (waiting(front), list(front.history)) == (["job-2"], ["job-0"])


def test_a_job_that_queues_itself_again_under_its_own_id_is_two_jobs(restart: Restart) -> None:
    front = restart()
    front.put(host_item("same"))
    item, item_id = front.slot_queues[0].get(timeout=0)
    front.slot_queues[0].put(host_item("same", 5))
    front.slot_queues[0].task_done(item_id, {"outputs": {"run": 1}}, status=None)
    front = restart()
    assert waiting(front) == ["same"]
    assert front.history["same"]["outputs"] == {"run": 1}
    assert run_next(front.slot_queues[0]) == "same"
    assert (waiting(restart()), len(restart().history)) == ([], 1)


def test_the_history_is_bounded_cleared_and_thinned_out_as_the_hosts(
    restart: Restart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.MAX_HISTORY", 3)
    assert MAX_HISTORY > 3
    front = restart()
    for number in range(8):
        front.put(host_item(f"job-{number}"))
    run_all(front.slot_queues[0])
    expected = list(front.history)
    assert len(expected) == 4
    front = restart()
    assert list(front.history) == expected
    assert front.history["job-7"]["prompt"] == (*host_item("job-7", gpu_id=0)[:5],)
    front.delete_history_item("job-5")
    front = restart()
    assert list(front.history) == ["job-4", "job-6", "job-7"]
    front.wipe_history()
    assert restart().history == {}


@pytest.mark.parametrize("host_class", [PromptQueue, OlderPromptQueue])
def test_secrets_are_not_kept_and_who_needs_them_ends_as_an_error(
    restart: Restart, tmp_path: Path, host_class: type
) -> None:
    front = restart(host_class=host_class)
    for prompt_id in ("needs", "other"):
        item = host_item(prompt_id)
        if host_class is OlderPromptQueue:
            item[3].update(item[5])
            item = item[:5]
        front.put(item)

    def lacks(workflow: Any, names: Any) -> list[str]:
        return list(names) if workflow == host_item("needs")[2] else []

    front = restart(host_class=host_class, lacks=lacks)
    assert not any(b'"secret"' in path.read_bytes() for path in tmp_path.iterdir())
    assert waiting(front) == ["other"]
    ((_, event),) = front.history["needs"]["status"]["messages"]
    assert "needs api_key_comfy_org, which is never kept on disk" in event["exception_message"]


def test_a_job_of_a_slot_that_is_gone_may_run_anywhere(restart: Restart) -> None:
    front = restart()
    front.put_on(host_item("bound"), 1)
    front = restart(slots=1)
    assert [item[1] for item in front.snapshot().unassigned] == ["bound"]
    assert run_next(front.slot_queues[0]) == "bound"


def test_a_repeated_id_or_key_is_the_same_job_wherever_that_is(restart: Restart) -> None:
    front = restart()
    assert requested(front, host_item("a", 3), "key") is None
    assert requested(front, host_item("another id"), "key") == ("a", 3, None)
    assert requested(front, host_item("a")) == ("a", 3, None)
    assert requested(front, host_item("a"), "another key") == ("a", 3, None)
    assert waiting(front) == ["a"]
    front = restart()
    assert requested(front, host_item("another id"), "key") == ("a", 3, None)
    assert take(front.slot_queues[1]) == "a"
    assert requested(front, host_item("another id"), "key") == ("a", 3, 1)
    front = restart()
    assert run_next(front.slot_queues[0]) == "a"
    assert requested(front, host_item("another id"), "key") == ("a", 3, 0)
    front = restart()
    assert requested(front, host_item("another id"), "key") == ("a", 3, 0)
    assert requested(front, host_item("a")) == ("a", 3, 0)
    with pytest.raises(KeyReused):
        requested(front, host_item("another id"), "key", digest="e")
    front.wipe_history()
    assert requested(front, host_item("another id"), "key") is None
    assert waiting(front) == ["another id"]


def test_what_the_host_notes_in_a_running_workflow_does_not_make_it_another(restart: Restart) -> None:
    front = restart()
    assert requested(front, host_item("a")) is None
    item, _number = front.slot_queues[0].get(timeout=0)
    item[2]["1"]["is_changed"] = ["a hash of a file"]
    assert requested(front, host_item("a")) == ("a", 0, 0)


def test_the_same_id_with_another_workflow_is_another_job(restart: Restart) -> None:
    front = restart()
    assert requested(front, host_item("a")) is None
    other = (0, "a", {"1": {"class_type": "Other", "inputs": {}}}, {}, ["1"], {})
    assert requested(front, other) is None
    assert waiting(restart()) == ["a", "a"]


def test_jobs_of_node_packs_are_never_taken_for_repeated(restart: Restart) -> None:
    front = restart()
    for _ in range(2):
        front.put(host_item("same"))
    assert waiting(restart()) == ["same", "same"]


def test_without_a_journal_repeated_requests_are_known_and_nothing_is_wrong() -> None:
    front = make_front("cpu")
    assert requested(front, host_item("a"), "key") is None
    assert requested(front, host_item("b"), "key") is not None
    assert (front.ledger.keeps, front.ledger.problem) == (False, None)
    assert run_all(front.slot_queues[0]) == ["a"]
    front.wipe_history()
    assert requested(front, host_item("b"), "key") is None


def test_what_is_no_json_runs_all_the_same(restart: Restart) -> None:
    front = restart()
    front.put((0, "odd", {"1": {"class_type": "Node", "inputs": {"text": object()}}}, {}, ["1"], {}))
    front.put(host_item("plain"))
    assert run_all(front.slot_queues[0]) == ["odd", "plain"]
    assert list(restart().history) == ["plain"]


def test_jobs_leave_nothing_behind_in_memory(restart: Restart) -> None:
    front = restart()
    numbers = itertools.count()
    for _ in range(200):
        requested(front, host_item(f"job-{next(numbers)}"), f"key-{next(numbers)}")
    run_all(front.slot_queues[0])
    front.wipe_history()
    ledger = front.ledger
    assert [len(held) for held in (ledger._live, ledger._running, ledger._handed_back, ledger._ended, ledger._ids)] == [
        0
    ] * 5
