"""Give each slot its own copy of some global names of a host module, without copying a host function.

The functions that use these names are run, per slot, with a namespace that holds the slot's values over the
module's. Other modules reach the same values as attributes of the module.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

from comfy_parallel.errors import HostMismatch
from comfy_parallel.patching.engine import Fit, Patch, Undo, replace
from comfy_parallel.patching.namespaces import Overlay, clone
from comfy_parallel.patching.sources import ModuleSource
from comfy_parallel.slots.slot import SlotLocal, current_slot


@dataclass(frozen=True, kw_only=True)
class SlotGlobals(Patch):
    """Make `names` of the module slot-local. `target` is `module:name`, the first of them.

    A slot starts with a shallow copy of the module's initial value, or with `initial[name](value)`.
    Names that the host does not have are left out; with none of them the patch does nothing.
    """

    names: tuple[str, ...]
    initial: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    wrap: Callable[[Any], Any] = field(default=lambda original: original, repr=False)

    def check_source(self, source: ModuleSource) -> Fit:
        present = [name for name in self.names if source.find([name]) is not None]
        if not present:
            return self.absent()
        for node in _definitions(source.tree):
            self._check_definition(node, set(present))
        return Fit.FITS

    def check_live(self, module: ModuleType) -> Fit:
        return Fit.FITS if self._present(module) else self.absent()

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        names = self._present(module)
        if not names:
            return
        pristine = {name: _copied(vars(module)[name]) for name in names}
        overlays = SlotLocal(lambda: Overlay(vars(module), {name: self._start(name, pristine[name]) for name in names}))
        for name, function in _users(module, set(names)):
            yield replace(module, name, _dispatch(overlays, function))
        yield add_properties(module, {name: _slot_property(name, overlays) for name in names})

    def _present(self, module: ModuleType) -> list[str]:
        return [name for name in self.names if name in vars(module)]

    def _start(self, name: str, pristine: Any) -> Any:
        value = _copied(pristine)
        return self.initial[name](value) if name in self.initial else value

    def _check_definition(self, node: ast.stmt, names: set[str]) -> None:
        used = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)} & names
        if used and isinstance(node, ast.ClassDef):
            raise HostMismatch(f"{self.module}:{node.name}: its methods use {sorted(used)}, expected functions only")
        set_here = {name for leaf in ast.walk(node) if isinstance(leaf, ast.Global) for name in leaf.names}
        if used and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not set_here <= set(self.names):
            others = sorted(set_here - set(self.names))
            raise HostMismatch(f"{self.module}:{node.name}: sets the globals {others} as well, expected ours only")


def _definitions(node: ast.AST) -> Iterator[ast.stmt]:
    """Classes and functions outside of other ones."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _definitions(child)


def add_properties(module: ModuleType, properties: dict[str, property]) -> Undo:
    """Turn names of a module into computed attributes, for readers and writers in other modules."""
    return _ClassUndo(module, type("PatchedModule", (type(module),), dict(properties)))


class _ClassUndo(Undo):
    """Undo of a module's class: `__class__` is no entry of the module's namespace."""

    is_name = False

    def __init__(self, module: ModuleType, new: type[ModuleType]) -> None:
        self.owner, self.new, self.original = module, new, type(module)
        module.__class__ = new

    def revert(self) -> None:
        if type(self.owner) is not self.new:
            raise HostMismatch(f"{self.owner!r}: something else changed its class after us; not reverted")
        self.owner.__class__ = self.original


@dataclass(frozen=True, kw_only=True)
class ModuleProperty(Patch):
    """Make one global name of a module a computed attribute; `wrap(initial value)` returns the property."""

    def apply(self, module: ModuleType) -> Iterator[Undo]:
        name = self.path[0]
        if name in vars(module):
            yield add_properties(module, {name: self.wrap(vars(module)[name])})


def _copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else copy.copy(value)


def _users(module: ModuleType, names: set[str]) -> list[tuple[str, FunctionType]]:
    functions = [(name, value) for name, value in vars(module).items() if isinstance(value, FunctionType)]
    return [
        (name, function)
        for name, function in functions
        if function.__globals__ is vars(module) and names & _global_names(function.__code__)
    ]


def _global_names(code: CodeType) -> set[str]:
    nested = [_global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*nested)


def _dispatch(overlays: SlotLocal[Overlay], function: FunctionType) -> Callable[..., Any]:
    clones: SlotLocal[FunctionType] = SlotLocal(lambda: clone(function, overlays.get()))

    @functools.wraps(function)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if current_slot() is None:
            return function(*args, **kwargs)
        own = clones.get()
        if own.__code__ is not function.__code__:  # Some pack writes to names that the function reads.
            own.__code__ = function.__code__
        return own(*args, **kwargs)

    return dispatched


def _slot_property(name: str, overlays: SlotLocal[Overlay]) -> property:
    def get(module: ModuleType) -> Any:
        return vars(module)[name] if current_slot() is None else overlays.get()[name]

    def set(module: ModuleType, value: Any) -> None:
        (vars(module) if current_slot() is None else overlays.get())[name] = value

    return property(get, set)
