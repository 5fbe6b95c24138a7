"""Patches on the host of a worker process: it listens on no port, and what it tells goes to the front."""

from __future__ import annotations

from comfy_parallel.fleet import worker_side
from comfy_parallel.patching.engine import Patch

PATCHES: tuple[Patch, ...] = (
    Patch(
        target="server:PromptServer.send_sync",
        wrap=worker_side.telling_front,
        params=("self", "event", "data", "sid"),
        why="The clients of a worker's jobs are connected to the front.",
        until="the host can send its events elsewhere",
    ),
    Patch(
        target="server:PromptServer.send",
        wrap=worker_side.telling_front_later,
        params=("self", "event", "data", "sid"),
        why="The clients of a worker's jobs are connected to the front.",
        until="the host can send its events elsewhere",
    ),
    Patch(
        target="server:PromptServer.start_multi_address",
        wrap=worker_side.not_listening,
        params=("self", "addresses"),
        why="The front has the port; a second one without its guards must not be open.",
        until="the host can start without a port",
    ),
)
