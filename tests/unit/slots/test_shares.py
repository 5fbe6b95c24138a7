"""Shares of a running job are no jobs: they fill no client's room, and nobody can take them out of the queue."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from comfy_parallel.config import Policy
from comfy_parallel.core.scope import Scope, scoped
from comfy_parallel.core.shares import Share
from comfy_parallel.errors import QueueFull
from comfy_parallel.slots.items import QueueItem
from comfy_parallel.slots.room import check_may_wait
from comfy_parallel.slots.slot import entered
from tests.fakes import host_item


def waiting_share(front: Any, not_on: frozenset[int] = frozenset()) -> str:
    """One that no slot asks for."""
    share = QueueItem(host_item("share", client_id="client"))
    front.shares.put(tuple(share), Share("job", 1, 2), QueueItem(host_item("job", client_id="client")), not_on)
    return "share"


def test_they_take_no_room(front: Any) -> None:
    waiting_share(front)
    policy = replace(Policy(), max_waiting=1, max_waiting_per_client=1)
    item = host_item("next", client_id="client")
    check_may_wait(front._dispatcher.waiting, policy, item, None)
    front.put(host_item("other", client_id="client"))
    with pytest.raises(QueueFull, match="1 jobs wait"):
        check_may_wait(front._dispatcher.waiting, policy, item, None)


def test_they_do_not_count_among_a_clients_running_jobs(front: Any) -> None:
    waiting_share(front)
    with entered(front.slot_queues[0].slot):
        front.slot_queues[0].get(timeout=1)
    assert list(front._dispatcher._under_way().clients) == []


def test_a_slots_queue_does_not_show_them_and_nobody_deletes_them(front: Any) -> None:
    waiting_share(front)
    with scoped(Scope(slot=1)):
        assert front.get_current_queue() == ([], [])
        assert not front.delete_queue_item(lambda item: True)
    assert front.slot_queues[1]._count_waiting() == 0
    assert front.shares.drop("share")


def test_a_slot_that_is_left_out_does_not_get_them(front: Any) -> None:
    waiting_share(front, not_on=frozenset({0}))
    first, second = front.slot_queues[:2]
    with entered(first.slot):
        assert first.get(timeout=0.05) is None
    with entered(second.slot):
        assert second.get(timeout=60)[0][1] == "share"
