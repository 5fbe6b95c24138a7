"""What a running job has last told its client of itself, kept for those who look at all slots."""

from __future__ import annotations

import math
from typing import Any

_PREVIEWS = (2, 4)  # the host's binary events with a picture, without and with metadata (protocol.BinaryEventTypes)


class Sight:
    """The last of each kind of event of one run, as it was sent: taking notes is on the way of every step.

    What nodes send may have any shape, so the readers here take nothing for granted.
    """

    __slots__ = ("_cached", "_nodes", "_preview", "_step", "number")

    def __init__(self) -> None:
        self._cached: Any = None
        self._nodes: Any = None
        self._step: Any = None
        self._preview: Any = None
        self.number = 0  # of the preview: another one for each

    def note(self, event: Any, data: Any) -> None:
        """The job sends this event."""
        if event == "progress_state":
            self._nodes = data
        elif event == "progress":
            self._step = data
        elif event in _PREVIEWS:
            self._preview = data
            self.number += 1
        elif event == "execution_cached":
            self._cached = data

    @property
    def node(self) -> Any:
        """The id of the node that has reported its progress last, or that runs; None when none has."""
        step = self._step if isinstance(self._step, dict) else {}
        running = [node for node, state in self._states() if state == "running"]
        node = step.get("node")
        return node if node in running or not running else running[-1]

    @property
    def step(self) -> tuple[float, float] | None:
        """How far that node is, of how much."""
        step = self._step if isinstance(self._step, dict) else {}
        if step.get("node") != self.node:
            return None
        value, most = step.get("value"), step.get("max")
        if not isinstance(value, int | float) or not isinstance(most, int | float):
            return None
        return (value, most) if math.isfinite(value) and math.isfinite(most) and most > 0 else None

    @property
    def nodes_done(self) -> int:
        """How many nodes have ended, or were not needed because their results were cached."""
        cached = self._cached.get("nodes") if isinstance(self._cached, dict) else None
        ended = {node for node, state in self._states() if state == "finished"}
        return len(ended | {node for node in cached if isinstance(node, str)} if isinstance(cached, list) else ended)

    @property
    def image(self) -> tuple[Any, int | None] | None:
        """The preview, as PIL has it, and the longest side that it should be shown with."""
        preview = self._preview
        if isinstance(preview, tuple) and len(preview) == 2:  # with metadata
            preview = preview[0]
        if not isinstance(preview, tuple) or len(preview) != 3 or not hasattr(preview[1], "save"):
            return None
        return preview[1], preview[2] if isinstance(preview[2], int) and preview[2] > 0 else None

    def _states(self) -> list[tuple[Any, Any]]:
        nodes = self._nodes.get("nodes") if isinstance(self._nodes, dict) else None
        items = list(nodes.items()) if isinstance(nodes, dict) else []
        return [(name, state.get("state")) for name, state in items if isinstance(state, dict)]
