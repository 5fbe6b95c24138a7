"""Readers are told a snapshot, then what changes, each at its own pace."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from comfy_parallel.errors import TooManyReaders
from comfy_parallel.http import feed as module
from comfy_parallel.http.feed import Feed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)


def parsed(message: bytes) -> tuple[str, Any]:
    event, data, *end = message.decode().split("\n")
    assert end == ["", ""]
    return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))["parts"]


async def test_a_snapshot_then_only_the_parts_that_change() -> None:
    state: dict[str, Any] = {"a": 1, "b": [1]}
    feed = Feed(lambda: dict(state))
    events = feed.events()
    assert parsed(await anext(events)) == ("snapshot", {"a": 1, "b": [1]})
    state["b"] = [2]
    assert parsed(await anext(events)) == ("change", {"b": [2]})
    await events.aclose()
    assert feed.readers == 0


async def test_a_reader_that_pauses_skips_states_and_holds_up_nobody() -> None:
    state = {"n": 0}
    feed = Feed(lambda: dict(state))
    slow, quick = feed.events(), feed.events()
    await anext(slow)
    await anext(quick)
    for number in (1, 2, 3):
        state["n"] = number
        assert parsed(await anext(quick)) == ("change", {"n": number})
    assert parsed(await anext(slow)) == ("change", {"n": 3})


async def test_readers_share_what_was_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 60.0)
    looks: list[float] = []

    def look() -> dict[str, Any]:
        looks.append(time.monotonic())
        return {"a": 1}

    feed = Feed(look)
    for events in [feed.events() for _ in range(5)]:
        await anext(events)
    assert len(looks) == 1


async def test_nobody_is_looked_for_when_nobody_reads() -> None:
    feed = Feed(lambda: pytest.fail("looked"))
    await asyncio.sleep(0.05)
    assert feed.readers == 0


async def test_a_state_that_is_dear_to_look_up_is_looked_up_less_often() -> None:
    def look() -> dict[str, Any]:
        time.sleep(0.02)
        return {"a": time.monotonic()}

    feed = Feed(look)
    await anext(feed.events())
    assert feed._pause_s >= 20 * 0.02


async def test_closing_ends_the_events_of_all_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 60.0)
    feed = Feed(lambda: {"a": 1})

    read: list[list[bytes]] = [[], [], []]

    async def read_into(messages: list[bytes]) -> None:
        async for message in feed.events():
            messages.append(message)

    readers = [asyncio.create_task(read_into(messages)) for messages in read]
    while not all(read):
        await asyncio.sleep(0.001)
    feed.close()
    await asyncio.wait_for(asyncio.gather(*readers), 60)
    assert [len(messages) for messages in read] == [1, 1, 1]


async def test_a_quiet_reader_is_told_that_the_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALIVE_S", 0.02)
    events = Feed(lambda: {"a": 1}).events()
    await anext(events)
    assert await anext(events) == b": nothing new\n\n"


async def test_too_many_readers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_READERS", 1)
    feed = Feed(lambda: {"a": 1})
    first = feed.events()
    await anext(first)
    with pytest.raises(TooManyReaders, match="1 readers"):
        await anext(feed.events())
    await first.aclose()
    await anext(feed.events())
