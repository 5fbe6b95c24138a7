"""Hosts that are newer than those we can run: what their source is known to look like."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from comfy_parallel import patches
from comfy_parallel.patching.patch_set import PatchSet, judge, survey
from comfy_parallel.patching.scan import unknown_globals
from comfy_parallel.patching.sources import Checkout
from comfy_parallel.slots import pool
from comfy_parallel.slots.slot import Slot, entered
from tests.fakes import make_slots
from tests.unit.conftest import MakeModule

PREFETCH = '''
import threading
import weakref

PREFETCH_QUEUES = []
MALLOC_GRAPHS = {}
MALLOC_GRAPH_BREAKS = 0
MALLOC_GRAPH_ROGUES = 0
MALLOC_GRAPH_USED = False
ACTIVE_PREFETCH_RING = None
PREFETCH_RING_MODULES = weakref.WeakSet()

class Pause:
    """Asks for the thread's own graph, as the host's context managers do."""
    def __enter__(self):
        return MALLOC_GRAPHS.get(threading.get_ident())

def graph_begin():
    global MALLOC_GRAPH_USED
    MALLOC_GRAPHS[threading.get_ident()] = "graph"
    MALLOC_GRAPH_USED = True

def graph_break():
    global MALLOC_GRAPH_BREAKS, MALLOC_GRAPH_ROGUES
    MALLOC_GRAPH_BREAKS += 1
    MALLOC_GRAPH_ROGUES += 1

def prefetch_ring_begin(module, device, cache, enabled):
    global ACTIVE_PREFETCH_RING
    PREFETCH_RING_MODULES.add(module)
    ACTIVE_PREFETCH_RING = module
    return module

def cleanup():
    global PREFETCH_QUEUES, MALLOC_GRAPH_BREAKS, MALLOC_GRAPH_ROGUES, MALLOC_GRAPH_USED, ACTIVE_PREFETCH_RING
    seen = MALLOC_GRAPH_BREAKS, MALLOC_GRAPH_ROGUES, MALLOC_GRAPH_USED, ACTIVE_PREFETCH_RING, len(PREFETCH_RING_MODULES)
    PREFETCH_QUEUES, MALLOC_GRAPH_BREAKS, MALLOC_GRAPH_ROGUES = [], 0, 0
    MALLOC_GRAPH_USED, ACTIVE_PREFETCH_RING = False, None
    return seen
'''


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


def patched(*targets: str) -> PatchSet:
    chosen = tuple(patch for patch in patches.ALL if patch.target.startswith(targets))
    return PatchSet(chosen, lambda reason: pytest.fail(str(reason)))


@pytest.fixture
def prefetch(make_module: MakeModule) -> Any:
    module = make_module("comfy.model_prefetch", PREFETCH)
    patch_set = patched("comfy.model_prefetch:PREFETCH", "comfy.model_prefetch:prefetch_ring")
    patch_set.install()
    yield module
    patch_set.revert()


class Module:
    """Can be referred to weakly."""


def test_the_end_of_a_node_leaves_the_other_slots_memory_graph_and_ring_alone(
    prefetch: ModuleType, slots: tuple[Slot, ...]
) -> None:
    module = Module()
    with entered(slots[0]):
        prefetch.graph_begin()
        prefetch.graph_break()
        prefetch.ACTIVE_PREFETCH_RING = module
        prefetch.PREFETCH_RING_MODULES.add(module)
    with entered(slots[1]):
        assert prefetch.cleanup() == (0, 0, False, None, 0)
    with entered(slots[0]):
        assert prefetch.cleanup() == (1, 1, True, module, 1)
        assert prefetch.Pause().__enter__() == "graph", "the graphs are kept by thread"


def test_slots_do_without_the_ring_of_which_a_process_has_one(prefetch: ModuleType, slots: tuple[Slot, ...]) -> None:
    module = Module()
    with entered(slots[0]):
        assert prefetch.prefetch_ring_begin(module, "cuda:0", [], True) is None
    assert prefetch.prefetch_ring_begin(module, "cuda:0", [], True) is module


def test_a_single_slot_keeps_the_ring(prefetch: ModuleType) -> None:
    (slot,) = make_slots("cuda:0")
    module = Module()
    with entered(slot):
        assert prefetch.prefetch_ring_begin(module, "cuda:0", [], True) is module


def test_these_globals_are_known(tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "model_prefetch.py").write_text(PREFETCH)
    assert unknown_globals(Checkout(tmp_path)) == []
    verdict = judge(survey([p for p in patches.ALL if p.module == "comfy.model_prefetch"], Checkout(tmp_path)))
    assert verdict == ([], {}, [])


# The server.

SERVER = """
class PromptServer:
    def __init__(self, loop, asset_manager):
        self.asset_manager = asset_manager
        self.workflow_metadata = {}
"""


@pytest.fixture
def server(make_module: MakeModule) -> Any:
    module = make_module("server", SERVER)
    patch_set = patched("server:PromptServer.workflow_metadata", "server:PromptServer.__init__")
    patch_set.install()
    yield module
    patch_set.revert()


def test_the_server_is_made_with_whatever_the_host_gives_it(
    server: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(pool, "_server_made", made.append)
    for given, named in ((("loop", "assets"), {}), (("loop",), {"asset_manager": "assets"})):
        assert server.PromptServer(*given, **named).asset_manager == "assets"
    assert len(made) == 2


def test_each_slots_messages_carry_the_metadata_of_its_own_job(
    server: ModuleType, slots: tuple[Slot, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_server_made", lambda server: None)
    instance = server.PromptServer("loop", "assets")
    with entered(slots[0]):
        assert instance.workflow_metadata == {}
        instance.workflow_metadata = {"job": "a"}
    with entered(slots[1]):
        assert instance.workflow_metadata == {}
        instance.workflow_metadata = {"job": "b"}
        instance.workflow_metadata = {}
    with entered(slots[0]):
        assert instance.workflow_metadata == {"job": "a"}


def test_older_servers_take_one_argument(make_module: MakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_server_made", lambda server: None)
    module = make_module("server", "class PromptServer:\n    def __init__(self, loop):\n        self.loop = loop")
    patch_set = patched("server:PromptServer.__init__")
    patch_set.install()
    assert module.PromptServer("loop").loop == "loop"
    patch_set.revert()
