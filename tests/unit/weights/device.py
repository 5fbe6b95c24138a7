"""What stands in for CUDA where weights are pinned and copied: everything is computed on the CPU, at once."""

from __future__ import annotations

import pytest
import torch

from comfy_parallel.weights.gpu import pins

CHUNK = 4096


class Driver:
    """CUDA's registrations. `refused` are the numbers of those that it refuses."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.refused: set[int] = set()
        self.cleared = 0
        self._calls = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        assert flags == 8
        self._calls += 1
        if self._calls - 1 in self.refused:
            return 801
        assert not any(start < address + size and address < start + length for start, length in self.registered.items())
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        return 0 if self.registered.pop(address, None) else 713

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return f"error {code}"

    def clear(self) -> None:
        self.cleared += 1


class Stream:
    """Of a GPU. `queued` copies are done when it is waited for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1

    def record_event(self) -> Stream:
        return self

    def query(self) -> bool:
        return self.waits > 0


def stand_in_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """With chunks of `CHUNK` bytes."""
    driver = Driver()
    monkeypatch.setattr(pins, "_driver", lambda: driver)
    monkeypatch.setattr(pins, "_clear_error", driver.clear)
    monkeypatch.setattr(pins, "CHUNK", CHUNK)
    return driver


def stand_in_stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The current one."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return stream
