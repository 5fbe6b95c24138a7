"""Patches on the host's `comfy.model_base` and `comfy.model_patcher`: forwards are recorded and replayed."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from comfy_parallel.graphs import loads, per_slot
from comfy_parallel.patching.engine import Patch
from comfy_parallel.slots.slot import SlotLocal, current_slot

logger = logging.getLogger(__name__)

_loads: list[SlotLocal[loads.Loads]] = []
GRAPHS = "graphs"
_SEAM = "the host's wrappers can be registered for every model"


def _apply_model(original: Callable[..., Any], raise_if_interrupted: Callable[[], None]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)[1:-1]

    @functools.wraps(original)
    def _apply_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepper = per_slot.of_step()
        if stepper is None:
            return original(self, *args, **kwargs)
        raise_if_interrupted()  # The host asks once per layer; a replay has no layers.
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return stepper.step(original, self, arguments)

    return _apply_model


def _sampling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample(self: Any, model_wrap: Any, sigmas: Any, extra_args: Any, *args: Any, **kwargs: Any) -> Any:
        callbacks = getattr(getattr(model_wrap, "model_patcher", None), "callbacks", None)
        conds = getattr(model_wrap, "conds", None)
        with per_slot.sampling(self.sampler_function, model_wrap, extra_args, callbacks, conds):
            return original(self, model_wrap, sigmas, extra_args, *args, **kwargs)

    return sample


def _suspecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepper = per_slot.of_slot()
        if stepper is not None:
            stepper.suspect()
        return original(self, *args, **kwargs)

    return load


def _loading(original: Callable[..., Any], patcher_class: type, on_load: str) -> Callable[..., Any]:
    if not loads.is_known(original):
        logger.info("This host's load does more than we know: no load of a model is left out")
        return _suspecting(original)
    renews = loads.starts_anew(original)
    of_slot = SlotLocal(lambda: loads.Loads(patcher_class, on_load, renews))
    _loads.append(of_slot)

    @functools.wraps(original)
    def load(self: Any, device_to: Any = None, *args: Any, dirty: bool = False, **kwargs: Any) -> Any:
        import torch

        stepper = per_slot.of_slot()
        if stepper is None:
            return original(self, device_to, *args, dirty=dirty, **kwargs)
        stepper.suspect()
        is_usual = torch.is_inference_mode_enabled() and not args and not any(kwargs.values())
        if is_usual and not dirty and of_slot.get().repeat(self, device_to):
            return None
        result = original(self, device_to, *args, dirty=dirty, **kwargs)
        if is_usual:
            of_slot.get().note(self, device_to)
        else:
            of_slot.get().forget(self.model)
        return result

    return load


def _forgetting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unpatch_model(self: Any, device_to: Any = None, unpatch_weights: bool = True, **kwargs: Any) -> Any:
        stepper = per_slot.of_slot()
        if stepper is not None and unpatch_weights:
            stepper.forget(self.model)
            for of_slot in _loads:
                of_slot.get().forget(self.model)
        elif stepper is not None:
            stepper.suspect()
        return original(self, device_to, unpatch_weights, **kwargs)

    return unpatch_model


def _not_in_recordings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_prefetch_queue(*args: Any, **kwargs: Any) -> Any:
        """None is what the host takes for no queue."""
        slot = current_slot()
        return None if slot is not None and slot.is_recording else original(*args, **kwargs)

    return make_prefetch_queue


def _giving_back(original: Callable[..., Any], get_free_memory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def free_memory(memory_required: float, device: Any, *args: Any, **kwargs: Any) -> Any:
        stepper = per_slot.of_slot()
        if (
            stepper is not None
            and stepper.size_bytes
            and get_free_memory(device) - stepper.size_bytes < memory_required
        ):
            stepper.forget()
        return original(memory_required, device, *args, **kwargs)

    return free_memory


PATCHES: tuple[Patch, ...] = (
    Patch(
        target="comfy.model_base:BaseModel._apply_model",
        wrap=_apply_model,
        needs=("comfy.model_management:throw_exception_if_processing_interrupted",),
        params=("self", "x", "t"),
        why="A step is hundreds of Python calls, and all slots share one interpreter lock.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.samplers:KSAMPLER.sample",
        wrap=_sampling,
        params=("self", "model_wrap", "sigmas", "extra_args"),
        why="Code that a node pack runs between two steps may change what a recording relies on.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_patcher:ModelPatcher.load",
        wrap=_suspecting,
        params=("self",),
        why="A load changes what a recording relies on.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_patcher:ModelPatcher.patch_model",
        wrap=_suspecting,
        params=("self",),
        why="A patch changes what a recording relies on.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_patcher:ModelPatcher.unpatch_model",
        wrap=_forgetting,
        params=("self", "device_to", "unpatch_weights"),
        why="A model that goes needs its recordings' memory no more.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_patcher:ModelPatcherDynamic.load",
        wrap=_loading,
        needs=("ModelPatcherDynamic", "comfy.patcher_extension:CallbacksMP.ON_LOAD"),
        params=("self",),
        optional=True,
        why="A load changes what a recording relies on; and takes as long, in Python, as 20 replayed steps.",
        until="the host leaves out a load that sets what is set",
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_patcher:ModelPatcherDynamic.unpatch_model",
        wrap=_forgetting,
        params=("self", "device_to", "unpatch_weights"),
        optional=True,
        why="A model that goes needs its recordings' memory no more.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_prefetch:make_prefetch_queue",
        wrap=_not_in_recordings,
        optional=True,
        why="A recording must not copy weights to the GPU; they are all there.",
        until=_SEAM,
        feature=GRAPHS,
    ),
    Patch(
        target="comfy.model_management:free_memory",
        wrap=_giving_back,
        needs=("get_free_memory",),
        params=("memory_required", "device"),
        why="Recordings are the first memory to give back.",
        until=_SEAM,
        feature=GRAPHS,
    ),
)
