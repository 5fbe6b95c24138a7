"""Patches on the host's execution helpers: progress, node expansion, previews, files, housekeeping."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from comfy_parallel.core import limits
from comfy_parallel.host import facts
from comfy_parallel.isolation import save_numbers
from comfy_parallel.isolation.packs import providers
from comfy_parallel.isolation.slot_globals import SlotGlobals
from comfy_parallel.patching.engine import Patch
from comfy_parallel.slots import alone
from comfy_parallel.slots.slot import SlotLocal, current_slot, slots

_prefix: SlotLocal[list[Any]] = SlotLocal(lambda: ["", 0, 0])
_preview_method: SlotLocal[Any] = SlotLocal(lambda: None)
_pillow_lock = threading.Lock()
_files_lock = threading.Lock()


def _set_default_prefix(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_default_prefix(cls: Any, prefix_root: str, call_index: int, graph_index: int = 0) -> None:
        _prefix.set([prefix_root, call_index, graph_index])

    return set_default_prefix


def _alloc_prefix(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def alloc_prefix(
        cls: Any, root: str | None = None, call_index: int | None = None, graph_index: int | None = None
    ) -> str:
        given = (root, call_index, graph_index)
        prefix = _prefix.get()
        chosen = [default if value is None else value for value, default in zip(given, prefix, strict=True)]
        prefix[2] += 1
        return original(cls, *chosen)

    return alloc_prefix


class SlotArgs:
    """The host's command line as `latent_preview` sees it, with the preview method of the slot's own job."""

    def __init__(self, args: Any) -> None:
        self.__dict__["_args"] = args

    def __getattr__(self, name: str) -> Any:
        if name == "preview_method" and current_slot() is not None and (own := _preview_method.get()) is not None:
            return own
        return getattr(self._args, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "preview_method" and current_slot() is not None:
            _preview_method.set(value)
        else:
            setattr(self._args, name, value)


def _pillow(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pillow(fn: Callable[..., Any], arg: Any) -> Any:
        try:
            return fn(arg)
        except (OSError, ValueError):  # What the host retries, with a process-wide setting of PIL changed.
            with _pillow_lock:
                return original(fn, arg)

    return pillow


def _when_others_rest(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        slot = current_slot()
        if slot is not None and any(other.run is not None for other in slots() if other is not slot):
            return None
        return original(*args, **kwargs)

    return run


def _checked(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add_ephemeral_node(self: Any, node_id: Any, node_info: Any, *args: Any, **kwargs: Any) -> None:
        limits.check_nodes(len(self.original_prompt) + len(self.ephemeral_prompt) + 1)
        alone.node_added(node_info, facts.raise_if_interrupted)
        original(self, node_id, node_info, *args, **kwargs)

    return add_ephemeral_node


def _locked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _files_lock:
            return original(*args, **kwargs)

    return run


PATCHES: tuple[Patch, ...] = (
    SlotGlobals(
        target="comfy_execution.progress:global_progress_registry",
        names=("global_progress_registry",),
        why="Starting a job on one slot would replace the progress of the others.",
        until="the host keeps the registry with the executor",
        hazards=(14,),
    ),
    Patch(
        target="comfy_execution.graph_utils:GraphBuilder.set_default_prefix",
        wrap=_set_default_prefix,
        params=("cls", "prefix_root", "call_index", "graph_index"),
        why="Nodes that expand into graphs would get another job's prefix, and now and then its values.",
        until="the host keeps the prefix in a context variable",
        hazards=(15,),
    ),
    Patch(
        target="comfy_execution.graph_utils:GraphBuilder.alloc_prefix",
        wrap=_alloc_prefix,
        params=("cls", "root", "call_index", "graph_index"),
        why="Nodes that expand into graphs would get another job's prefix, and now and then its values.",
        until="the host keeps the prefix in a context variable",
        hazards=(15,),
    ),
    Patch(
        target="comfy_execution.graph:DynamicPrompt.add_ephemeral_node",
        wrap=_checked,
        params=("self", "node_id", "node_info"),
        why="A job that makes ever more nodes holds the interpreter, and with it all slots; one that makes a node which"
        " is unsafe beside others must not run beside them.",
        until="the host bounds a job's nodes, and every node is safe for threads",
    ),
    Patch(
        target="comfy_execution.cache_provider:_get_cache_providers",
        wrap=providers.per_slot,
        optional=True,
        why="A provider that notes which job runs would note another slot's.",
        until="the host tells a provider with each call which job it is for",
    ),
    Patch(
        target="folder_paths:get_save_image_path",
        wrap=save_numbers.reserving,
        params=("filename_prefix", "output_dir"),
        why="Two slots saving at once choose the same file name.",
        until="the host creates files exclusively",
        hazards=(50,),
    ),
    Patch(
        target="latent_preview:args",
        wrap=SlotArgs,
        optional=True,
        why="The preview method of the job that started last would apply to all.",
        until="the host keeps it with the job",
        hazards=(21,),
    ),
    Patch(
        target="node_helpers:pillow",
        wrap=_pillow,
        params=("fn", "arg"),
        optional=True,
        why="Two retries at once leave PIL's LOAD_TRUNCATED_IMAGES on for good.",
        until="PIL takes it per call",
        hazards=(51,),
    ),
    Patch(
        target="hook_breaker_ac10a0:restore_functions",
        wrap=_when_others_rest,
        optional=True,
        why="An idle slot would restore functions under a job of another slot.",
        until="the host restores when its queue is empty",
        hazards=(25,),
    ),
    Patch(
        target="app.assets.seeder:_AssetSeeder.resume",
        wrap=_when_others_rest,
        optional=True,
        why="An idle slot would resume the file scan during another slot's job.",
        until="the host counts pauses",
        hazards=(24,),
    ),
    Patch(
        target="app.assets.services:register_output_files",
        wrap=_locked,
        optional=True,
        why="Several slots would write the asset database at once.",
        until="the host serialises its database writers",
        hazards=(24,),
    ),
)
