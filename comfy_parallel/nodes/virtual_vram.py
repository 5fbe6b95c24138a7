"""Virtual VRAM: a part of a model lives on other devices, and is fetched by the host's own casting when it is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from comfy_parallel.errors import AllocationError
from comfy_parallel.graphs.residency import NOWHERE
from comfy_parallel.host import dynamic_vram, facts
from comfy_parallel.nodes import allocation, donors
from comfy_parallel.nodes.placed import Placement, place_model
from comfy_parallel.nodes.plan import Plan, Weight, place
from comfy_parallel.slots import device
from comfy_parallel.slots.slot import slots

logger = logging.getLogger(__name__)

_PAGED_BYTES = 16 << 10  # Under dynamic VRAM the host loads smaller modules whole.


def spread_result(result: tuple[Any, ...], **asked: Any) -> tuple[tuple[Any, ...], list[str]]:
    """Place the first model of what a loader gives; returns the result and the plan for people.

    Raises:
        AllocationError: when it cannot be placed as was asked.
    """
    first = _placeable(result[0])
    patcher = _patcher_of(first)
    lines = spread(patcher, **asked)
    return (first, *result[1:]), lines


def spread(
    patcher: Any, *, gigabytes: float, donors: str, expert: str, devices: Sequence[str], eject: bool, exact: bool
) -> list[str]:
    """Have a model of the host live where the inputs of a node say; returns the plan for people."""
    weights = [_weight(entry, _is_dynamic(patcher)) for entry in patcher._load_list()]
    compute = _name(patcher.load_device)
    if compute == allocation.CPU or allocation.SLOT in expert:  # Where the CPU computes it may be the donor, too.
        compute = allocation.SLOT
    request = allocation.make_request(
        compute=compute, virtual_gb=gigabytes, donors=donors, expert=expert, devices=[compute, *devices]
    )
    plan = place(request, weights, {name: _total(name, patcher) for name in (compute, *devices)})
    place_model(patcher, Placement(plan, _loans(plan), eject=eject, exact=exact))
    lines = [*plan.lines(), str(request)]
    logger.info("comfy_parallel: %s: %s", type(patcher.model).__name__, "; ".join(lines))
    return lines


def _weight(entry: tuple[Any, ...], is_dynamic: bool) -> Weight:
    """A row of the host's list of what a load moves; it ends with size, name, module and parameters."""
    size, name, module, parameters = entry[-4:]
    movable = hasattr(module, "comfy_cast_weights")
    if is_dynamic:
        movable = movable and size > _PAGED_BYTES and {"weight", "bias"}.issuperset(parameters)
    return Weight(name, int(size), movable)


def _name(torch_device: Any) -> str:
    kind, index = torch_device.type, torch_device.index
    return str(kind) if kind in ("cpu", "mps") else f"{kind}:{index or 0}"


def _total(name: str, patcher: Any) -> int:
    return device.memory(_name(patcher.load_device) if name == allocation.SLOT else name)["total_bytes"]


def _loans(plan: Plan) -> dict[str, donors.Loan]:
    """A donor's card is also a slot's: what does not fit beside what that needs is refused, not tried.

    Raises:
        AllocationError: with the numbers.
    """
    asked = {name: size for name, size in plan.held.items() if ":" in name and name != plan.compute and size}
    return {name: donors.lend(name, size, lambda name=name: _room(name)) for name, size in asked.items()}  # type: ignore[misc]


def _room(name: str) -> int:
    """How much a device can lend: what is free, without what a slot there needs to compute at all."""
    is_slots = any(slot.device == name for slot in slots())
    return facts.vram(name)["free_bytes"] - (facts.least_to_compute() if is_slots else 0)


def _is_dynamic(patcher: Any) -> bool:
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


def _placeable(loaded: Any) -> Any:
    """Dynamic VRAM can leave single weights out; a model for which it cannot leaves it, by the host's own delegate."""
    patcher = _patcher_of(loaded)
    if not _is_dynamic(patcher) or dynamic_vram.can_do_without_pages(patcher.model, NOWHERE):
        return loaded
    logger.info("comfy_parallel: %s is placed without dynamic VRAM", type(patcher.model).__name__)
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
