"""The host's class of loaded models, with placement: a part of the weights lives on other devices.

The host's own casting fetches them when they are used, with its copy streams, which run ahead of what computes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from comfy_parallel.graphs.residency import NOWHERE
from comfy_parallel.nodes import allocation
from comfy_parallel.nodes.donors import Loan
from comfy_parallel.nodes.plan import Plan
from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import copies

_PLACEMENT = "comfy_parallel_placement"  # of a model, as an attribute
_AWAY, _HERE = "away", "here"


class Placement:
    """The plan of one model, and how it is kept.

    Args:
        loans: of the donors that are GPUs, by their names.
        eject: the slot's other models leave the device when this one is loaded.
        exact: patched weights are computed once, as those of a model that is loaded whole.
    """

    def __init__(self, plan: Plan, loans: dict[str, Loan], *, eject: bool, exact: bool) -> None:
        self.away = {name: home for name, home in plan.homes.items() if home != plan.compute}
        self.here_bytes = plan.held[plan.compute]
        self.loans = loans
        self.eject = eject
        self.exact = exact

    def take_loans(self, model: Any) -> None:
        """Move to the donor GPUs what is to live there."""
        modules = dict(model.named_modules()) if self.loans else {}
        for device, loan in self.loans.items():
            names = (name for name, home in self.away.items() if home == device)
            loan.take(parameter for name in names for parameter in modules[name].parameters(recurse=False))

    def give_back_loans(self) -> None:
        """The model is unloaded."""
        for loan in self.loans.values():
            loan.give_back()

    def for_another_model(self) -> Placement:
        """The same for a model of the same modules; the donor GPUs' memory is lent to this one only."""
        other = copy.copy(self)
        other.loans = {}
        return other


def place_model(patcher: Any, placement: Placement) -> None:
    """Have a model of the host, and what is cloned from it, load by placement."""
    setattr(patcher.model, _PLACEMENT, placement)
    kind: Any = type(patcher)
    patcher.__class__ = _placed(kind)


def placement_of(patcher: Any) -> Placement | None:
    """The placement of a model of the host; None where it has none."""
    found: Placement | None = getattr(getattr(patcher, "model", None), _PLACEMENT, None)
    return found


class _Placed:
    """What both classes of the host have in common."""

    model: Any

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A clone without dynamic VRAM has a model of its own, which lives as this one does."""
        made = _host(self).clone(*args, **kwargs)
        placement = placement_of(self)
        if placement is not None and not isinstance(made, _Placed):  # Classes of packs clone to their own class, too.
            place_model(made, placement if made.model is self.model else placement.for_another_model())
        return made

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        placement = placement_of(self)
        if placement is not None and unpatch_weights:
            placement.give_back_loans()
        return _host(self).unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)


class Placed(_Placed):
    """Without dynamic VRAM the host's own `load` runs twice, each time over a part of the model: what lives elsewhere,
    all of which it casts when it is used, and then what it moves to the device that computes."""

    load_device: Any
    forced_hooks: Any
    patches: Any
    _part: str | None = None
    _compute: Any = None

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        entries: list[Any] = _host(self)._load_list(*args, **kwargs)
        placement = placement_of(self)
        if self._part is None or placement is None:
            return entries
        return [entry for entry in entries if (entry[-3] in placement.away) == (self._part == _AWAY)]

    def load(
        self,
        device_to: Any = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        placement = placement_of(self)
        if placement is None or not placement.away:
            self._load_part(device_to, lowvram_model_memory, force_patch_weights, full_load)
            return
        try:
            self._load_away(device_to, placement)
            self._part = _HERE
            with copies.complete():
                self._load_ahead(device_to, placement)
                self._load_part(device_to, 1e32, force_patch_weights)
        finally:
            self._part = None
        self.model.model_lowvram = True

    def _load_away(self, device_to: Any, placement: Placement) -> None:
        hooks, self.forced_hooks = self.forced_hooks, None
        self._part, self._compute = _AWAY, device_to
        if not self.model.model_lowvram:
            self._take_for_new()
        try:
            self._load_part(device_to, 0.1, placement.exact)
        finally:
            self.forced_hooks = hooks
        placement.take_loans(self.model)

    def _take_for_new(self) -> None:
        """The host takes a module that it casts for one that it has left out and patched already: text encoders are
        cast from their first load on, also where they were loaded whole."""
        for *_, module, _params in self._load_list():
            if hasattr(module, "prev_comfy_cast_weights"):
                module.comfy_cast_weights = module.prev_comfy_cast_weights
                del module.prev_comfy_cast_weights

    def _load_part(self, device_to: Any, room: float, patch_all: bool, full_load: bool = False) -> None:
        """By the names of the host's arguments, which packs that replace this method rely on."""
        options = {"lowvram_model_memory": room, "force_patch_weights": patch_all, "full_load": full_load}
        _host(self).load(device_to, **options)

    def _load_ahead(self, device_to: Any, placement: Placement) -> None:
        """What stays lies side by side, as in a model that is loaded whole: weight by weight it would take more."""
        store = loading.store_of_slot()
        if store is not None and getattr(device_to, "type", None) == "cuda":
            loading.load_ahead(store, self.model, device_to, {*self.patches, *_keys(self.model, placement.away)})

    def model_size(self) -> int:
        """What the device that computes has to have free for it; the host makes that room."""
        placement = placement_of(self)
        return int(_host(self).model_size()) if placement is None else int(placement.here_bytes)

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The bytes are those of a model that is loaded whole: computed where it computes, then taken home."""
        is_patched_when_used = hasattr(attrgetter(key)(self.model), "patches")  # as packs do for quantised weights
        if self._part != _AWAY or device_to is not None or is_patched_when_used:
            return _host(self).patch_weight_to_device(key, device_to, *args, **kwargs)
        result = _host(self).patch_weight_to_device(key, self._compute, *args, **kwargs)
        weight = attrgetter(key)(self.model)
        weight.data = weight.data.to(allocation.CPU)
        return result

    def get_all_callbacks(self, *args: Any) -> Any:
        return [] if self._part == _AWAY else _host(self).get_all_callbacks(*args)


class PlacedInPages(_Placed):
    """Under dynamic VRAM what lives elsewhere has no pages of the device's memory: the host fetches it at each use.

    It patches such weights when it has fetched them, as it does those that have pages.
    """

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        placement = placement_of(self)
        if placement is not None:
            modules = dict(self.model.named_modules())
            for name in placement.away:
                modules[name]._v = NOWHERE
            placement.take_loans(self.model)
        _host(self).load(device_to, *args, **kwargs)


def _keys(model: Any, names: Any) -> Iterator[str]:
    """The names of these modules' own parameters."""
    modules = dict(model.named_modules())
    for name in names:
        yield from (f"{name}.{own}" for own, _ in modules[name].named_parameters(recurse=False))


def _host(patcher: _Placed) -> Any:
    """The host's methods of a placed model."""
    return super(_Placed, patcher)


@functools.cache
def _placed(base: Any) -> Any:
    if issubclass(base, _Placed):
        return base
    kind = PlacedInPages if hasattr(base, "_vbar_get") else Placed
    return type(f"{kind.__name__}{base.__name__}", (kind, base), {"host_class": base})
