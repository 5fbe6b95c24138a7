"""Garbage is collected for certain."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest

from comfy_parallel.slots import garbage

LONG_S = 60.0


class Cycle:
    """Garbage once nobody refers to it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collecting() -> Iterator[threading.Event]:
    """A thread is in the middle of a collection; it goes on when the event is set."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(phase: str, info: dict[str, Any]) -> None:
        if threading.current_thread() is thread and phase == "stop":
            begun.set()
            go_on.wait(LONG_S)

    thread = threading.Thread(target=gc.collect)
    gc.callbacks.append(wait)
    thread.start()
    begun.wait(LONG_S)
    yield go_on
    go_on.set()
    thread.join()
    gc.callbacks.remove(wait)


def test_it_waits_for_a_collection_on_another_thread(collecting: threading.Event) -> None:
    gone = ref(Cycle())
    gc.collect()
    assert gone() is not None, "this Python collects on two threads at once, so the module is not needed"
    threading.Timer(0.2, collecting.set).start()
    garbage.collect()
    assert gone() is None


def test_it_says_that_it_waited_in_vain(
    collecting: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(garbage, "_LONGEST_WAIT_S", 0.05)
    with caplog.at_level(logging.WARNING):
        garbage.collect()
    assert "was not collected" in caplog.text
