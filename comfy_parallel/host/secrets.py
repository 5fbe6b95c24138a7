"""What of a job's data must not be on disk, and which jobs cannot run without it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

from comfy_parallel.host import facts

logger = logging.getLogger(__name__)

_NAMES = ("auth_token_comfy_org", "api_key_comfy_org")  # of hosts that do not say


def names() -> tuple[str, ...]:
    """The fields of a job's `extra_data` that the host keeps out of its history."""
    import execution

    return tuple(getattr(execution, "SENSITIVE_EXTRA_DATA_KEYS", _NAMES))


def asked_for(workflow: Any, lost: Iterable[str]) -> list[str]:
    """Those of the lost fields that nodes of the workflow ask for, as hidden inputs."""
    wanted = set(lost)
    if not wanted or not isinstance(workflow, dict):
        return []
    classes = facts.node_classes()
    used = {node.get("class_type") for node in workflow.values() if isinstance(node, dict)}
    return sorted(wanted & {name for known in used if known in classes for name in _hidden_inputs(classes[known])})


@cache
def _hidden_inputs(node_class: Any) -> frozenset[str]:
    try:
        hidden = node_class.INPUT_TYPES().get("hidden", {})
    except Exception as error:  # noqa: BLE001 - a node's own code; the host asks it again when the job runs
        logger.warning("comfy_parallel: the inputs of %s cannot be read: %r", node_class.__name__, error)
        return frozenset()
    kinds = [kind[0] if isinstance(kind, tuple | list) and kind else kind for kind in hidden.values()]
    return frozenset(str(getattr(kind, "value", kind)).lower() for kind in kinds)
