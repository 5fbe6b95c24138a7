"""What is put back when the scheduler does not stay."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from comfy_parallel.errors import HostMismatch

install = importlib.import_module("comfy_parallel.install")  # the package's `install` is the function


def test_a_host_that_cannot_be_patched_gets_its_allocator_back(monkeypatch: pytest.MonkeyPatch) -> None:
    put_back: list[bool] = []
    monkeypatch.setattr(install, "_put_back_allocator", lambda: put_back.append(True))
    monkeypatch.setattr("comfy_parallel.host.facts.directory", lambda: Path("host"))
    for _ in range(2):
        install._give_up(HostMismatch("a function that is not there"))
    assert put_back == [True]
