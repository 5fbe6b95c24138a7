"""Virtual VRAM: a part of a model lives on other devices, and is fetched by the host's own casting when it is used."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from comfy_parallel.errors import AllocationError
from comfy_parallel.nodes import allocation
from comfy_parallel.nodes.plan import Plan, Weight, place
from comfy_parallel.slots import device

logger = logging.getLogger(__name__)

_PLACEMENT = "comfy_parallel_placement"
_AWAY, _HERE = "away", "here"


class Placement:
    """The plan of one model, and how it is kept."""

    def __init__(self, plan: Plan, *, eject: bool, exact: bool) -> None:
        self.away = {name: home for name, home in plan.homes.items() if home != plan.compute}
        self.here_bytes = plan.held[plan.compute]
        self.eject = eject
        self.exact = exact


def spread_result(result: tuple[Any, ...], **asked: Any) -> tuple[tuple[Any, ...], list[str]]:
    """Place the first model of what a loader gives; returns the result and the plan for people.

    Raises:
        AllocationError: when it cannot be placed as was asked.
    """
    first = _without_dynamic_vram(result[0])
    patcher = _patcher_of(first)
    lines = spread(patcher, **asked)
    return (first, *result[1:]), lines


def spread(
    patcher: Any, *, gigabytes: float, donors: str, expert: str, devices: Sequence[str], **kept: bool
) -> list[str]:
    """Have a model of the host live where the inputs of a node say; returns the plan for people."""
    weights = [_weight(entry) for entry in patcher._load_list()]
    compute = _name(patcher.load_device)
    if compute == allocation.CPU or allocation.SLOT in expert:  # Where the CPU computes it may be the donor, too.
        compute = allocation.SLOT
    request = allocation.make_request(
        compute=compute, virtual_gb=gigabytes, donors=donors, expert=expert, devices=[compute, *devices]
    )
    plan = place(request, weights, {name: _total(name, patcher) for name in (compute, *devices)})
    _check_room(plan)
    setattr(patcher.model, _PLACEMENT, Placement(plan, **kept))
    patcher.__class__ = _placed(patcher.__class__)
    lines = [*plan.lines(), str(request)]
    logger.info("comfy_parallel: %s: %s", type(patcher.model).__name__, "; ".join(lines))
    return lines


def _weight(entry: tuple[Any, ...]) -> Weight:
    """A row of the host's list of what a load moves; it ends with size, name, module and parameters."""
    size, name, module = entry[-4:-1]
    return Weight(name, int(size), movable=hasattr(module, "comfy_cast_weights"))


def _name(torch_device: Any) -> str:
    kind, index = torch_device.type, torch_device.index
    return str(kind) if kind in ("cpu", "mps") else f"{kind}:{index or 0}"


def _total(name: str, patcher: Any) -> int:
    return device.memory(_name(patcher.load_device) if name == allocation.SLOT else name)["total_bytes"]


def _check_room(plan: Plan) -> None:
    """A donor's card is also a slot's: what does not fit beside what is there now is refused, not tried."""
    for donor, size in plan.held.items():
        if ":" not in donor or donor == plan.compute:
            continue
        free = device.memory(donor)["free_bytes"]
        if size > free:
            raise AllocationError(
                f"{donor} has {free} bytes free and cannot take {size} of this model beside what its slot holds; "
                "ask for less, or name cpu as the donor"
            )


def _without_dynamic_vram(loaded: Any) -> Any:
    """The host keeps weights by itself in dynamic VRAM; a model with homes leaves it, by the host's own delegate."""
    patcher = _patcher_of(loaded)
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return loaded
    if patcher is loaded:
        return patcher.get_non_dynamic_delegate()
    try:
        return loaded.clone(disable_dynamic=True)
    except (AttributeError, TypeError) as error:
        raise AllocationError(
            f"{type(loaded).__name__} cannot leave dynamic VRAM; start ComfyUI with --disable-dynamic-vram"
        ) from error


def _patcher_of(loaded: Any) -> Any:
    """What the host keeps a loaded model in: the object itself, or an attribute of it."""
    for found in (loaded, getattr(loaded, "patcher", None), getattr(loaded, "control_model_wrapped", None)):
        if hasattr(found, "partially_load"):
            return found
    raise AllocationError(f"{type(loaded).__name__} is no model whose weights can be placed; use the plain loader")


class Placed:
    """Put before the host's class of loaded models, it loads by placement.

    The host's own `load` runs twice, each time over a part of the model: what lives elsewhere, all of which it casts
    when it is used, and then what it moves to the device that computes.
    """

    model: Any
    load_device: Any
    forced_hooks: Any
    _part: str | None = None
    _compute: Any = None

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        entries: list[Any] = _host(self)._load_list(*args, **kwargs)
        placement = getattr(self.model, _PLACEMENT, None)
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
        placement = getattr(self.model, _PLACEMENT, None)
        if placement is None or not placement.away:
            _host(self).load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            return
        try:
            self._load_away(device_to, placement)
            self._part = _HERE
            _host(self).load(device_to, 1e32, force_patch_weights, False)
        finally:
            self._part = None
        self.model.model_lowvram = True

    def _load_away(self, device_to: Any, placement: Placement) -> None:
        hooks, self.forced_hooks = self.forced_hooks, None
        self._part, self._compute = _AWAY, device_to
        try:
            _host(self).load(device_to, 0.1, placement.exact, False)
        finally:
            self.forced_hooks = hooks
        for *_, name, module, _params in self._load_list():
            home = placement.away[name]
            if home != allocation.CPU:
                module.to(home)

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The bytes are those of a model that is loaded whole: computed where it computes, then taken home."""
        if self._part != _AWAY or device_to is not None:
            return _host(self).patch_weight_to_device(key, device_to, *args, **kwargs)
        result = _host(self).patch_weight_to_device(key, self._compute, *args, **kwargs)
        weight = attrgetter(key)(self.model)
        home = getattr(self.model, _PLACEMENT).away[key.rpartition(".")[0]]
        weight.data = weight.data.to(home)
        return result

    def get_all_callbacks(self, *args: Any) -> Any:
        return [] if self._part == _AWAY else _host(self).get_all_callbacks(*args)

    def model_size(self) -> int:
        """What the device that computes has to have free for it; for one that ejects the others, all that it has.

        The host makes that room, by unloading what this slot does not need now, before it loads the model.
        """
        placement = getattr(self.model, _PLACEMENT, None)
        if placement is None:
            return int(_host(self).model_size())
        name = _name(self.load_device)
        if placement.eject and ":" in name and self.model.current_weight_patches_uuid is None:
            return int(device.memory(name)["total_bytes"])
        return int(placement.here_bytes)


def _host(patcher: Placed) -> Any:
    """The host's methods of a placed model."""
    return super(Placed, patcher)


@functools.cache
def _placed(base: Any) -> Any:
    return type(f"Placed{base.__name__}", (Placed, base), {})
