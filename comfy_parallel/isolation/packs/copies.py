"""A slot's own copy of what a pack keeps: containers and the pack's own objects are copied, all else stays one."""

from __future__ import annotations

import collections
import copy
import functools
import logging
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from comfy_parallel.slots.slot import SlotLocal, current_slot

logger = logging.getLogger(__name__)

PACK = "__comfy_parallel_pack__"  # in a module: the pack that it belongs to
_CONTAINERS = (dict, list, set, collections.deque, bytearray)
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)

_modules: dict[str, list[types.ModuleType]] = {}  # of packs, by name

# Original id -> (original, copy). Two names of one thing stay two names of one thing; originals are kept from being
# freed, which would let others have their ids.
_copies: SlotLocal[dict[int, tuple[Any, Any]]] = SlotLocal(dict)


def own_copy(value: Any) -> Any:
    """The calling slot's copy of a value; devices become the slot's own."""
    return _copy(here(value), _copies.get())


def here(value: Any) -> Any:
    """The slot's device for the first one, which is what code that chose a device at import has."""
    slot = current_slot()
    if slot is None or ":" not in slot.device:
        return value
    kind = slot.device.partition(":")[0]
    if isinstance(value, str):
        return slot.device if value == f"{kind}:0" else value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.device) and value == torch.device(kind, 0):
        return torch.device(slot.device)
    return value


def note_module(module: types.ModuleType, root: str) -> None:
    """Remember a module of a pack, which may take it out of `sys.modules` and go on using it."""
    vars(module)[PACK] = root
    named = _modules.setdefault(module.__name__, [])
    if not any(module is one for one in named):
        named.append(module)


def is_of_a_pack(cls: type) -> bool:
    """Whether a class is written in a node pack."""
    return cls.__module__ in _modules


def module_of(cls: type) -> types.ModuleType | None:
    """The module at whose level a class is written, where it is still to be found there."""
    named = (*_modules.get(cls.__module__, ()), sys.modules.get(cls.__module__))
    return next((module for module in named if module is not None and _found_in(module, cls.__qualname__) is cls), None)


def _found_in(module: types.ModuleType, qualname: str) -> Any:
    found: Any = module
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, types.ModuleType | type) else None
    return found


def _copy(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) in known:
        return known[id(value)][1]
    make = _maker(value)
    if make is None:
        return here(value) if type(value).__name__ == "device" else value
    made = make(value, known)
    known[id(value)] = (value, made)
    return made


def _maker(value: Any) -> Callable[[Any, dict[int, tuple[Any, Any]]], Any] | None:
    kind = type(value)
    if isinstance(value, type | types.ModuleType | types.FunctionType):
        return None
    if kind is tuple:
        return _tuple
    if kind.__module__ in ("builtins", "collections") and isinstance(value, _CONTAINERS):
        return _container
    if isinstance(value, _WEAK):
        return lambda value, known: value.copy()
    if kind is functools.partial:
        return _partial
    if (copied := _COPIED.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
        return lambda value, known: copied(value)
    if kind is types.SimpleNamespace or kind.__name__ == "Namespace" or is_of_a_pack(kind):
        return _object
    return None


# Arrays, generators and iterators, by their types' names: this package runs without torch and numpy.
_COPIED: dict[str, Callable[[Any], Any]] = {
    "torch.Tensor": lambda value: value if value.requires_grad else value.clone(),
    "torch._C.Generator": lambda value: value.clone_state(),
    "numpy.ndarray": copy.copy,
    "numpy.random.mtrand.RandomState": copy.deepcopy,
    "numpy.random._generator.Generator": copy.deepcopy,
    "random.Random": copy.copy,
    "builtins.list_iterator": copy.copy,
    "builtins.tuple_iterator": copy.copy,
}


def _partial(value: functools.partial[Any], known: dict[int, tuple[Any, Any]]) -> functools.partial[Any]:
    given = [_copy(argument, known) for argument in value.args]
    return functools.partial(
        value.func, *given, **{name: _copy(argument, known) for name, argument in value.keywords.items()}
    )


def _tuple(value: tuple[Any, ...], known: dict[int, tuple[Any, Any]]) -> tuple[Any, ...]:
    made = tuple(_copy(item, known) for item in value)
    return value if all(new is old for new, old in zip(made, value, strict=True)) else made


def _container(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    made = copy.copy(value)
    known[id(value)] = (value, made)
    _copy_items(made, known)
    return made


def _copy_items(made: Any, known: dict[int, tuple[Any, Any]]) -> None:
    if isinstance(made, dict):
        for key, item in list(made.items()):
            dict.__setitem__(made, key, _copy(item, known))
    elif isinstance(made, list | collections.deque):
        for position, item in enumerate(list(made)):
            made[position] = _copy(item, known)


def _object(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    """Without running the class's own code, which may take locks, count or give out the one object it has."""
    base = next((base for base in (dict, list, set, types.SimpleNamespace) if isinstance(value, base)), object)
    try:
        made = base.__new__(type(value))
    except TypeError:
        logger.warning("%s objects cannot be copied: all slots share this one", type(value).__qualname__)
        return value
    known[id(value)] = (value, made)
    if base in (dict, list, set):
        getattr(base, "extend" if base is list else "update")(made, value)
        _copy_items(made, known)
    for name, item in getattr(value, "__dict__", {}).items():
        vars(made)[name] = _copy(item, known)
    for slot_name in _slot_names(type(value)):
        if hasattr(value, slot_name):
            object.__setattr__(made, slot_name, _copy(getattr(value, slot_name), known))
    return made


def _slot_names(kind: type) -> list[str]:
    names = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    flat = [name for each in names for name in ((each,) if isinstance(each, str) else each)]
    return [name for name in flat if name not in ("__dict__", "__weakref__")]
