"""Patches on the host's `execution`: its queue becomes the front of all slots' queues."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from comfy_parallel.errors import HostMismatch
from comfy_parallel.fleet.process_slot import where_its_slot_runs
from comfy_parallel.http import events
from comfy_parallel.isolation import kept_outputs, out_of_memory
from comfy_parallel.nodes.parallel import fan_out
from comfy_parallel.patching.engine import Fit, Patch
from comfy_parallel.patching.namespaces import View, with_globals
from comfy_parallel.patching.sources import ModuleSource
from comfy_parallel.slots import loops, lost_devices, spent_errors
from comfy_parallel.slots.queues import build_queue_class
from comfy_parallel.slots.worker import start_from_call

FAN_OUT = "one workflow over all slots"
RETRIES = "a second run of jobs that find no memory"
LOST_DEVICES = "noticing that a GPU is lost"
SPENT_ERRORS = "dropping the frames of errors"

_METHODS = {
    "put": ("self", "item"),
    "get": ("self", "timeout"),
    "task_done": ("self", "item_id", "history_result"),
    "get_current_queue": ("self",),
    "get_current_queue_volatile": ("self",),
    "get_tasks_remaining": ("self",),
    "wipe_queue": ("self",),
    "delete_queue_item": ("self", "function"),
    "set_flag": ("self", "name", "data"),
    "get_flags": ("self", "reset"),
}


@dataclass(frozen=True, kw_only=True)
class QueuePatch(Patch):
    """Also checks the methods that the queues override; hosts may have more."""

    def check_source(self, source: ModuleSource) -> Fit:
        for method, params in _METHODS.items():
            found = source.find([*self.path, method])
            if found is None and method != "get_current_queue_volatile":
                raise HostMismatch(f"{self.target}.{method}: not found in this host")
            if found is not None:
                names = tuple(arg.arg for arg in found.args.args)
                if names[: len(params)] != params:
                    raise HostMismatch(f"{self.target}.{method}: expected parameters {params}, host has {names}")
        return super().check_source(source)


def _get_output(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_output_from_returns(return_values: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(return_values, obj, *args, **kwargs)
        events.check_output(found[1])
        return found

    return get_output_from_returns


def _keeping_loop(original: FunctionType, asyncio: Any) -> FunctionType:
    return with_globals(original, asyncio=View(asyncio, run=loops.run))


PATCHES: tuple[Patch, ...] = (
    QueuePatch(
        target="execution:PromptQueue",
        wrap=lambda host_class: build_queue_class(host_class, start_from_call),
        expects=type,
        why="One host queue must feed one queue per slot.",
        until="the host accepts a queue factory",
        hazards=(4, 5, 6, 7, 8, 9),
    ),
    Patch(
        target="execution:PromptExecutor.execute",
        wrap=_keeping_loop,
        params=("self", "prompt", "prompt_id"),
        needs=("asyncio",),
        feature="speed",
        spare=True,
        why="Each job makes an event loop and lets go of the interpreter a dozen times meanwhile.",
        until="the host keeps its executor's loop",
    ),
    Patch(
        target="execution:PromptExecutor.execute",
        wrap=out_of_memory.retrying,
        params=("self", "prompt", "prompt_id"),
        needs=("comfy.model_management:unload_all_models", "comfy.model_management:soft_empty_cache"),
        feature=RETRIES,
        spare=True,
        why="A job that finds no memory may find it once its slot has given back what it keeps.",
        until="the host tries again itself",
    ),
    Patch(
        target="execution:PromptExecutor.handle_execution_error",
        wrap=out_of_memory.deferring,
        params=("self", "prompt_id", "prompt", "current_outputs", "executed", "error", "ex"),
        needs=("comfy.model_management:OOM_EXCEPTION", "comfy.model_management:is_oom?"),
        feature=RETRIES,
        spare=True,
        why="A job that is run once more has not failed.",
        until="the host tries again itself",
    ),
    Patch(
        target="execution:PromptExecutor.handle_execution_error",
        wrap=lost_devices.telling_of_lost_devices,
        params=("self", "prompt_id", "prompt", "current_outputs", "executed", "error", "ex"),
        feature=LOST_DEVICES,
        spare=True,
        why="A GPU that is lost to this process fails every job that its slots take.",
        until="the host notices that itself",
    ),
    Patch(
        target="execution:PromptExecutor.handle_execution_error",
        wrap=spent_errors.dropping_frames,
        params=("self", "prompt_id", "prompt", "current_outputs", "executed", "error", "ex"),
        feature=SPENT_ERRORS,
        spare=True,
        why="An error that a node pack keeps holds the tensors of each job that it ended.",
        until="the host drops the frames of errors that it has told",
    ),
    Patch(
        target="execution:PromptExecutor.execute",
        wrap=lambda execute: kept_outputs.keeping_outputs(where_its_slot_runs(execute)),
        params=("self", "prompt", "prompt_id"),
        why="A slot's jobs may run in another process, and one that loads files ahead must not cost it its cache.",
        until="the host can hand a job over, and run one beside its cache",
    ),
    Patch(
        target="execution:PromptExecutor.execute",
        wrap=fan_out.fanning_out,
        params=("self", "prompt", "prompt_id", "extra_data", "execute_outputs"),
        why="A job with a collector is computed by all slots; its shares begin and end with it.",
        until="the host can share out a job",
        feature=FAN_OUT,
    ),
    Patch(
        target="execution:PromptExecutor.add_message",
        wrap=fan_out.starting_shares,
        params=("self", "event", "data"),
        why="Shares are queued once it is known that the job's collectors are not cached.",
        until="the host can share out a job",
        feature=FAN_OUT,
    ),
    Patch(
        target="execution:get_output_from_returns",
        wrap=_get_output,
        params=("return_values", "obj"),
        spare=True,
        feature="a check of what nodes show",
        why="What a node shows and is no JSON ends the process when it is sent, and breaks the history for all.",
        until="the host checks what nodes show",
    ),
)
