"""What the host sets on a model's modules when it loads them whole, set again without its going through them all.

It goes through a thousand modules several times in each load and holds up the other slots meanwhile. On a module that
nothing patches, whose weights are on the device already, it sets the same attributes every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from operator import call, itemgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from comfy_parallel.patching.engine import replace
from comfy_parallel.slots.slot import SlotLocal
from comfy_parallel.weights import loading
from comfy_parallel.weights.gpu import leaves
from comfy_parallel.weights.gpu.turns import turn

if TYPE_CHECKING:  # Linux only
    from comfy_parallel.weights.gpu.plans import Plan

_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()
_LEAST = 2  # Of fewer, `itemgetter` makes no tuple. Every module of torch has three: `training`, and two of its hooks'.
_COMPARED = ("module", "build", "names", "types", "before", "after", "lists")  # Types first: True is 1.


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

    def is_like(self, other: _Marks) -> bool:
        """Whether the same was set on a module that was as before."""
        return all(getattr(self, name) == getattr(other, name) for name in _COMPARED)

    def set_on(self, module: Any) -> None:
        attributes = vars(module)
        attributes.update(self.after)
        for name in self.lists:
            attributes[name] = []


@dataclass(slots=True)
class _Sorted:
    """What a load does with a model's modules.

    Attributes:
        left_out: what is set on those that the host does not see.
        size: of these, in bytes.
        stand_in: the number of the one that stands for them.
        others: the numbers of those that are not as before.
    """

    left_out: list[_Marks]
    size: int
    stand_in: int
    others: list[int]


class _Again:
    """A look in C, at all modules that were as before in a load, that tells whether they are so again.

    Attributes:
        found: what that load did.
    """

    def __init__(
        self,
        plan: Plan,
        patched: set[str],
        modules: Sequence[tuple[str, Any]],
        same: Mapping[int, _Marks],
        found: _Sorted,
    ) -> None:
        """`plan`: it sees that the modules are built as they were. `same`: what is set on those, by number."""
        self.found = found
        self._plan, self._patched = plan, patched
        self._get_same: Any = itemgetter(*same)
        self._elsewhere = [number for number in same if _may_be_elsewhere(*modules[number], plan.done)]
        self._names = [marks.names for marks in same.values()]
        self._gets = [marks.get for marks in same.values()]
        self._values = list(chain.from_iterable(marks.before for marks in same.values()))
        self._types = list(map(type, self._values))

    def is_so(self, plan: Plan | None, patched: set[str], modules: Sequence[Any], device: Any) -> bool:
        if plan is not self._plan or patched != self._patched:
            return False
        attributes = list(map(vars, self._get_same(modules)))
        if list(map(tuple, attributes)) != self._names:
            return False
        values = list(chain.from_iterable(map(call, self._gets, attributes)))
        is_equal = list(map(type, values)) == self._types and values == self._values  # Tensors do not compare.
        return is_equal and all(loading.is_on(modules[number], device) for number in self._elsewhere)


@dataclass(slots=True)
class _Known:
    """The marks on a model's modules, by name, after loads with these settings."""

    settings: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, _Marks] = field(default_factory=dict)
    again: _Again | None = None


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
    patcher: Any, named_modules: Sequence[tuple[str, Any]], device: Any, plan: Plan | None
) -> Iterator[None]:
    """The body is the host's load of this patcher's model, whole, whose weights have been copied to the device, and of
    which nobody but the host is told.

    The host's list of what it has to load leaves out the modules that get the same marks as the last time, but for one
    that stands for them.

    Args:
        named_modules: all of the model's.
        plan: of what has been copied; None where nothing was.
    """
    modules = [module for _, module in named_modules]
    if _have_moves_of_their_own(modules):
        yield
        return
    known = _known.setdefault(patcher.model, _Known())
    settings = {**_settings(patcher), "to": device}
    if known.settings != settings:
        known.settings, known.marks, known.again = settings, {}, None
    patched = _patched_modules(patcher)
    with turn():
        if known.again is not None and not known.again.is_so(plan, patched, modules, device):
            known.again = None
        if known.again is not None:
            found = known.again.found
        else:
            done = plan.done if plan is not None else {}
            same = _same(known.marks, patched, named_modules, device, done)
            found = _sorted(same, named_modules, done)
            if plan is not None and len(same) >= _LEAST:
                known.again = _Again(plan, patched, named_modules, same, found)
    others = [named_modules[number] for number in found.others]
    unpatched = [(name, module, dict(vars(module))) for name, module in others if name and name not in patched]
    seen = [*others, named_modules[found.stand_in]]
    with _leaving_out(found, patcher, device, seen) if found.left_out else nullcontext():
        yield
    for name, module, before in unpatched:
        old = known.marks.pop(name, None)
        if (new := _marks(module, before)) is not None:
            known.marks[name] = new
            if old is None or not new.is_like(old):
                known.again = None  # It may be the same the next time.


def _same(
    known: Mapping[str, _Marks],
    patched: set[str],
    named_modules: Sequence[tuple[str, Any]],
    device: Any,
    done: Mapping[str, int],
) -> dict[int, _Marks]:
    """What is set on the modules that are as before, by their numbers."""
    same = {}
    for number, (name, module) in enumerate(named_modules):
        marks = known.get(name)
        is_there = name in done or loading.is_on(module, device)
        if marks is not None and name not in patched and is_there and marks.would_be_set(module):
            same[number] = marks
    return same


def _sorted(same: Mapping[int, _Marks], named_modules: Sequence[tuple[str, Any]], done: Mapping[str, int]) -> _Sorted:
    *left_out, stand_in = [number for number, marks in same.items() if marks.are_any] or [-1]
    sizes = (
        done[name] if name in done else leaves.size_of(module) or 0
        for name, module in map(named_modules.__getitem__, left_out)
    )
    others = [number for number in range(len(named_modules)) if number not in same]
    return _Sorted([same[number] for number in left_out], sum(sizes), stand_in, others)


def _may_be_elsewhere(name: str, module: Any, done: Mapping[str, int]) -> bool:
    """Whether it has tensors of its own that no plan copies."""
    return name not in done and bool(module._parameters or module._buffers)


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
def _leaving_out(found: _Sorted, patcher: Any, device: Any, seen: list[tuple[str, Any]]) -> Iterator[None]:
    """Within, the host's list of what it has to load has these modules alone."""
    load = _Load(patcher.model, device, seen, found.size)

    def load_list(*args: Any, **kwargs: Any) -> Any:
        is_shorter.revert()
        with turn():
            for marks in found.left_out:
                marks.set_on(marks.module())
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
