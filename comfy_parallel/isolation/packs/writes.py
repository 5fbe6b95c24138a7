"""What a pack's code writes to modules, classes and the host's settings while a job runs becomes the slot's own."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, MutableMapping
from types import ModuleType
from typing import Any

from comfy_parallel.isolation.packs import streams
from comfy_parallel.isolation.packs.copies import PACK, is_of_a_pack, module_of
from comfy_parallel.isolation.packs.redirect import Unredirectable, redirect
from comfy_parallel.isolation.packs.rewrite import Plan
from comfy_parallel.slots import own_attributes, switches
from comfy_parallel.slots.own_names import has_own, namespace_of

logger = logging.getLogger(__name__)

SHARED = "__comfy_parallel_shared__"  # in a pack's module: the names that must stay one
PLAN = "__comfy_parallel_plan__"  # in a module: what was rewritten of it
_lock = threading.RLock()


def owner(value: Any) -> Any:
    """What stands in for `value` in `value.name = …`: itself, or what makes the write the slot's own."""
    if isinstance(value, type):
        return _Writer(value, _of_class) if _lives_in_a_module(value) else value
    if not has_own():
        return value
    if value is sys:
        return _Writer(value, _of_interpreter)
    if isinstance(value, ModuleType):
        return _Writer(value, _of_module) if _has_own_names(value) else value
    return _Writer(value, _of_settings) if is_settings(value) else value


def set_attribute(target: Any, name: str, value: Any) -> None:
    """`setattr`, by a pack's code."""
    setattr(owner(target), name, value)


def delete_attribute(target: Any, name: str) -> None:
    """`delattr`, by a pack's code."""
    delattr(owner(target), name)


def set_raw(kind: Any, target: Any, name: str, value: Any) -> None:
    """`type.__setattr__` and `object.__setattr__`, by a pack's code."""
    found = owner(target)
    if found is target:
        kind.__setattr__(target, name, value)
    else:
        setattr(found, name, value)


def namespace(value: Any) -> Any:
    """`vars(value)`, by a pack's code that writes to it."""
    found = owner(value)
    return _Attributes(found) if isinstance(found, _Writer) else vars(value)


class _Writer:
    """Takes the writes to a module, class or settings object."""

    __slots__ = ("_kind", "_target")

    def __init__(self, target: Any, kind: Callable[[Any, str, Any], None]) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_kind", kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        with _lock:
            self._kind(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        with _lock:
            self._kind(self._target, name, _DELETED)


class _Attributes(MutableMapping[str, Any]):
    """A namespace that is written to."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._names = vars(writer._target)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names and not isinstance(self._writer._target, ModuleType):
            raise KeyError(name)
        try:
            return getattr(self._writer, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._writer, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._writer, name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_DELETED: Any = object()


def _of_module(module: ModuleType, name: str, value: Any) -> None:
    kept = getattr(type(module), name, None)
    namespace = namespace_of(module, is_host=PACK not in vars(module))
    if name not in namespace.names:
        if name in vars(module).get(SHARED, ()) or hasattr(type(kept), "__set__"):
            switches.note(module, name)
            _plainly(module, name, value)
            return
        namespace.add(name)  # Before the functions ask for it.
        try:
            redirect(namespace, name, _plan_of(module))
        except Unredirectable as reason:
            logger.warning("A job writes %s.%s for all slots: %s", module.__name__, name, reason)
            namespace.remove(name)
    _plainly(module, name, value)


def _of_class(cls: type, name: str, value: Any) -> None:
    if f"{cls.__qualname__}.{name}" in vars(module_of(cls) or sys).get(SHARED, ()):
        _plainly(cls, name, value)
    elif value is _DELETED:
        own_attributes.delete(cls, name, is_host=not is_of_a_pack(cls))
    else:
        own_attributes.write(cls, name, value, is_host=not is_of_a_pack(cls))


def _of_interpreter(interpreter: Any, name: str, value: Any) -> None:
    if name in streams.NAMES and value is not _DELETED:
        streams.put(name, value)
    else:
        _plainly(interpreter, name, value)


def _of_settings(settings: Any, name: str, value: Any) -> None:
    if not hasattr(getattr(type(settings), name, None), "__set__"):
        namespace_of(settings, is_host=True).add(name)
    _plainly(settings, name, value)


def _plainly(target: Any, name: str, value: Any) -> None:
    if value is _DELETED:
        delattr(target, name)
    else:
        setattr(target, name, value)


def _plan_of(module: ModuleType) -> Plan:
    plan: Plan = vars(module).setdefault(PLAN, Plan(is_pack=False))
    return plan


def _has_own_names(module: ModuleType) -> bool:
    """Python's names for all modules are read by code in C, which does not ask for a slot's."""
    if PACK in vars(module):
        return True
    return module.__name__ not in ("sys", "builtins") and sys.modules.get(module.__name__) is module


def _lives_in_a_module(cls: type) -> bool:
    """Not one that a job has made, nor one whose own rules say what a write does."""
    if type(cls).__setattr__ is not type.__setattr__:
        return False
    return bool(cls.__flags__ & _HEAP) and module_of(cls) is not None


_HEAP = 1 << 9


def is_settings(value: Any) -> bool:
    """The host's command line arguments."""
    module = sys.modules.get("comfy.cli_args")
    return module is not None and value is vars(module).get("args")
