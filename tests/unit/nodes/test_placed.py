"""What a placed model does when the host loads, clones and unloads it, with stand-ins for the host's two classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from comfy_parallel.graphs.residency import NOWHERE
from comfy_parallel.nodes.donors import Loan
from comfy_parallel.nodes.placed import _AWAY, _HERE, Placement, place_model, placement_of
from comfy_parallel.nodes.plan import Plan


class Model(nn.Sequential):
    model_lowvram = False

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(2, 2) for _ in range(4)))


class HostPatcher:
    """As the host's class without dynamic VRAM."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.load_device = torch.device("cpu")
        self.forced_hooks = "the hooks"
        self.patches: dict[str, Any] = {}
        self.seen: list[Any] = []

    def _load_list(self) -> list[Any]:
        return [(16, name, module, ["weight", "bias"]) for name, module in self.model.named_children()]

    def model_size(self) -> int:
        return 96

    def load(self, device_to: Any, lowvram_model_memory: float, force_patch_weights: bool, full_load: bool) -> None:
        names = [entry[-3] for entry in self._load_list()]
        self.seen.append((names, lowvram_model_memory, force_patch_weights, full_load, self.forced_hooks))

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        self.seen.append(("unpatched", unpatch_weights))

    def clone(self, disable_dynamic: bool = False) -> Any:
        return copy.copy(self)


class PagedPatcher(HostPatcher):
    """As the host's class with dynamic VRAM."""

    def _vbar_get(self) -> None: ...

    def load(self, device_to: Any = None, dirty: bool = False) -> None:  # type: ignore[override]
        for name, module in self.model.named_children():
            if not hasattr(module, "_v"):
                module._v = (self, int(name), 24)  # type: ignore[assignment]
        self.seen.append(dirty)

    def clone(self, disable_dynamic: bool = False) -> Any:
        return HostPatcher(Model()) if disable_dynamic else super().clone()


def placed(patcher: Any, *, donor: str = "cpu", exact: bool = True) -> Any:
    homes = {"0": "cuda:0", "1": donor, "2": "cuda:0", "3": donor}
    plan = Plan("cuda:0", homes, dict.fromkeys(homes, 24), {})
    loans = {} if donor == "cpu" else {donor: Loan(donor, 48, lambda: 1000)}
    place_model(patcher, Placement(plan, loans, eject=False, exact=exact))
    return patcher


def test_a_load_is_two_of_the_hosts() -> None:
    patcher = placed(HostPatcher(Model()))
    patcher.load("the device", 123.0, False, True)
    assert patcher.seen == [
        (["1", "3"], 0.1, True, False, None),  # Patched once; hooks are applied to the whole.
        (["0", "2"], 1e32, False, False, "the hooks"),
    ]
    assert patcher.model.model_lowvram
    assert patcher._load_list() == HostPatcher(patcher.model)._load_list()


def test_what_was_loaded_whole_and_cast_is_loaded_anew_by_its_placement() -> None:
    """As text encoders are: the host would leave its patches out."""
    patcher = placed(HostPatcher(Model()))
    for module in patcher.model:
        module.prev_comfy_cast_weights, module.comfy_cast_weights = False, True
    patcher.load("the device", 123.0, False, True)
    assert [hasattr(module, "prev_comfy_cast_weights") for module in patcher.model] == [True, False, True, False]
    assert [module.comfy_cast_weights for module in patcher.model] == [True, False, True, False]
    patcher.model[1].prev_comfy_cast_weights = False  # as the host's load has left it out
    patcher.load("the device", 123.0, False, True)
    assert hasattr(patcher.model[1], "prev_comfy_cast_weights"), "it is left out already"


def test_each_load_sees_its_part_of_the_model() -> None:
    patcher = placed(HostPatcher(Model()))
    parts = {}
    for part in (_AWAY, _HERE, None):
        patcher._part = part
        parts[part] = [entry[-3] for entry in patcher._load_list()]
    assert parts == {_AWAY: ["1", "3"], _HERE: ["0", "2"], None: ["0", "1", "2", "3"]}


def test_the_host_makes_room_for_what_stays() -> None:
    assert placed(HostPatcher(Model())).model_size() == 48


def test_under_dynamic_vram_its_range_and_pins_are_for_the_whole_model() -> None:
    """The host makes room page by page there."""
    assert placed(PagedPatcher(Model())).model_size() == 96


def test_under_dynamic_vram_what_lives_elsewhere_has_no_pages() -> None:
    patcher = placed(PagedPatcher(Model()))
    for _ in range(2):
        patcher.load(dirty=True)
        places = [module._v for module in patcher.model]
        assert [place is NOWHERE for place in places] == [False, True, False, True]
    assert patcher.seen == [True, True]
    del patcher.model[1]._v  # as the host does when a LoRA resizes it
    patcher.load()
    assert patcher.model[1]._v is NOWHERE


class PackPatcher(HostPatcher):
    """As the class of a pack with quantised weights."""

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> None:  # type: ignore[override]
        super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        made = copy.copy(self)
        made.__class__ = PackPatcher
        return made


def test_a_packs_class_loads_by_placement_and_so_do_its_clones() -> None:
    patcher = placed(PackPatcher(Model()))
    for one in (patcher, patcher.clone(), patcher.clone().clone()):
        one.seen = []
        one.load("the device", lowvram_model_memory=1.0)
        seen = [(names, patch_all) for names, _, patch_all, _, _ in one.seen]
        assert seen == [(["1", "3"], True), (["0", "2"], True)]


def test_clones_are_placed_too() -> None:
    for patcher in (placed(HostPatcher(Model())), placed(PagedPatcher(Model())), placed(PackPatcher(Model()))):
        clone = patcher.clone()
        assert type(clone) is type(patcher)
        assert placement_of(clone) is placement_of(patcher)


def test_a_clone_without_dynamic_vram_is_placed_and_borrows_nothing() -> None:
    patcher = placed(PagedPatcher(Model()), donor="cuda:1")
    made = patcher.clone(disable_dynamic=True)
    assert placement_of(made).away == placement_of(patcher).away  # type: ignore[union-attr]
    assert placement_of(made).loans == {}  # type: ignore[union-attr]
    assert isinstance(made, HostPatcher)
    assert made.model_size() == 48


def test_weights_live_on_the_donor_from_load_to_unload(monkeypatch: pytest.MonkeyPatch) -> None:
    for patcher, options in ((HostPatcher(Model()), (None, 1.0, False, False)), (PagedPatcher(Model()), ())):
        placed(patcher, donor="cuda:1")
        seen: list[Any] = []
        monkeypatch.setattr(Loan, "take", lambda loan, parameters, seen=seen: seen.append(list(parameters)))
        monkeypatch.setattr(Loan, "give_back", lambda loan, seen=seen: seen.append("back"))
        patcher.load(*options)
        patcher.unpatch_model(unpatch_weights=False)
        assert [len(seen[0]), seen[1:]] == [4, []]
        assert list(map(id, seen[0])) == [id(one) for index in (1, 3) for one in patcher.model[index].parameters()]
        patcher.unpatch_model()
        assert seen[1:] == ["back"]
