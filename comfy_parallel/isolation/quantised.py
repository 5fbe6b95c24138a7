"""Layers of quantised models, on hosts that keep a model's settings as attributes of one class for all models.

Such a host writes the settings to the class when it starts to build a model, and reads them while it builds and loads
that. Here each model that a slot builds gets a class of its own, as newer hosts make one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from comfy_parallel.patching.namespaces import with_globals
from comfy_parallel.slots.slot import current_slot


def picking_own(original: FunctionType, shared: type | None) -> Callable[..., Any]:
    """Wrap the host's choice of layer classes.

    Args:
        shared: the host's class; None on hosts that make one per model.
    """
    if shared is None:
        return original

    @functools.wraps(original)
    def pick_operations(*args: Any, **kwargs: Any) -> Any:
        if current_slot() is None:
            return original(*args, **kwargs)
        return with_globals(original, **{shared.__name__: own_class(shared)})(*args, **kwargs)

    return pick_operations


def own_class(shared: type) -> type:
    """A class like the host's whose layers read the settings of this one, by the name that the host's code uses."""
    own = type(shared.__name__, (shared,), {"__module__": shared.__module__, "__qualname__": shared.__qualname__})
    for name, layer in vars(shared).items():
        if isinstance(layer, type):
            setattr(own, name, _own_layer(layer, own))
    return own


def _own_layer(layer: type, own: type) -> type:
    names: dict[str, Any] = {"__module__": layer.__module__, "__qualname__": layer.__qualname__}
    for name, method in vars(layer).items():
        if isinstance(method, FunctionType) and own.__name__ in method.__code__.co_names:
            names[name] = with_globals(method, **{own.__name__: own})
    return type(layer.__name__, (layer,), names)
