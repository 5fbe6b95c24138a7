"""Who belongs to the group of processes that share weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from comfy_parallel.config import Config
from comfy_parallel.slots.slot import Slot, set_slots
from comfy_parallel.weights import loading, sharing
from comfy_parallel.weights.files import group


class Front:
    between_jobs: Any = None


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No group, no store, one slot."""
    monkeypatch.setattr(sharing, "_server", None)
    monkeypatch.setattr(sharing, "_group_name", None)
    set_slots((Slot(0, "cpu"),))
    yield
    if sharing._server is not None:
        sharing._server.close()
    loading.use(None)
    set_slots(())


def group_of_store() -> str | None:
    store = loading.store()
    assert store is not None
    return None if store._group is None else store._group.name


def begin(env: dict[str, str]) -> None:
    sharing.begin(Config(enabled=True), Front(), env, may_pin=False)


def test_a_server_alone_is_in_no_group_until_it_starts_another() -> None:
    env: dict[str, str] = {}
    begin(env)
    assert (group_of_store(), env) == (None, {})
    told = sharing.join_others()
    assert told == {group.VARIABLE: group_of_store()} != {group.VARIABLE: None}
    assert sharing.join_others() == told


def test_it_joins_those_that_started_before_it_shared() -> None:
    told = sharing.join_others()
    begin({})
    assert {group.VARIABLE: group_of_store()} == told


def test_one_that_was_started_in_a_group_tells_of_that() -> None:
    env = {group.VARIABLE: "a group"}
    begin(env)
    assert (group_of_store(), sharing.join_others()) == ("a group", env)
    assert sharing._server is None
