"""Packs that import their own files by other ways than the host does, and take them out of `sys.modules`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Load = Callable[..., Any]
InSlot = Callable[..., Any]

PACK = """
    import os
    import sys
    here = os.path.dirname(os.path.HOW(__file__))
    sys.path.insert(0, here)
    import hidden_store as store
    sys.path.remove(here)
    del sys.modules['hidden_store']
    def put(value):
        store.last = value
        store.rows[0] = value
        store.Store.last = value
        store.state.last = value
    def get():
        return [store.last, store.rows[0], store.Store.last, store.state.last]
    def read():
        return store.read()
"""
STORE = """
    last = 0
    rows = [0]
    class Store:
        last = 0
    class State:
        def __init__(self):
            self.last = 0
    state = State()
    def read():
        return [last, rows[0], Store.last, state.last]
"""


@pytest.mark.parametrize("how", ["abspath", "realpath"])
@pytest.mark.parametrize("is_link", [False, True])
def test_each_slot_has_its_own_of_what_they_keep(
    load: Load, in_slot: InSlot, tmp_path: Path, how: str, is_link: bool
) -> None:
    link_to = tmp_path / "elsewhere" if is_link else None
    pack = load(PACK.replace("HOW", how), link_to=link_to, hidden_store=STORE)
    assert "hidden_store" not in sys.modules
    for slot in (0, 1):
        in_slot(slot, pack.put, slot + 1)
    for look in (pack.get, pack.read):
        assert [in_slot(slot, look) for slot in (0, 1, None)] == [[1] * 4, [2] * 4, [0] * 4]
