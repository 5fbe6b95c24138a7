"""Calls that act on a whole device wait while somebody records there, and only then."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from comfy_parallel.slots import device, gates
from tests.fakes import in_thread, make_slots

WAIT_S = 60.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    make_slots("cuda:1", "cuda:1")
    return []


@contextmanager
def recording(index: int) -> Any:
    """Another thread records on this device in the body."""
    started, end = threading.Event(), threading.Event()

    def record() -> None:
        with gates.recording_on(index):
            started.set()
            assert end.wait(WAIT_S)

    recorder = in_thread(record)
    assert started.wait(WAIT_S)
    try:
        yield
    finally:
        end.set()
        recorder.result(WAIT_S)


def is_waiting(future: Future[Any]) -> bool:
    return future in wait([future], timeout=0.2).not_done


@pytest.mark.parametrize("given", [(), (None,), (1,), ("cuda:1",), ("cuda",), (torch.device("cuda", 1),)])
def test_waiting_for_a_device_waits_for_the_recording_there(calls: list[Any], given: tuple[Any, ...]) -> None:
    synchronize = gates.wait_for_recording(calls.append)
    with recording(0):
        in_thread(synchronize, *given).result(WAIT_S)
    with recording(1):
        waiting = in_thread(synchronize, *given)
        assert is_waiting(waiting)
    waiting.result(WAIT_S)
    assert calls == [given[0] if given else None] * 2


@pytest.mark.parametrize("index", [0, 1])
def test_emptying_the_cache_waits_for_recordings_everywhere(calls: list[Any], index: int) -> None:
    empty_cache = device.empty_own_cache(lambda: calls.append("emptied"))
    with recording(index):
        waiting = in_thread(empty_cache)
        assert is_waiting(waiting)
        assert calls == []
    waiting.result(WAIT_S)
    assert calls == ["emptied"]


def test_two_recordings_on_one_device_come_in_turn(calls: list[Any]) -> None:
    def record(index: int) -> None:
        with gates.recording_on(index):
            calls.append(index)

    with recording(1):
        waiting = in_thread(record, 1)
        in_thread(record, 0).result(WAIT_S)
        assert is_waiting(waiting)
    waiting.result(WAIT_S)
    assert calls == [0, 1]


def test_who_records_is_let_through_to_torchs_own_refusal(calls: list[Any]) -> None:
    synchronize = gates.wait_for_recording(calls.append)
    empty_cache = device.empty_own_cache(lambda: calls.append("emptied"))

    def record() -> None:
        with gates.recording_on(1):
            synchronize()
            synchronize(0)
            empty_cache()

    with recording(0):
        in_thread(record).result(WAIT_S)
    assert calls == [None, 0, "emptied"]
