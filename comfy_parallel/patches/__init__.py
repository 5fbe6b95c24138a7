"""Everything we change in the host, in one tuple. Read the modules in this order."""

from __future__ import annotations

from collections.abc import Container

from comfy_parallel.patches import (
    comfy_execution,
    device_choice,
    execution,
    libraries,
    model_management,
    model_turns,
    placements,
    server,
    step_overhead,
    stepping,
    weights,
    worker,
)
from comfy_parallel.patching.engine import Patch

ALL: tuple[Patch, ...] = (
    *execution.PATCHES,
    *server.PATCHES,
    *model_management.PATCHES,
    *device_choice.PATCHES,
    *model_turns.PATCHES,
    *comfy_execution.PATCHES,
    *weights.PATCHES,
    *libraries.PATCHES,
    *step_overhead.PATCHES,
    *stepping.PATCHES,
    *placements.PATCHES,
)


def without(features: Container[str]) -> tuple[Patch, ...]:
    """All patches but those of these features: what is switched off needs no patch."""
    return tuple(patch for patch in ALL if patch.feature not in features)


def of_worker(features: Container[str]) -> tuple[Patch, ...]:
    """The same, for the process of one slot."""
    return (*without(features), *worker.PATCHES)
