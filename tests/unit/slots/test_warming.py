"""A slot's device is used once at start, and the log says how that went."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from comfy_parallel.slots import warming
from comfy_parallel.slots.slot import Slot


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    warming.use(False)


@pytest.mark.parametrize(("is_on", "device"), [(False, "cuda:0"), (True, "cpu")])
def test_it_does_nothing(
    is_on: bool, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warming, "_use_libraries", lambda name: pytest.fail("it used the device"))
    warming.use(is_on)
    warming.warm(Slot(0, device))
    assert not caplog.records


def test_it_uses_the_libraries_of_the_slots_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used: list[str] = []
    monkeypatch.setattr(warming, "_use_libraries", used.append)
    warming.use(True)
    with caplog.at_level(logging.INFO):
        warming.warm(Slot(1, "cuda:1"))
    assert used == ["cuda:1"]
    assert "slot 1 (cuda:1): warmed up in" in caplog.text


def test_the_libraries_run_on_the_cpu_as_well() -> None:
    warming._use_libraries("cpu")


def test_a_device_that_fails_is_said_and_left_to_the_first_job(caplog: pytest.LogCaptureFixture) -> None:
    warming.use(True)
    warming.warm(Slot(0, "cuda:99"))  # There is none, so torch raises.
    assert "slot 0 (cuda:99): it could not be warmed up: " in caplog.text
