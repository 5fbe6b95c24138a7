"""The list of loaded models: each slot's own inside it, all of them outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from comfy_parallel.isolation.loaded_models import LoadedModels, drop_dead, models_of
from comfy_parallel.slots.slot import Slot, entered
from tests.fakes import make_slots


class FakeLoadedModel:
    """As the host's LoadedModel: a weak reference to the model, None before the first load."""

    def __init__(self, name: str, real_model: Callable[[], object] | None = None) -> None:
        self.name = name
        self.real_model = real_model

    def __repr__(self) -> str:
        return self.name


@pytest.fixture
def slots() -> tuple[Slot, ...]:
    return make_slots("cuda:0", "cuda:1")


@pytest.fixture
def models(slots: tuple[Slot, ...]) -> LoadedModels:
    """Slot 0 holds a and b, slot 1 holds c, and d was loaded outside of slots."""
    loaded = LoadedModels(["d"])
    for slot, names in zip(slots, ("ab", "c"), strict=True):
        with entered(slot):
            loaded.extend(names)
    return loaded


def contents(models: LoadedModels, slots: tuple[Slot, ...]) -> list[str]:
    """What each slot sees, then what is seen outside."""
    seen = []
    for slot in (*slots, None):
        with entered(slot):
            seen.append("".join(models))
    return seen


def test_a_slot_sees_its_own_and_the_outside_sees_all(models: LoadedModels, slots: tuple[Slot, ...]) -> None:
    assert contents(models, slots) == ["ab", "c", "abcd"]


def test_reading_in_a_slot(models: LoadedModels, slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        assert (len(models), models[0], models[-1], models[::-1]) == (2, "a", "b", ["b", "a"])
        assert ("a" in models, "c" in models) == (True, False)
        assert (models.index("b"), models.count("a"), list(reversed(models))) == (1, 1, ["b", "a"])
        assert models == ["a", "b"]
        assert models.copy() == ["a", "b"]
        assert repr(models) == "['a', 'b']"
        with pytest.raises(IndexError):
            models[2]
        with pytest.raises(ValueError):
            models.index("c")


def test_reading_outside(models: LoadedModels) -> None:
    assert (len(models), models[2], models[-1], models[1:3]) == (4, "c", "d", ["b", "c"])
    assert ("c" in models, models.index("c"), list(reversed(models))) == (True, 2, ["d", "c", "b", "a"])
    assert bool(models)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda models: models.append("x"), ["abx", "c", "abxcd"]),
        (lambda models: models.insert(0, "x"), ["xab", "c", "xabcd"]),
        (lambda models: models.extend("xy"), ["abxy", "c", "abxycd"]),
        (lambda models: models.__iadd__("x"), ["abx", "c", "abxcd"]),
        (lambda models: models.pop(), ["a", "c", "acd"]),
        (lambda models: models.pop(0), ["b", "c", "bcd"]),
        (lambda models: models.remove("a"), ["b", "c", "bcd"]),
        (lambda models: models.reverse(), ["ba", "c", "bacd"]),
        (lambda models: models.clear(), ["", "c", "cd"]),
        (lambda models: models.__setitem__(1, "x"), ["ax", "c", "axcd"]),
        (lambda models: models.__setitem__(slice(None), "xyz"), ["xyz", "c", "xyzcd"]),
        (lambda models: models.__delitem__(0), ["b", "c", "bcd"]),
        (lambda models: models.__delitem__(slice(None)), ["", "c", "cd"]),
    ],
    ids=[
        "append",
        "insert",
        "extend",
        "+=",
        "pop",
        "pop 0",
        "remove",
        "reverse",
        "clear",
        "[]=",
        "[:]=",
        "del",
        "del :",
    ],
)
def test_changes_in_a_slot_are_its_own(
    models: LoadedModels, slots: tuple[Slot, ...], change: Callable[[Any], Any], seen: list[str]
) -> None:
    with entered(slots[0]):
        change(models)
    assert contents(models, slots) == seen


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda models: models.pop(0), ["b", "c", "bcd"]),
        (lambda models: models.pop(2), ["ab", "", "abd"]),
        (lambda models: models.pop(), ["ab", "c", "abc"]),
        (lambda models: models.remove("c"), ["ab", "", "abd"]),
        (lambda models: models.__delitem__(-3), ["a", "c", "acd"]),
        (lambda models: models.__delitem__(slice(1, 3)), ["a", "", "ad"]),
        (lambda models: models.__delitem__(slice(None)), ["", "", ""]),
        (lambda models: models.__delitem__(slice(None, None, -2)), ["a", "c", "ac"]),
        (lambda models: models.clear(), ["", "", ""]),
        (lambda models: models.__setitem__(2, "x"), ["ab", "x", "abxd"]),
        (lambda models: models.append("x"), ["ab", "c", "abcdx"]),
    ],
    ids=["pop 0", "pop 2", "pop", "remove", "del", "del 1:3", "del :", "del ::-2", "clear", "[]=", "append"],
)
def test_changes_outside_reach_the_list_that_holds_the_model(
    models: LoadedModels, slots: tuple[Slot, ...], change: Callable[[Any], Any], seen: list[str]
) -> None:
    change(models)
    assert contents(models, slots) == seen


def test_outside_a_range_cannot_be_assigned_for_it_has_no_owner(models: LoadedModels, slots: tuple[Slot, ...]) -> None:
    with pytest.raises(TypeError, match="slot"):
        models[:] = ["x"]
    assert contents(models, slots) == ["ab", "c", "abcd"]


@pytest.mark.parametrize("index", [4, -5])
def test_outside_an_index_out_of_range_is_an_error(models: LoadedModels, index: int) -> None:
    with pytest.raises(IndexError):
        models[index] = "x"
    with pytest.raises(IndexError):
        del models[index]


def test_a_walk_outside_survives_a_removal(models: LoadedModels) -> None:
    seen = []
    for model in models:
        seen.append(model)
        models.remove(model)
    assert seen == ["a", "b", "c", "d"]
    assert len(models) == 0


def test_models_that_no_longer_exist_are_dropped_from_the_own_list_only(slots: tuple[Slot, ...]) -> None:
    models = LoadedModels()
    for slot in slots:
        with entered(slot):
            models.extend(
                [
                    FakeLoadedModel("alive", lambda: object()),
                    FakeLoadedModel("dead", lambda: None),
                    FakeLoadedModel("new", None),
                ]
            )
    with entered(slots[0]):
        drop_dead()
        assert repr(models) == "[alive, new]"
    with entered(slots[1]):
        assert repr(models) == "[alive, dead, new]"


def test_dropping_keeps_the_list_for_whoever_walks_it(slots: tuple[Slot, ...]) -> None:
    with entered(slots[0]):
        models = LoadedModels([FakeLoadedModel("dead", lambda: None), FakeLoadedModel("new")])
        held = models._seen()
        drop_dead()
        assert models._seen() is held
        assert repr(held) == "[new]"


def test_what_a_slot_holds_is_named_with_its_bytes(slots: tuple[Slot, ...]) -> None:
    class SD15:
        pass

    class Patcher:
        model = SD15()

        def loaded_size(self) -> int:
            return 123

    class Loaded:
        def __init__(self, model: Any) -> None:
            self.model = model

    with entered(slots[1]):
        LoadedModels([Loaded(Patcher()), Loaded(None)])
    assert models_of(slots[0]) == []
    assert models_of(slots[1]) == [{"name": "SD15", "loaded_bytes": 123}]
