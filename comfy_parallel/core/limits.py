"""How many nodes a job may have. The host's work grows with the square of them, and holds the interpreter meanwhile."""

from __future__ import annotations

from comfy_parallel.errors import TooManyNodes

DEFAULT_MAX_NODES = 10_000
_max_nodes = DEFAULT_MAX_NODES


def set_max_nodes(count: int) -> None:
    """Let jobs have this many nodes, those that are made while they run included."""
    global _max_nodes
    _max_nodes = count


def check_nodes(count: int) -> None:
    """Refuse more nodes than a job may have.

    Raises:
        TooManyNodes: saying how many there are, the limit, and the variable that sets it.
    """
    if count > _max_nodes:
        raise TooManyNodes(count, _max_nodes)
