"""What functions of packs keep from one call to the next, for each slot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from comfy_parallel.isolation.packs.copies import own_copy
from comfy_parallel.slots.own_names import has_own
from comfy_parallel.slots.slot import SlotLocal

_defaults: dict[int, Any] = {}  # by their ids; kept from being freed, which would let others have these


def box() -> Any:
    """A place for variables of a function that runs now: per slot if the import calls it, else the call's own."""
    return SimpleNamespace() if has_own() else _Box()


def remember_default(value: Any) -> Any:
    """Note that this is the default of a parameter."""
    _defaults[id(value)] = value
    return value


def own_default(value: Any) -> Any:
    """The slot's copy of what is the default of a parameter; anything else as it is."""
    return own_copy(value) if id(value) in _defaults and has_own() else value


class _Box:
    """Variables of a function that the import has called; a slot begins with a copy of what that left."""

    __slots__ = ("_own", "_shared")

    def __init__(self) -> None:
        object.__setattr__(self, "_shared", {})
        object.__setattr__(self, "_own", SlotLocal(dict))

    def __getattr__(self, name: str) -> Any:
        values = self._values()
        if name not in values:
            if values is self._shared or name not in self._shared:
                raise NameError(f"name {name!r} is not defined", name=name)
            values[name] = own_copy(self._shared[name])
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._values()[name] = value

    def __delattr__(self, name: str) -> None:
        self._values().pop(name, None)

    def _values(self) -> dict[str, Any]:
        own: dict[str, Any] = self._own.get() if has_own() else self._shared
        return own
