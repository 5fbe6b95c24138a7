"""How fast slots are is learnt from runs that say it."""

from __future__ import annotations

from typing import Any

from comfy_parallel.core.scope import Scope, scoped
from tests.fakes import host_item, make_front, succeeded


def run(front: Any, slot: int, model: str, seconds: float) -> None:
    workflow = {"1": {"class_type": "Loader", "inputs": {"ckpt_name": f"{model}.safetensors", "steps": 20}}}
    number, prompt_id, _, *rest = host_item("job")
    with scoped(Scope(target=slot)):
        front.put((number, prompt_id, workflow, *rest))
    queue = front.slot_queues[slot]
    _, item_id = queue.get(timeout=0)
    queue.slot.run.started_at -= seconds
    queue.task_done(item_id, {"outputs": {}}, status=succeeded())


def are_unequal(front: Any) -> bool:
    found: bool = front._dispatcher._measuring.matters(front._dispatcher.desks)
    return found


def test_a_slot_that_loads_more_often_is_not_slower() -> None:
    front = make_front("cpu", "cpu")
    for turn in range(40):
        run(front, 0, "ab"[turn // 10 % 2], 14.0 if turn % 10 == 0 else 10.0)
        run(front, 1, "ab"[turn % 2], 14.0)
    assert not are_unequal(front)


def test_a_slot_whose_jobs_take_longer_with_their_models_loaded_is_slower() -> None:
    front = make_front("cpu", "cpu")
    for _ in range(40):
        run(front, 0, "a", 10.0)
        run(front, 1, "a", 20.0)
    assert are_unequal(front)
