"""Cache providers of packs: each slot has its own, unless the server uses it too."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from comfy_parallel.isolation.packs.copies import note_module
from comfy_parallel.isolation.packs.providers import per_slot
from comfy_parallel.isolation.packs.writes import SHARED
from comfy_parallel.slots.slot import entered
from tests.fakes import make_slots


class Provider:
    def __init__(self) -> None:
        self.running = "nothing"


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("made_up_pack")
    note_module(module, "made_up_pack")
    vars(module)[SHARED] = set()
    monkeypatch.setitem(sys.modules, "made_up_pack", module)
    return module


def test_slots_have_their_own_provider_and_keep_it(pack: ModuleType) -> None:
    pack.provider = registered = type("Kept", (Provider,), {"__module__": "made_up_pack"})()  # type: ignore[attr-defined]
    get = per_slot(lambda: (registered,))
    first, second = make_slots("cpu", "cpu")
    with entered(first):
        get()[0].running = "one"
        assert get()[0].running == "one"
    with entered(second):
        assert get()[0].running == "nothing"
    assert get() == (registered,)
    vars(pack)[SHARED] = {"provider"}
    with entered(first):
        assert get() == (registered,)


def test_a_provider_that_is_no_pack_s_stays_one() -> None:
    provider = Provider()
    with entered(make_slots("cpu")[0]):
        assert per_slot(lambda: (provider,))() == (provider,)
