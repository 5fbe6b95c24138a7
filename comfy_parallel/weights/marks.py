"""What the host sets on a model's modules when it loads them whole, set again without its going through them all.

It goes through a thousand modules several times in each load and holds up the other slots meanwhile. On a module that
nothing patches, whose weights are on the device already, it sets the same attributes every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

from comfy_parallel.patching import replace
from comfy_parallel.slot import SlotLocal
from comfy_parallel.weights import leaves, loading
from comfy_parallel.weights.turns import turn

_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()
_LEAST = 2  # Of fewer, `itemgetter` makes no tuple. Every module of torch has three: `training`, and two of its hooks'.


@dataclass(slots=True)
class _Marks:
    """What a load did to the attributes of a module.

    Attributes:
        build: what the module is made of.
        names: of all attributes that it had before.
        get: those that can be compared, from `vars(module)`.
        before: their values.
        types: and the types of these.
        after: those that were set.
        lists: and those that were set to an empty list.
        are_any: whether anything was set.
    """

    module: ref[Any]
    build: tuple[Any, ...]
    names: tuple[str, ...]
    get: itemgetter[Any]
    before: tuple[Any, ...]
    types: tuple[type, ...]
    after: dict[str, Any]
    lists: tuple[str, ...]
    are_any: bool

    def would_be_set(self, module: Any) -> bool:
        """Whether the module is as it was before that load."""
        now = vars(module)
        if self.module() is not module or tuple(now) != self.names or _build(module) != self.build:
            return False
        values = self.get(now)  # Their types are compared first: tensors do not compare.
        return tuple(map(type, values)) == self.types and bool(values == self.before)

    def set_on(self, module: Any) -> None:
        attributes = vars(module)
        attributes.update(self.after)
        for name in self.lists:
            attributes[name] = []


@dataclass(slots=True)
class _Known:
    """The marks on a model's modules, by name, after loads with these settings."""

    settings: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, _Marks] = field(default_factory=dict)


@dataclass(slots=True)
class _Load:
    """A load that is under way.

    Attributes:
        listed: the modules that the host sees, by name; the last one stands for those that are left out.
        size: of these, in bytes.
    """

    model: Any
    device: Any
    listed: list[tuple[str, Any]]
    size: int


_known: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_load: SlotLocal[_Load | None] = SlotLocal(lambda: None)


@contextmanager
def whole_load(
    patcher: Any, named_modules: Sequence[tuple[str, Any]], device: Any, done: Mapping[str, int]
) -> Iterator[None]:
    """The body is the host's load of this patcher's model, whole, whose weights have been copied to the device, and of
    which nobody but the host is told.

    The host's list of what it has to load leaves out the modules that get the same marks as the last time, but for one
    that stands for them.

    Args:
        named_modules: all of the model's.
        done: the bytes of modules, by name, that have been copied and hold no others.
    """
    if _have_moves_of_their_own([module for _, module in named_modules]):
        yield
        return
    known = _known.setdefault(patcher.model, _Known())
    settings = {**_settings(patcher), "to": device}
    if known.settings != settings:
        known.settings, known.marks = settings, {}
    patched = _patched_modules(patcher)
    same: list[tuple[str, Any, _Marks]] = []
    listed: list[tuple[str, Any]] = []
    with turn():
        for name, module in named_modules:
            marks = known.marks.get(name)
            is_there = name in done or loading.is_on(module, device)
            if marks is None or name in patched or not is_there or not marks.would_be_set(module):
                listed.append((name, module))
            elif marks.are_any:
                same.append((name, module, marks))
    others = [(name, module, dict(vars(module))) for name, module in listed if name and name not in patched]
    with _leaving_out(same, patcher, device, listed, done):
        yield
    for name, module, before in others:
        known.marks.pop(name, None)
        if (new := _marks(module, before)) is not None:
            known.marks[name] = new


def size_beside(module: Any) -> int:
    """The bytes of the modules that this one stands for in the host's list."""
    load = _load.get()
    return load.size if load is not None and load.listed[-1][1] is module else 0


def left_to_move(model: Any, device: Any) -> list[Any] | None:
    """The modules of a model that may not be on this device yet, if its load there is under way."""
    load = _load.get()
    if load is None or load.model is not model or load.device != device:
        return None
    return [module for _, module in load.listed]


@contextmanager
def _leaving_out(
    same: list[tuple[str, Any, _Marks]],
    patcher: Any,
    device: Any,
    listed: list[tuple[str, Any]],
    done: Mapping[str, int],
) -> Iterator[None]:
    """Within, the host's list of what it has to load has the modules listed, and one of the others for all."""
    if not same:
        yield
        return
    name, stand_in, _ = same.pop()
    size = sum(done[name] if name in done else leaves.size_of(module) or 0 for name, module, _ in same)
    load = _Load(patcher.model, device, [*listed, (name, stand_in)], size)

    def load_list(*args: Any, **kwargs: Any) -> Any:
        is_shorter.revert()
        with turn():
            for _, module, marks in same:
                marks.set_on(module)
        is_seen = replace(load.model, "named_modules", lambda *args, **kwargs: iter(load.listed))
        try:
            return patcher._load_list(*args, **kwargs)
        finally:
            is_seen.revert()

    outer = _load.get()
    _load.set(load)
    is_shorter = replace(patcher, "_load_list", load_list)
    try:
        yield
    finally:
        _load.set(outer)
        if vars(patcher).get("_load_list") is load_list:
            is_shorter.revert()


def _marks(module: Any, before: dict[str, Any]) -> _Marks | None:
    """What has been set on a module since; None if that cannot be set again."""
    now = vars(module)
    after = {name: value for name, value in now.items() if before.get(name, _ABSENT) is not value}
    plain = {name: _own(value) for name, value in before.items() if _is_plain(value)}
    is_complete = before.keys() <= now.keys() and all(map(_is_plain, after.values()))
    if not is_complete or not plain.keys() >= after.keys() & before.keys() or len(plain) < _LEAST:
        return None
    values = tuple(plain.values())
    return _Marks(
        module=ref(module),
        build=_build(module),
        names=tuple(before),
        get=itemgetter(*plain),
        before=values,
        types=tuple(map(type, values)),
        after={name: value for name, value in after.items() if type(value) is not list},
        lists=tuple(name for name, value in after.items() if type(value) is list),
        are_any=bool(after),
    )


def _build(module: Any) -> tuple[Any, ...]:
    return (type(module), tuple(module._parameters), tuple(module._buffers), tuple(module._modules))


def _is_plain(value: Any) -> bool:
    """Whether it can be compared, and set on another module."""
    return type(value) in _PLAIN or (type(value) is list and not value)


def _own(value: Any) -> Any:
    """Each holder of a list has its own."""
    return [] if type(value) is list else value


def _settings(patcher: Any) -> dict[str, Any]:
    """Those that what a patcher does to all modules alike may depend on."""
    return {name: _own(value) for name, value in vars(patcher).items() if _is_plain(value)}


def _patched_modules(patcher: Any) -> set[str]:
    """Those of which something is a key in one of the patcher's tables, such as its patches."""
    tables: list[Any] = [table for table in vars(patcher).values() if isinstance(table, dict | set)]
    return {key.rpartition(".")[0] for table in tables for key in table if isinstance(key, str)}


def _have_moves_of_their_own(modules: Sequence[Any]) -> bool:
    import torch

    kinds: set[Any] = set(map(type, modules))
    return not loading.move_as_torch_does(modules) or any(kind.to is not torch.nn.Module.to for kind in kinds)
