"""What jobs have in common that take about as long on one slot: their nodes, models and sizes. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

_SIZES = ("steps", "width", "height", "batch_size", "length", "frames", "num_frames", "seconds", "upscale_by")


def kind_of(workflow: Any, models: frozenset[str] = frozenset()) -> Hashable:
    """Equal for jobs of one kind; None for what is no workflow. `models`: the weight files that it names."""
    if not isinstance(workflow, dict):
        return None
    nodes = sorted(_of_node(node) for node in workflow.values() if isinstance(node, dict))
    return tuple(nodes), models


def _of_node(node: dict[str, Any]) -> tuple[str, tuple[tuple[str, float], ...]]:
    inputs = node.get("inputs")
    given = inputs if isinstance(inputs, dict) else {}
    sizes = tuple((name, float(given[name])) for name in _SIZES if type(given.get(name)) in (int, float))
    return str(node.get("class_type")), sizes
