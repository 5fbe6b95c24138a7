"""How fast slots are is learnt from runs that say it."""

from __future__ import annotations

from typing import Any

import pytest

from comfy_parallel.core.scope import Scope, scoped
from tests.fakes import host_item, make_front, succeeded


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("dispatcher", "measuring", "slot"):
        monkeypatch.setattr(f"comfy_parallel.slots.{module}.time.monotonic", clock.monotonic)
    return clock


def run(front: Any, clock: Clock, slot: int, model: str, seconds: float) -> None:
    workflow = {"1": {"class_type": "Loader", "inputs": {"ckpt_name": f"{model}.safetensors", "steps": 20}}}
    number, prompt_id, _, *rest = host_item("job")
    with scoped(Scope(target=slot)):
        front.put((number, prompt_id, workflow, *rest))
    queue = front.slot_queues[slot]
    _, item_id = queue.get(timeout=0)
    clock.now += seconds
    queue.task_done(item_id, {"outputs": {}}, status=succeeded())


def matters(front: Any) -> bool:
    found: bool = front._dispatcher._measuring.matters(front._dispatcher.desks)
    return found


def test_a_slot_that_loads_more_often_is_not_slower(clock: Clock) -> None:
    front = make_front("cpu", "cpu")
    for turn in range(40):
        run(front, clock, 0, "a", 10.0 if turn else 14.0)
        run(front, clock, 1, "ab"[turn % 2], 14.0)
    assert not matters(front)


def test_a_slot_whose_jobs_take_longer_with_their_models_loaded_is_slower(clock: Clock) -> None:
    front = make_front("cpu", "cpu")
    for _ in range(40):
        run(front, clock, 0, "a", 10.0)
        run(front, clock, 1, "a", 20.0)
    assert matters(front)
