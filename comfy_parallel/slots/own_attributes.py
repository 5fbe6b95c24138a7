"""Attributes of classes that a slot has its own values of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_parallel.slots.own_names import OwnName, has_own

_MISSING: Any = object()


def _nothing() -> Any:
    """The shared value of an attribute that a class does not have itself."""
    raise KeyError


class SlotAttribute:
    """Stands in a class for one of its attributes, and gives each slot its own of it.

    A subclass that a slot writes to gets a value of its own, as Python does it. It compares equal to the shared
    value: who looks for replaced functions of a class sees none.
    """

    def __init__(self, owner: type, name: str, *, start: Callable[[Any], Any] | None = None, is_host: bool) -> None:
        self.owner, self.name, self.is_host = owner, name, is_host
        self.shared = vars(owner).get(name, _MISSING)
        self._values: dict[type, OwnName] = {owner: OwnName(self._shared, start=start, is_host=is_host)}

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        value = self._seen_by(type(instance) if owner is None else owner, instance)
        bind = getattr(type(value), "__get__", None)
        return value if bind is None else bind(value, instance, owner)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.shared

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """For who takes a function out of a class's namespace and calls it."""
        return self._seen_by(self.owner, None)(*args, **kwargs)

    def write(self, owner: type, value: Any) -> None:
        """Set the attribute of `owner`, which is this class or a subclass, for the calling slot."""
        if value is self:  # It was taken out of the class's namespace, to be put back.
            value = self.shared
        if owner not in self._values:
            self._values[owner] = OwnName(_nothing, is_host=self.is_host)
        self._values[owner].set(value)

    def delete(self, owner: type) -> None:
        """Delete the attribute of `owner` for the calling slot.

        Raises:
            AttributeError: it has none.
        """
        try:
            self._values[owner].delete()
        except KeyError:
            raise self._absent(owner) from None

    def _seen_by(self, owner: type, instance: Any) -> Any:
        if len(self._values) == 1:
            owner = self.owner
        for base in owner.__mro__ if owner is not self.owner else (self.owner,):
            name = self._values.get(base)
            if name is not None:
                try:
                    return name.get()
                except KeyError:
                    pass
            if base is self.owner:
                break
        return self._inherited(owner, instance)

    def _inherited(self, owner: type, instance: Any) -> Any:
        """As if this class had no such attribute."""
        for base in self.owner.__mro__[1:]:
            if self.name in vars(base):
                return vars(base)[self.name]
        raise self._absent(owner)

    def _shared(self) -> Any:
        if self.shared is _MISSING:
            raise KeyError
        return self.shared

    def _absent(self, owner: type) -> AttributeError:
        return AttributeError(f"type object {owner.__name__!r} has no attribute {self.name!r}")


class SlotDataAttribute(SlotAttribute):
    """The same where a value may be a property or the like, which objects' own attributes do not hide."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        value = self._seen_by(type(instance) if owner is None else owner, instance)
        if instance is not None and not hasattr(type(value), "__set__") and self.name in vars(instance):
            return vars(instance)[self.name]
        bind = getattr(type(value), "__get__", None)
        return value if bind is None else bind(value, instance, owner)

    def __set__(self, instance: Any, value: Any) -> None:
        seen = self._value_for(instance)
        if hasattr(type(seen), "__set__"):
            type(seen).__set__(seen, instance, value)
        else:
            vars(instance)[self.name] = value

    def __delete__(self, instance: Any) -> None:
        seen = self._value_for(instance)
        if hasattr(type(seen), "__delete__"):
            type(seen).__delete__(seen, instance)
        elif self.name in vars(instance):
            del vars(instance)[self.name]
        else:
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self.name!r}")

    def _value_for(self, instance: Any) -> Any:
        try:
            return self._seen_by(type(instance), instance)
        except AttributeError:
            return None


_installed: list[SlotAttribute] = []


def own_attribute(
    owner: type, name: str, *, start: Callable[[Any], Any] | None = None, is_host: bool, example: Any = None
) -> SlotAttribute:
    """The slots' attribute of this name that `owner` has, put there if it has none. `example` is a value to come."""
    found = vars(owner).get(name)
    is_data = hasattr(type(example), "__set__") or hasattr(type(found), "__set__")
    if isinstance(found, SlotAttribute):
        if is_data and not isinstance(found, SlotDataAttribute):
            found.__class__ = SlotDataAttribute
            setattr(owner, name, found)  # Python looks at a descriptor's abilities when a class gets it.
        return found
    attribute = (SlotDataAttribute if is_data else SlotAttribute)(owner, name, start=start, is_host=is_host)
    setattr(owner, name, attribute)
    _installed.append(attribute)
    return attribute


def write(owner: type, name: str, value: Any, *, is_host: bool) -> None:
    """Set an attribute of a class for the calling slot; of the class itself outside slots."""
    found = _standing_for(owner, name)
    if not has_own():
        if found is not None and found.owner is owner:
            found.shared = value
        else:
            setattr(owner, name, value)
    elif found is not None and name not in vars(owner):
        found.write(owner, value)
    else:
        own_attribute(owner, name, is_host=is_host, example=value).write(owner, value)


def delete(owner: type, name: str, *, is_host: bool) -> None:
    """Delete an attribute of a class for the calling slot.

    Raises:
        AttributeError: it has none.
    """
    found = _standing_for(owner, name)
    if found is None and name not in vars(owner):
        raise AttributeError(f"type object {owner.__name__!r} has no attribute {name!r}")
    if not has_own():
        if isinstance(found, SlotAttribute) and found.owner is owner and found.shared is not _MISSING:
            found.shared = _MISSING
        else:
            delattr(owner, name)
    else:
        (found or own_attribute(owner, name, is_host=is_host)).delete(owner)


def _standing_for(owner: type, name: str) -> SlotAttribute | None:
    for base in owner.__mro__:
        if name in vars(base):
            found = vars(base)[name]
            return found if isinstance(found, SlotAttribute) else None
    return None


def revert() -> None:
    """Put the shared values back. Only sensible while no job runs."""
    while _installed:
        attribute = _installed.pop()
        if vars(attribute.owner).get(attribute.name) is attribute:
            if attribute.shared is _MISSING:
                delattr(attribute.owner, attribute.name)
            else:
                setattr(attribute.owner, attribute.name, attribute.shared)
