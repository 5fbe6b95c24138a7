"""What a host sets on modules when it loads them, set again without its seeing them: with a small host."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

from comfy_parallel.slots.slot import Slot, entered
from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import marks, plans, transfers
from comfy_parallel.weights.gpu.plans import Plan
from tests.fakes import make_slots
from tests.unit.weights.device import stand_in_stream

pytestmark = pytest.mark.timeout(30)

CPU = torch.device("cpu")
BLOCKS = 5
SIZE = 4 * 4 * 4  # of a block's weight, in bytes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


def nothing() -> None:
    pass


def no_room() -> None:
    raise RuntimeError("no room")


class Patcher:
    """Loads as ComfyUI's does: it lists modules, and then sets attributes on them."""

    def __init__(self, model: nn.Module, *, is_planned: bool = False) -> None:
        self.model = model
        self.is_planned = is_planned
        self.patches: dict[str, Any] = {}
        self.casts = False
        self.seen: list[str] = []
        self.check: Callable[[], None] = nothing
        self.functions: list[Any] = []

    def _load_list(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self.model.named_modules() if name]

    def load(self) -> None:
        listed = self._load_list()
        self.seen = [name for name, _ in listed]
        self.check()
        for name, module in listed:
            module.functions = [*self.functions, *self.patches.get(f"{name}.weight", [])]
            module.is_loaded = True
            module.casts = self.casts

    def unload(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "is_loaded"):
                del module.is_loaded


def whole_load(patcher: Patcher, device: torch.device = CPU) -> AbstractContextManager[None]:
    """Where it is planned, nothing is copied before: these weights are not shared."""
    plan = None
    if patcher.is_planned:
        with transfers.complete():
            plan, _ = plans.load_ahead(SimpleNamespace(may_pin=None), patcher.model, device, patcher.patches)  # type: ignore[arg-type]
    return marks.whole_load(patcher, loading.named_modules_of(patcher.model), device, plan)


def load(patcher: Patcher) -> list[str]:
    """The names of the modules that the host sees."""
    with whole_load(patcher):
        patcher.load()
    return patcher.seen


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in model.named_modules()
    }


@pytest.fixture
def slot() -> Slot:
    return make_slots("cpu")[0]


@pytest.fixture(params=[False, True], ids=["", "planned"])
def patcher(request: pytest.FixtureRequest, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> Patcher:
    """Of a model that has been loaded and unloaded often enough to be known."""
    stand_in_stream(monkeypatch)
    made = Patcher(nn.Sequential(*(Block() for _ in range(BLOCKS))), is_planned=request.param)
    for _ in range(2):
        with entered(slot):
            assert len(load(made)) == BLOCKS
        made.unload()
    return made


def test_one_module_stands_for_those_that_are_known(patcher: Patcher, slot: Slot) -> None:
    with entered(slot):
        assert load(patcher) == ["4"]


def test_the_others_have_what_the_host_would_set(patcher: Patcher, slot: Slot) -> None:
    with entered(slot):
        load(patcher)
    found = attributes(patcher.model)
    patcher.unload()
    patcher.load()
    assert len(patcher.seen) == BLOCKS
    assert found == attributes(patcher.model)
    assert found["0"] == {"training": True, "functions": [], "is_loaded": True, "casts": False}


def test_each_module_gets_its_own_list(patcher: Patcher, slot: Slot) -> None:
    with entered(slot):
        load(patcher)
    lists = [module.functions for module in patcher.model]
    assert len({id(found) for found in lists}) == BLOCKS


def test_the_one_that_stands_for_the_others_is_as_large_as_they_are(patcher: Patcher, slot: Slot) -> None:
    with entered(slot):
        with whole_load(patcher):
            patcher.load()
            sizes = [marks.size_beside(module) for module in patcher.model]
        assert sizes == [0, 0, 0, 0, 4 * SIZE]
        assert [marks.size_beside(module) for module in patcher.model] == [0] * BLOCKS


def test_sizes_that_are_known_are_not_asked_for(patcher: Patcher, slot: Slot) -> None:
    """And neither is where those modules are, as they have been copied just now."""
    patcher.model[1].to("meta")
    named = loading.named_modules_of(patcher.model)
    with entered(slot), marks.whole_load(patcher, named, CPU, Plan(named, {"1": 7}, (), [])):
        patcher.load()
        assert patcher.seen == ["4"]
        assert marks.size_beside(patcher.model[4]) == 7 + 3 * SIZE


def test_what_is_left_to_move_is_what_the_host_sees(patcher: Patcher, slot: Slot) -> None:
    model = patcher.model
    with entered(slot), whole_load(patcher):
        assert marks.left_to_move(model, CPU) == [model, model[4]]
        assert marks.left_to_move(model, torch.device("meta")) is None
        assert marks.left_to_move(model[0], CPU) is None
    with entered(slot):
        assert marks.left_to_move(model, CPU) is None


def nothing_happens(_patcher: Patcher) -> None:
    pass


def patch(patcher: Patcher) -> None:
    patcher.patches = {"1.weight": ["a LoRA"]}


def set_an_attribute(patcher: Patcher) -> None:
    patcher.model[1].seen = True


def set_another_value(patcher: Patcher) -> None:
    patcher.model[1].casts = True


def fill_a_list(patcher: Patcher) -> None:
    patcher.model[1].functions.append(print)


def set_a_tensor(patcher: Patcher) -> None:
    patcher.model[1].casts = torch.zeros(3)


def change_its_class(patcher: Patcher) -> None:
    patcher.model[1].__class__ = type("Other", (Block,), {})


def add_a_parameter(patcher: Patcher) -> None:
    patcher.model[1].bias = nn.Parameter(torch.zeros(4))


def move_elsewhere(patcher: Patcher) -> None:
    patcher.model[1].to("meta")


def replace_it(patcher: Patcher) -> None:
    patcher.model[1] = Block()


@pytest.mark.parametrize(
    "change",
    [
        patch,
        set_an_attribute,
        set_another_value,
        fill_a_list,
        set_a_tensor,
        change_its_class,
        add_a_parameter,
        move_elsewhere,
        replace_it,
    ],
    ids=lambda change: change.__name__,
)
def test_what_is_not_as_it_was_is_left_to_the_host(
    patcher: Patcher, slot: Slot, change: Callable[[Patcher], None]
) -> None:
    change(patcher)
    with entered(slot):
        assert load(patcher) == ["1", "4"]


def test_what_has_changed_is_known_the_next_time(patcher: Patcher, slot: Slot) -> None:
    for change, expected in ((set_an_attribute, ["1", "4"]), (nothing_happens, ["4"]), (nothing_happens, ["4"])):
        change(patcher)
        with entered(slot):
            assert load(patcher) == expected
        patcher.unload()


def test_modules_that_are_all_the_same_again_are_not_looked_at_one_by_one(
    patcher: Patcher, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    with entered(slot):
        load(patcher)
        patcher.unload()
        monkeypatch.setattr(marks, "_same", lambda *args: {})
        assert load(patcher) == (["4"] if patcher.is_planned else list("01234"))


def test_an_attribute_that_cannot_be_compared_may_not_be_swapped_for_another(patcher: Patcher, slot: Slot) -> None:
    module = patcher.model[1]
    module.hook = print
    for expected in (["1", "4"], ["4"], ["4"]):
        with entered(slot):
            assert load(patcher) == expected
        patcher.unload()
    del module.hook
    module.other = print
    with entered(slot):
        assert load(patcher) == ["1", "4"]


def test_one_that_is_never_there_hinders_nobody(patcher: Patcher, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    patcher.model[2].register_buffer("sigmas", torch.zeros(3, device="meta"))
    for _ in range(3):
        with entered(slot):
            assert load(patcher) == ["2", "4"]
        patcher.unload()
    monkeypatch.setattr(marks, "_same", lambda *args: {})
    with entered(slot):
        assert load(patcher) == (["2", "4"] if patcher.is_planned else list("01234"))


def test_a_module_that_is_never_the_same_leaves_the_others_alone(patcher: Patcher, slot: Slot) -> None:
    for number in range(4):
        patcher.model[2].seen = number
        with entered(slot):
            assert load(patcher) == ["2", "4"]
        patcher.unload()


def test_what_is_added_to_a_list_later_is_not_set_again(patcher: Patcher, slot: Slot) -> None:
    with entered(slot):
        load(patcher)
    for module in patcher.model:
        module.functions.append("a LoRA")
    for module in patcher.model:
        module.functions = []
    patcher.unload()
    with entered(slot):
        assert load(patcher) == ["4"]
    assert [module.functions for module in patcher.model] == [[]] * BLOCKS


@pytest.mark.parametrize("name", ["_apply", "to"])
def test_a_model_with_moves_of_its_own_is_left_to_the_host(slot: Slot, name: str) -> None:
    own = type("Own", (Block,), {name: lambda self, *args, **kwargs: getattr(Block, name)(self, *args, **kwargs)})
    patcher = Patcher(nn.Sequential(Block(), own()))
    for _ in range(4):
        with entered(slot):
            assert load(patcher) == ["0", "1"]
        patcher.unload()


def test_with_another_setting_all_are_left_to_the_host(patcher: Patcher, slot: Slot) -> None:
    patcher.casts = True
    with entered(slot):
        assert len(load(patcher)) == BLOCKS
    assert all(module.casts for module in patcher.model)


def test_on_another_device_all_are_left_to_the_host(patcher: Patcher, slot: Slot) -> None:
    with entered(slot), whole_load(patcher, torch.device("meta")):
        patcher.load()
    assert len(patcher.seen) == BLOCKS


def test_what_cannot_be_set_again_is_always_left_to_the_host(patcher: Patcher, slot: Slot) -> None:
    patcher.functions = [print]
    for _ in range(4):
        with entered(slot):
            assert len(load(patcher)) == BLOCKS
        patcher.unload()


def test_the_host_sees_all_modules_again_afterwards(patcher: Patcher, slot: Slot) -> None:
    with entered(slot):
        load(patcher)
    assert len(patcher._load_list()) == BLOCKS
    assert "_load_list" not in vars(patcher)
    assert "named_modules" not in vars(patcher.model)


def test_and_within_the_load_once_it_has_listed_them(patcher: Patcher, slot: Slot) -> None:
    with entered(slot), whole_load(patcher):
        assert len(patcher._load_list()) == 1
        assert len(patcher._load_list()) == BLOCKS
        assert len(list(patcher.model.named_modules())) == 1 + BLOCKS


def test_a_load_that_fails_leaves_nothing_behind(patcher: Patcher, slot: Slot) -> None:
    patcher.check = no_room
    with entered(slot):
        with pytest.raises(RuntimeError, match="no room"):
            load(patcher)
        assert marks.left_to_move(patcher.model, CPU) is None
    assert "_load_list" not in vars(patcher)
    patcher.check = nothing
    patcher.unload()
    with entered(slot):
        assert load(patcher) == ["4"]


def test_a_host_that_lists_nothing_is_left_alone(patcher: Patcher, slot: Slot) -> None:
    with entered(slot), whole_load(patcher):
        pass
    assert "_load_list" not in vars(patcher)
    assert not hasattr(patcher.model[0], "is_loaded")


def test_a_model_that_nobody_uses_any_more_is_let_go(patcher: Patcher) -> None:
    model, block = ref(patcher.model), ref(patcher.model[0])
    del patcher.model
    gc.collect()
    assert model() is None
    assert block() is None
