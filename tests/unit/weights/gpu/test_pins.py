"""Which driver hears of a region's memory, with a stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from comfy_parallel.weights.gpu import pins
from tests.unit.weights.device import CHUNK, Driver, Stream, stand_in_driver

SIZE = 2 * CHUNK + 100


def no_driver() -> None:
    raise AssertionError("the driver was asked")


@pytest.fixture
def memory() -> Iterator[pins.Pins]:
    fd = os.memfd_create("weights")
    os.ftruncate(fd, SIZE)
    yield pins.Pins(fd, SIZE)
    os.close(fd)


def test_memory_that_was_never_pinned_is_given_up_without_the_driver(
    monkeypatch: pytest.MonkeyPatch, memory: pins.Pins
) -> None:
    monkeypatch.setattr(pins, "_driver", no_driver)
    left = memory.read([(0, 0, SIZE)], Stream(), lambda size: False, lambda pieces: None)
    assert sum(stop - start for _, start, stop in left) == SIZE
    memory.unpin()
    memory.close()


def test_memory_that_the_driver_refused_is_given_up_without_it(
    monkeypatch: pytest.MonkeyPatch, memory: pins.Pins
) -> None:
    driver = stand_in_driver(monkeypatch)
    driver.refused = set(range(10))
    memory.read([(0, 0, SIZE)], Stream(), lambda size: True, lambda pieces: None)
    monkeypatch.setattr(driver, "cudaHostUnregister", no_driver)
    memory.unpin()


def test_the_driver_that_registered_memory_unregisters_it(monkeypatch: pytest.MonkeyPatch, memory: pins.Pins) -> None:
    """However late it goes: asking for the driver again would start CUDA where there is none."""
    first: Driver = stand_in_driver(monkeypatch)
    memory.read([(0, 0, SIZE)], Stream(), lambda size: True, lambda pieces: None)
    assert sum(first.registered.values()) == SIZE
    monkeypatch.setattr(pins, "_driver", no_driver)
    memory.unpin()
    assert first.registered == {}
