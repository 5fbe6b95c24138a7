"""Patches on what the host does in Python at every step: it gets the same, and holds the interpreter for less time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from comfy_parallel.patching.engine import Patch
from comfy_parallel.patching.namespaces import View, with_globals
from comfy_parallel.slots import device

SPEED = "speed"
_LOCK = "all slots share one interpreter lock"


def _with_lasting_namedtuples(collections: Any) -> View:
    """`collections` as `comfy.samplers` sees it: a namedtuple class is made once, and not for each conditioning."""
    make = functools.cache(functools.partial(collections.namedtuple, module="comfy.samplers"))

    @functools.wraps(collections.namedtuple)
    def namedtuple(typename: str, field_names: Iterable[str], **options: Any) -> Any:
        if options:
            return collections.namedtuple(typename, field_names, **{"module": "comfy.samplers", **options})
        return make(typename, field_names if isinstance(field_names, str) else tuple(field_names))

    return View(collections, namedtuple=namedtuple)


def _reading_stats(original: FunctionType, torch: Any) -> FunctionType:
    cuda = View(torch.cuda, memory_stats=device.stats_reader(torch.cuda))
    return with_globals(original, torch=View(torch, cuda=cuda))


def _keeping_cache(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def reset_cast_buffers() -> None:
        with device.after_node():
            original()

    return reset_cast_buffers


PATCHES: tuple[Patch, ...] = (
    Patch(
        target="comfy.samplers:collections",
        wrap=_with_lasting_namedtuples,
        spare=True,
        feature=SPEED,
        why=f"Each step makes a class per conditioning, from source text, and {_LOCK}.",
        until="the host makes the class once",
    ),
    Patch(
        target="comfy.model_management:get_free_memory",
        wrap=_reading_stats,
        needs=("torch",),
        spare=True,
        feature=SPEED,
        why=f"Each step has torch flatten 80 numbers in Python, of which two are read, and {_LOCK}.",
        until="the host or torch asks for single numbers",
    ),
    Patch(
        target="comfy.model_management:reset_cast_buffers",
        wrap=_keeping_cache,
        optional=True,
        why="After each node torch's cache is given back; the next node waits until the driver has given it out again.",
        until="the host looks at how much memory is free",
    ),
)
