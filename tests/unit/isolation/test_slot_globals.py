"""Global names of a module that every slot has its own of."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from comfy_parallel.errors import HostMismatch
from comfy_parallel.isolation.slot_globals import ModuleProperty, SlotGlobals
from comfy_parallel.patching.engine import Fit
from comfy_parallel.patching.patch_set import PatchSet
from comfy_parallel.patching.sources import ModuleSource
from comfy_parallel.slots.slot import Slot, current_slot, entered
from tests.fakes import in_thread, make_slots
from tests.unit.conftest import MakeModule

SOURCE = '''
import functools

STREAMS = {"initial": 0}
TOTAL = 0
LIMIT = 100
OTHER = "module"

def add(key, value=1, *, twice=False):
    """Adds."""
    global TOTAL
    STREAMS[key] = value
    TOTAL += value * (2 if twice else 1)
    return TOTAL

def total():
    return TOTAL

def limit():
    return LIMIT

def replace_streams():
    global STREAMS
    STREAMS = {}

def keys():
    for key in STREAMS:
        yield key

async def later():
    return TOTAL

def adder():
    def inner():
        global TOTAL
        TOTAL += 10
        return TOTAL
    return inner

def summed():
    return sum(value + TOTAL for value in STREAMS.values())

def make_user():
    held = {"count": 0}
    def counting():
        held["count"] += 1
        return TOTAL, held["count"]
    return counting

counting = make_user()

def with_builtins_and_others():
    return len(STREAMS), OTHER, unrelated()

def missing():
    return TOTAL, NOWHERE

def unrelated():
    return OTHER

def names_now():
    return globals()["TOTAL"], globals()["OTHER"]
'''


def slot_globals(*names: str, **options: Any) -> SlotGlobals:
    return SlotGlobals(target=f"fake_host:{names[0]}", names=names, why="a test", until="never", **options)


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def host(make_module: MakeModule) -> ModuleType:
    return make_module("fake_host", SOURCE)


@pytest.fixture
def patch_set(host: ModuleType) -> PatchSet:
    made = PatchSet(
        (slot_globals("STREAMS", "TOTAL", "LIMIT", "NOT_IN_THIS_HOST", initial={"LIMIT": lambda limit: limit / 2}),),
        lambda mismatch: pytest.fail(str(mismatch)),
    )
    made.install()
    return made


pytestmark = pytest.mark.usefixtures("patch_set")


def totals(host: ModuleType, slots: tuple[Slot, ...]) -> list[int]:
    """The total of each slot, then outside; by the module's function and by its attribute."""
    seen = []
    for slot in (*slots, None):
        with entered(slot):
            assert host.total() == host.TOTAL
            seen.append(host.TOTAL)
    return seen


def test_each_slot_has_its_own_values(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        assert host.add("a", 5) == 5
        assert host.add("b", 1) == 6
    with entered(slots[1]):
        assert host.add("c", 7) == 7
    assert totals(host, slots) == [6, 7, 0]
    with entered(slots[0]):
        assert list(host.STREAMS) == ["initial", "a", "b"]
    with entered(slots[1]):
        assert list(host.STREAMS) == ["initial", "c"]
    assert host.STREAMS == {"initial": 0}


def test_outside_of_slots_the_module_is_as_it_was(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    assert host.add("a", 3) == 3
    assert vars(host)["STREAMS"] == host.STREAMS == {"initial": 0, "a": 3}
    assert totals(host, slots) == [0, 0, 3]


def test_a_slot_starts_from_the_initial_value(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    host.add("outside", 3)
    with entered(slots[0]):
        assert host.STREAMS == {"initial": 0}
        assert host.limit() == host.LIMIT == 50
    assert host.limit() == 100


def test_a_name_can_be_bound_anew(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        host.replace_streams()
        assert host.STREAMS == {}
    assert host.STREAMS == {"initial": 0}


def test_other_modules_read_and_write_the_slots_value(
    host: ModuleType, slots: tuple[Slot, ...], make_module: MakeModule
) -> None:
    user = make_module(
        "fake_user",
        "import fake_host\ndef read(): return fake_host.TOTAL\ndef write(value): fake_host.TOTAL = value\n",
    )
    with entered(slots[1]):
        user.write(9)
        assert user.read() == host.total() == 9
    user.write(4)
    assert user.read() == host.total() == 4
    assert totals(host, slots) == [0, 9, 4]


def test_functions_copied_into_other_modules_before_are_the_slots_too(
    make_module: MakeModule, slots: tuple[Slot, ...], patch_set: PatchSet
) -> None:
    patch_set.revert()
    host = make_module("fake_host", SOURCE)
    user = make_module("fake_user", "from fake_host import add, total")
    patch_set.install()
    with entered(slots[0]):
        user.add("a", 5)
        assert user.total() == 5
    assert (user.total(), host.total()) == (0, 0)
    patch_set.revert()


def test_a_generator_keeps_the_slot_it_was_made_in(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        host.add("a")
        generator = host.keys()
    with entered(slots[1]):
        assert list(generator) == ["initial", "a"]
        assert list(host.keys()) == ["initial"]


def test_comprehensions_and_inner_functions_use_the_slots_values(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        host.add("a", 5)
        assert host.summed() == 15
        inner = host.adder()
        assert inner() == 15
    assert totals(host, slots) == [15, 0, 0]
    assert host.summed() == 0


def test_coroutines(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        host.add("a", 5)
        assert asyncio.run(host.later()) == 5
    assert asyncio.run(host.later()) == 0


def test_closures_are_shared_and_globals_are_not(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        host.add("a", 5)
        assert host.counting() == (5, 1)
    with entered(slots[1]):
        assert host.counting() == (0, 2)
    assert host.counting() == (0, 3)


def test_defaults_and_keyword_defaults(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        assert host.add("a") == 1
        assert host.add("a", twice=True) == 3
        assert host.add(key="a", value=2, twice=True) == 7


def test_builtins_and_all_other_globals_are_found(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        host.OTHER = "changed for all"
        assert host.with_builtins_and_others() == (1, "changed for all", "changed for all")
        assert host.names_now() == (0, "changed for all")
        with pytest.raises(NameError, match="NOWHERE"):
            host.missing()
    assert host.OTHER == "changed for all"


def test_functions_look_as_before(host: ModuleType) -> None:
    assert (host.add.__name__, host.add.__doc__, host.add.__module__) == ("add", "Adds.", "fake_host")
    assert list(inspect.signature(host.add).parameters) == ["key", "value", "twice"]


def test_functions_that_use_none_of_the_names_are_left_alone(host: ModuleType) -> None:
    assert not hasattr(host.unrelated, "__wrapped__")
    assert hasattr(host.total, "__wrapped__")


def test_two_slots_at_once_lose_nothing(host: ModuleType, slots: tuple[Slot, ...]) -> None:
    rounds = 2000
    both = threading.Barrier(2)

    def work(slot: Slot) -> int:
        with entered(slot):
            assert current_slot() is slot
            both.wait(60)
            for _ in range(rounds):
                host.add("a")
            total: int = host.total()
            return total

    assert [future.result(10) for future in [in_thread(work, slot) for slot in slots]] == [rounds, rounds]
    assert host.total() == 0


def test_reverting_gives_the_module_back(make_module: MakeModule, slots: tuple[Slot, ...]) -> None:
    host = make_module("fake_host", SOURCE)
    before, kind = dict(vars(host)), type(host)
    patch_set = PatchSet((slot_globals("STREAMS", "TOTAL"), slot_globals("LIMIT")), lambda mismatch: None)
    for _ in range(3):
        patch_set.install()
        assert type(host) is not kind
        with entered(slots[0]):
            host.LIMIT = 1
            host.add("a")
        patch_set.revert()
        assert type(host) is kind
        assert vars(host).keys() == before.keys()
        assert all(vars(host)[name] is value for name, value in before.items())
        with entered(slots[0]):
            assert (host.limit(), host.total()) == (100, 0)


def test_a_class_changed_after_us_is_not_reverted(host: ModuleType, patch_set: PatchSet) -> None:
    ours = type(host)
    host.__class__ = type("Theirs", (ours,), {})
    with pytest.raises(HostMismatch, match="changed its class"):
        patch_set.revert()
    host.__class__ = ours
    patch_set.revert()


# Whether it fits.


def source(folder: Path, text: str) -> ModuleSource:
    return ModuleSource(text)


def test_names_that_the_host_does_not_have_are_left_out(host: ModuleType, tmp_path: Path) -> None:
    patch = slot_globals("NOT_IN_THIS_HOST", "TOTAL")
    assert patch.check_source(source(tmp_path, SOURCE)) is Fit.FITS
    assert patch.check_live(host) is Fit.FITS


def test_with_none_of_its_names_it_does_not_fit(host: ModuleType, tmp_path: Path) -> None:
    patch, optional = slot_globals("GONE", "AWAY"), slot_globals("GONE", optional=True)
    for check in (lambda it: it.check_live(host), lambda it: it.check_source(source(tmp_path, SOURCE))):
        assert check(optional) is Fit.ABSENT
        with pytest.raises(HostMismatch, match="fake_host:GONE: not found"):
            check(patch)
    assert list(optional.apply(host)) == []


@pytest.mark.parametrize(
    "text",
    [
        "TOTAL = 0\nclass User:\n    def use(self):\n        return TOTAL\n",
        "TOTAL = 0\nclass User:\n    start = TOTAL\n",
        "TOTAL = 0\nif True:\n    class User:\n        def use(self):\n            return TOTAL\n",
    ],
    ids=["method", "class body", "class in if"],
)
def test_a_class_that_uses_a_name_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(HostMismatch, match=r"fake_host:User: its methods use \['TOTAL'\]"):
        slot_globals("TOTAL").check_source(source(tmp_path, text))


def test_a_function_that_sets_another_global_is_refused(tmp_path: Path) -> None:
    text = "TOTAL = 0\nOTHER = 0\ndef use():\n    global OTHER\n    OTHER = TOTAL\n"
    with pytest.raises(HostMismatch, match=r"fake_host:use: .*OTHER"):
        slot_globals("TOTAL").check_source(source(tmp_path, text))
    assert slot_globals("TOTAL", "OTHER").check_source(source(tmp_path, text)) is Fit.FITS


# One computed attribute.


def test_a_module_property_is_computed_from_the_initial_value(make_module: MakeModule) -> None:
    module = make_module("fake_flag", "flag = 5")
    written: list[Any] = []
    patch = ModuleProperty(
        target="fake_flag:flag",
        wrap=lambda initial: property(lambda module: initial + 1, lambda module, value: written.append(value)),
        why="a test",
        until="never",
    )
    (undo,) = patch.apply(module)
    module.flag = 7
    assert (module.flag, written) == (6, [7])
    undo.revert()
    assert module.flag == 5
    assert type(module) is ModuleType
