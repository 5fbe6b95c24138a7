"""How a job and its shares are run, around an executor that does what the host's does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from comfy_parallel.core.fan_out import Classes
from comfy_parallel.core.shares import Share
from comfy_parallel.nodes.parallel import fan_out
from comfy_parallel.slots.items import QueueItem
from comfy_parallel.slots.slot import Run, Slot, entered, set_slots

WORKFLOW: dict[str, Any] = {
    "seed": {"class_type": "Seed", "inputs": {"seed": 1}},
    "work": {"class_type": "Work", "inputs": {"seed": ["seed", 0]}},
    "all": {"class_type": "Collect", "inputs": {"value": ["work", 0]}},
}


class Shares:
    """What is queued for other slots."""

    def __init__(self) -> None:
        self.put_items: list[tuple[Any, Share]] = []

    def put(self, item: Any, share: Share, job: Any, not_on: frozenset[int]) -> None:
        self.put_items.append((item, share))

    def drop(self, prompt_id: str) -> bool:
        before = len(self.put_items)
        self.put_items = [one for one in self.put_items if one[0][1] != prompt_id]
        return len(self.put_items) < before


class Executor:
    """Says what is cached, and runs `work`."""

    def __init__(self, shares: Shares, item: Any, cached: tuple[str, ...] = ()) -> None:
        queue = SimpleNamespace(running_items=lambda: [item], front=SimpleNamespace(shares=shares))
        self.server = SimpleNamespace(prompt_queues=[queue, queue], client_id="client")
        self.cached, self.seen, self.status_messages = cached, [], []
        self.work = lambda: None

    @fan_out.starting_shares
    def add_message(self, event: str, data: Any, broadcast: bool) -> None:
        self.seen.append(event)

    @fan_out.fanning_out
    def execute(self, prompt: Any, prompt_id: Any, extra_data: Any, execute_outputs: Any) -> None:
        self.add_message("execution_cached", {"nodes": list(self.cached)}, broadcast=False)
        self.work()


@pytest.fixture
def slots() -> Iterator[list[Slot]]:
    made = [Slot(0, "cpu"), Slot(1, "cpu")]
    set_slots(tuple(made))
    fan_out.use(Classes(frozenset({"Collect"}), frozenset({"Seed"})))
    yield made
    fan_out.use(Classes())
    set_slots(())


def run(slot: Slot, executor: Executor, prompt_id: str = "job", share: Share | None = None) -> None:
    slot.run = Run(prompt_id, share=share)
    with entered(slot):
        executor.execute(WORKFLOW, prompt_id, {}, ["all"])


ITEM = QueueItem((3, "job", WORKFLOW, {"client_id": "client", "gpu_id": 0}, ["all"], {"secret": "s"}))


def test_a_job_offers_its_shares_and_takes_back_what_nobody_took(slots: list[Slot]) -> None:
    shares = Shares()
    executor = Executor(shares, ITEM)
    offered: list[Any] = []
    executor.work = lambda: offered.extend(shares.put_items)
    run(slots[0], executor)
    ((item, share),) = offered
    assert (item[0], item[3]["client_id"], item[4], item[5]) == (3, "client", ["all"], {"secret": "s"})
    assert share == Share("job", 1, 2)
    assert shares.put_items == []


def test_a_cached_job_offers_none(slots: list[Slot]) -> None:
    shares = Shares()
    executor = Executor(shares, ITEM, cached=("all",))
    executor.work = lambda: pytest.fail("shares were offered") if shares.put_items else None
    run(slots[0], executor)


def test_a_share_whose_job_has_ended_is_left(slots: list[Slot]) -> None:
    """Its slot had taken it already, so it could not be taken back."""
    shares = Shares()
    parent, child = Executor(shares, ITEM), Executor(shares, ITEM)
    taken: list[Any] = []
    parent.work = lambda: taken.extend(shares.put_items)
    run(slots[0], parent)
    child.work = lambda: pytest.fail("it ran")
    run(slots[1], child, taken[0][0][1], taken[0][1])
    assert (child.seen, child.server.client_id) == ([], None)


def test_a_share_is_left_that_the_job_computes_itself(slots: list[Slot]) -> None:
    shares = Shares()
    parent, child = Executor(shares, ITEM), Executor(shares, ITEM)
    child.work = lambda: pytest.fail("it ran")

    def work() -> None:
        job = fan_out.current()
        assert job is not None
        assert job.next_to_compute("all", lambda: None) == 1
        ((item, share),) = shares.put_items
        run(slots[1], child, item[1], share)

    parent.work = work
    run(slots[0], parent)


def test_who_interrupts_a_share_means_the_job(slots: list[Slot]) -> None:
    shares = Shares()
    parent, child = Executor(shares, ITEM), Executor(shares, ITEM)
    child.work = lambda: child.status_messages.append(("execution_interrupted", {}))

    def work() -> None:
        ((item, share),) = shares.put_items
        run(slots[1], child, item[1], share)

    parent.work = work
    run(slots[0], parent)
    assert slots[0].run is not None
    assert slots[0].run.interrupted
