"""What the host gives to functions of node packs in the place of its own, and that are too old to take it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def not_taken_by(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the named arguments that the function would refuse; none where it does not tell what it takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return {}
    return {name: value for name, value in given.items() if name not in parameters}
