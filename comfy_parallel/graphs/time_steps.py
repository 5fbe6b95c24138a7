"""Time steps of a model whose schedule lies in RAM, where a recording cannot look: they are looked up before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_parallel.patching.engine import replace

_TIME_STEPS = "comfy_parallel_time_steps"


def with_time_steps(model: Any, arguments: dict[str, Any], device: Any) -> dict[str, Any]:
    """A forward's arguments, and besides, if the model's schedule is elsewhere than on `device`, the time steps of `t`.

    The host leaves the schedule of a `ModelSampling` node in RAM when it has loaded the model before.
    """
    schedule = getattr(model, "model_sampling", None)
    if schedule is None or all(tensor.device == device for tensor in _tensors(schedule)):
        return arguments
    return {**arguments, _TIME_STEPS: schedule.timestep(arguments["t"])}


@contextmanager
def looked_up(model: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Takes the time steps out of a call's arguments. The schedule gives these for its `t`, in the body."""
    if _TIME_STEPS not in arguments:
        yield
        return
    sigma, time_steps = arguments["t"], arguments.pop(_TIME_STEPS)
    look_up = model.model_sampling.timestep

    def timestep(other: Any) -> Any:
        return time_steps if other is sigma else look_up(other)

    undo = replace(model.model_sampling, "timestep", timestep)
    try:
        yield
    finally:
        undo.revert()


def _tensors(schedule: Any) -> list[Any]:
    import torch

    attributes = vars(schedule)
    values = [*attributes.get("_buffers", {}).values(), *attributes.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]
