"""What the garbage collector calls is no part of a forward that is recorded."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from comfy_parallel.graphs.collection import no_collection
from comfy_parallel.graphs.watch import watching


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The phases of each collection, as a callback of a node pack's hears of them; there is one every few objects."""
    heard: list[str] = []
    pack = {"__name__": "a_pack", "heard": heard}
    exec("def callback(phase, _info): heard.append(phase)", pack)
    callback, threshold = pack["callback"], gc.get_threshold()
    gc.callbacks.append(callback)  # type: ignore[arg-type]
    gc.set_threshold(1)
    yield heard
    gc.set_threshold(*threshold)
    gc.callbacks.remove(callback)  # type: ignore[arg-type]


def allocate() -> None:
    kept: list[list[int]] = []
    for _ in range(1000):
        kept.append([])


def test_a_packs_callback_does_not_run_while_a_forward_is_watched(collections: list[str]) -> None:
    allocate()
    assert collections
    with watching(torch.device("cpu"), []):
        collections.clear()
        kept: list[list[int]] = []
        for _ in range(1000):  # not by a function of this file, which is no library's
            kept.append([])
        seen = len(collections)
    assert not seen
    allocate()
    assert collections


def test_it_rests_until_the_last_recording_has_ended(collections: list[str]) -> None:
    with no_collection():
        with no_collection():
            pass
        collections.clear()
        allocate()
        assert not collections
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_stays_off_for_who_has_switched_it_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
