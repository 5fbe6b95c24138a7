"""Fixtures for tests of pure logic: no host, no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

from comfy_parallel.slots import slot
from tests import fakes

settings.load_profile("ci")  # The same examples in every run, and as much time for each as a busy machine needs.

MakeModule = Callable[..., ModuleType]


@pytest.fixture(autouse=True)
def own_slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another's slots, or what another set outside of slots."""
    monkeypatch.setattr(slot, "_OUTSIDE", {})
    yield
    slot.set_slots(())


@pytest.fixture
def front() -> Any:
    """A front queue with two slots, `cuda:0` and `cuda:1`."""
    return fakes.make_front("cuda:0", "cuda:1")


@pytest.fixture
def make_module(monkeypatch: pytest.MonkeyPatch) -> MakeModule:
    """`make_module(name, source)` puts a module into `sys.modules` until the test ends."""

    def make(name: str, source: str, **names: Any) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, f"{name}.py", "exec"), vars(module))
        return module

    return make
