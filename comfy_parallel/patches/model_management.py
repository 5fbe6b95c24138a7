"""Patches on the host's `comfy.model_management` and its like: interrupts, loaded models, streams, pins."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from comfy_parallel.isolation import interrupts, loaded_models, quantised
from comfy_parallel.isolation.slot_globals import ModuleProperty, SlotGlobals
from comfy_parallel.patching.engine import Fit, Patch, Undo
from comfy_parallel.patching.sources import ModuleSource
from comfy_parallel.slots import stalls
from comfy_parallel.slots.slot import current_slot, slots
from comfy_parallel.weights import lost

_MM = "comfy.model_management"
_ONE_DEVICE = "the host keeps this per device"


def _interrupt(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def interrupt_current_processing(value: bool = True) -> None:
        if value:
            interrupts.request_interrupt()
        else:
            interrupts.clear_interrupt()

    return interrupt_current_processing


def _is_interrupted(original: Callable[[], bool]) -> Callable[[], bool]:
    @functools.wraps(original)
    def processing_interrupted() -> bool:
        return interrupts.is_interrupted()

    return processing_interrupted


def _raise_if_interrupted(original: Callable[[], None], exception: type[BaseException]) -> Callable[[], None]:
    @functools.wraps(original)
    def throw_exception_if_processing_interrupted() -> None:
        lost.raise_if_any()  # Nor may a job compute with what is written over its weights.
        if interrupts.take_interrupt():
            stalls.raise_if_stalled()
            raise exception()

    return throw_exception_if_processing_interrupted


def _interrupt_property(initial: Any) -> property:
    def get(module: ModuleType) -> bool:
        return interrupts.is_interrupted()

    def set(module: ModuleType, value: bool) -> None:
        module.interrupt_current_processing(value)

    return property(get, set)


def _cleanup(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def cleanup_models() -> None:
        loaded_models.drop_dead()

    return cleanup_models


def _cleanup_first(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def cleanup_models_gc() -> None:
        loaded_models.drop_dead()
        original()

    return cleanup_models_gc


def _share_of_pinned_memory(total: float) -> float:
    return total / max(1, len(slots())) if total > 0 else total


@dataclass(frozen=True, kw_only=True)
class Alias(Patch):
    """Make a second import name of a module lead to the same module."""

    def check_source(self, source: ModuleSource) -> Fit:
        return Fit.FITS

    def check_live(self, module: ModuleType) -> Fit:
        return Fit.FITS

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        if self.path[0] not in sys.modules:
            yield _ModuleUndo(self.path[0], module)


class _ModuleUndo(Undo):
    is_name = False

    def __init__(self, name: str, module: ModuleType) -> None:
        self.owner, self.name, self.original, self.new = sys.modules, name, None, module
        sys.modules[name] = module

    def revert(self) -> None:
        if sys.modules.get(self.name) is self.new:
            del sys.modules[self.name]


_SDPA_LOCK = threading.Lock()


def _one_at_a_time(original: Callable[..., Any], sdpa_kernel: Any) -> Callable[..., Any]:
    if sdpa_kernel is None:
        return original

    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        if current_slot() is None:
            return original(*args, **kwargs)
        with _SDPA_LOCK:
            return original(*args, **kwargs)

    return scaled_dot_product_attention


def _no_ring_for_several(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prefetch_ring_begin(*args: Any, **kwargs: Any) -> Any:
        """None is what the host takes for no ring."""
        return None if current_slot() is not None and len(slots()) > 1 else original(*args, **kwargs)

    return prefetch_ring_begin


PATCHES: tuple[Patch, ...] = (
    Patch(
        target=f"{_MM}:current_loaded_models",
        wrap=loaded_models.LoadedModels,
        expects=list,
        why="Two slots that load at once corrupt one list for good.",
        until=_ONE_DEVICE,
        hazards=(29, 31, 40),
    ),
    Patch(
        target=f"{_MM}:cleanup_models",
        wrap=_cleanup,
        why="A finalizer may run on another slot's thread.",
        until=_ONE_DEVICE,
        hazards=(30,),
    ),
    Patch(
        target=f"{_MM}:cleanup_models_gc",
        wrap=_cleanup_first,
        why="Entries whose model died on another thread are dropped before the list is walked.",
        until=_ONE_DEVICE,
        hazards=(30,),
    ),
    Patch(
        target=f"{_MM}:interrupt_current_processing",
        wrap=_interrupt,
        params=("value",),
        why="An interrupt is meant for one job.",
        until="the host keeps the flag with the job",
        hazards=(10, 16, 20),
    ),
    Patch(
        target=f"{_MM}:processing_interrupted",
        wrap=_is_interrupted,
        why="An interrupt is meant for one job.",
        until="the host keeps the flag with the job",
        hazards=(20,),
    ),
    Patch(
        target=f"{_MM}:throw_exception_if_processing_interrupted",
        wrap=_raise_if_interrupted,
        needs=("InterruptProcessingException",),
        why="An interrupt is meant for one job, and the check runs once per layer: it takes no lock.",
        until="the host keeps the flag with the job",
        hazards=(20,),
    ),
    ModuleProperty(
        target=f"{_MM}:interrupt_processing",
        wrap=_interrupt_property,
        why="Nodes read the flag as an attribute of the module.",
        until="the host keeps the flag with the job",
        hazards=(20,),
    ),
    SlotGlobals(
        target=f"{_MM}:STREAMS",
        names=("STREAMS", "stream_counters"),
        why="Slots that share a device must not share its copy streams.",
        until=_ONE_DEVICE,
        hazards=(35,),
    ),
    SlotGlobals(
        target=f"{_MM}:PINNED_MEMORY",
        names=("PINNED_MEMORY", "TOTAL_PINNED_MEMORY", "MAX_PINNED_MEMORY"),
        initial={"MAX_PINNED_MEMORY": _share_of_pinned_memory},
        optional=True,
        why="Two slots pinning at once lose updates of the total; each gets its share of the limit.",
        until="the host locks its accounts",
        hazards=(36,),
    ),
    SlotGlobals(
        target=f"{_MM}:STREAM_CAST_BUFFERS",
        names=(
            "STREAM_CAST_BUFFERS",
            "LARGEST_CASTED_WEIGHT",
            "STREAM_AIMDO_CAST_BUFFERS",
            "LARGEST_AIMDO_CASTED_WEIGHT",
            "DIRTY_MMAPS",
            "CROSS_STEP_STATE",
        ),
        optional=True,
        why="The end of a node on one slot frees the cast buffers of all.",
        until=_ONE_DEVICE,
        hazards=(37,),
    ),
    SlotGlobals(
        target=f"{_MM}:in_training",
        names=("in_training", "training_fp8_bwd"),
        optional=True,
        why="Training on one slot changes inference on the others.",
        until="the host keeps the mode with the job",
        hazards=(41,),
    ),
    Alias(
        target=f"{_MM}:model_management",
        wrap=lambda original: original,
        why="Some hosts import this file a second time under its short name, with a second set of globals.",
        until="no host does",
        hazards=(43,),
    ),
    Alias(
        target="comfy.model_patcher:model_patcher",
        wrap=lambda original: original,
        why="Some hosts import this file a second time under its short name.",
        until="no host does",
        hazards=(43,),
    ),
    SlotGlobals(
        target="comfy.model_prefetch:PREFETCH_QUEUES",
        names=(
            "PREFETCH_QUEUES",
            "GRAPH_MODULES",
            "GRAPH_WARMED_MODULES",
            "GRAPH_CAPTURE_STREAMS",
            "MALLOC_GRAPH_BREAKS",
            "MALLOC_GRAPH_ROGUES",
            "MALLOC_GRAPH_USED",
            "ACTIVE_PREFETCH_RING",
            "PREFETCH_RING_MODULES",
        ),
        optional=True,
        why="The end of a node on one slot drops the prefetch queues, graphs and rings of all.",
        until=_ONE_DEVICE,
        hazards=(38,),
    ),
    Patch(
        target="comfy.model_prefetch:prefetch_ring_begin",
        wrap=_no_ring_for_several,
        optional=True,
        why="comfy_kitchen records and runs one ring for the whole process; it saves time and changes no result.",
        until="comfy_kitchen has one ring per device",
        hazards=(38,),
    ),
    SlotGlobals(
        target="comfy.memory_management:extra_ram_release_callback",
        names=("extra_ram_release_callback", "RAM_CACHE_HEADROOM"),
        optional=True,
        why="The end of a job on one slot takes the callback away from all.",
        until="the host keeps it with the executor",
        hazards=(23,),
    ),
    Patch(
        target="comfy.ops:pick_operations",
        wrap=quantised.picking_own,
        needs=("MixedPrecisionOps?",),
        optional=True,
        why="A slot that builds a quantised model sets how the layers of another slot's model are read.",
        until="no host keeps a model's settings as attributes of a class",
    ),
    Patch(
        target="comfy.ops:scaled_dot_product_attention",
        wrap=_one_at_a_time,
        needs=("sdpa_kernel?",),
        optional=True,
        why="sdpa_kernel sets process-wide backend flags around each call.",
        until="torch keeps them per thread",
        hazards=(55,),
    ),
)
