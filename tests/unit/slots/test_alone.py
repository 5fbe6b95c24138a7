"""Jobs that must be the only one that runs because of a node that they have made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.core.shares import Share
from comfy_parallel.errors import MustRunAlone
from comfy_parallel.slots import alone
from comfy_parallel.slots.items import when_to_run_alone
from comfy_parallel.slots.slot import current_slot, entered
from tests.fakes import host_item, in_thread, make_front, succeeded, take

pytestmark = pytest.mark.timeout(120)

UNSAFE, SAFE = {"class_type": "Unsafe"}, {"class_type": "Safe"}


@pytest.fixture
def front() -> Iterator[Any]:
    when_to_run_alone(lambda workflow: any(made["class_type"] == "Unsafe" for made in workflow.values()))
    made = make_front("cpu", "cpu", "cpu")
    alone.use(made.mutex)
    yield made
    when_to_run_alone(None)


class Job:
    """A running job of a slot that makes an unsafe node, on a thread of its own."""

    def __init__(self, front: Any, index: int, prompt_id: str) -> None:
        self.front, self.queue = front, front.slot_queues[index]
        self.rests, self.goes_on = threading.Event(), threading.Event()
        self.is_interrupted = False
        front.put_on(host_item(prompt_id), index)
        self.item_id = self.queue.get(timeout=0)[1]

    def make(self) -> Any:
        def run() -> None:
            with entered(self.queue.slot):
                alone.node_added(UNSAFE, self._look)
            self.goes_on.set()

        return in_thread(run)

    def _look(self) -> None:
        self.rests.set()
        if self.is_interrupted:
            raise InterruptedError

    def end(self) -> None:
        self.queue.task_done(self.item_id, {"outputs": {}}, status=succeeded())


def test_it_rests_until_the_others_have_ended_and_keeps_new_ones_waiting(front: Any) -> None:
    other, grown = Job(front, 0, "other"), Job(front, 1, "grown")
    grown.make()
    assert grown.rests.wait(5)
    assert front.snapshot().waiting_to_run_alone == ["grown"]
    front.put_on(host_item("later"), 2)
    assert take(front.slot_queues[2]) is None
    assert not grown.goes_on.is_set()
    other.end()
    assert grown.goes_on.wait(5)
    assert front.snapshot().waiting_to_run_alone == []
    assert take(front.slot_queues[2]) is None
    grown.end()
    assert take(front.slot_queues[2]) == "later"


def test_of_several_that_rest_one_goes_on_to_its_end_at_a_time(front: Any) -> None:
    other, *grown = (Job(front, index, str(index)) for index in range(3))
    for job in grown:
        job.make()
        assert job.rests.wait(5)
    other.end()
    while not any(job.goes_on.wait(0.01) for job in grown):
        pass
    first, second = sorted(grown, key=lambda job: not job.goes_on.is_set())
    assert not second.goes_on.wait(0.2)
    first.end()
    assert second.goes_on.wait(5)


def test_alone_it_goes_on_at_once_and_safe_nodes_never_wait(front: Any) -> None:
    def never() -> None:
        raise AssertionError("it waited")

    first, second = Job(front, 0, "first"), Job(front, 1, "second")
    with entered(first.queue.slot):
        alone.node_added(SAFE, never)
    alone.node_added(UNSAFE, never)  # outside of slots
    second.end()
    with entered(first.queue.slot):
        alone.node_added(UNSAFE, never)
        alone.node_added(UNSAFE, never)
        assert current_slot().run.is_alone  # type: ignore[union-attr]


def test_one_that_is_interrupted_while_it_rests_holds_up_nobody(front: Any) -> None:
    other, grown = Job(front, 0, "other"), Job(front, 1, "grown")
    grown.is_interrupted = True
    with entered(grown.queue.slot), pytest.raises(InterruptedError):
        alone.node_added(UNSAFE, grown._look)
    grown.end()
    front.put_on(host_item("later"), 2)
    assert take(front.slot_queues[2]) == "later"
    other.end()


def test_a_share_does_not_wait_for_its_job(front: Any) -> None:
    share = Job(front, 0, "share")
    share.queue.slot.run.share = Share("job", 1, 2)
    with entered(share.queue.slot), pytest.raises(MustRunAlone, match="Unsafe"):
        alone.node_added(UNSAFE, lambda: None)
