"""Everything we change in the host, in one tuple. Read the modules in this order."""

from __future__ import annotations

from comfy_parallel.patches import executing, execution, graphs, libraries, model_management, server, steps, weights
from comfy_parallel.patching import Patch

ALL: tuple[Patch, ...] = (
    *execution.PATCHES,
    *server.PATCHES,
    *model_management.PATCHES,
    *executing.PATCHES,
    *weights.PATCHES,
    *libraries.PATCHES,
    *steps.PATCHES,
    *graphs.PATCHES,
)
