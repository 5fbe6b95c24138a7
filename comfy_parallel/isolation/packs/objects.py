"""Whether the methods of a pack's class change its objects."""

from __future__ import annotations

import ast

from comfy_parallel.isolation.packs.expressions import GENERATORS, changes_its_object, last_name
from comfy_parallel.isolation.packs.sources import Pack, Thing


def set_on_self(method: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The attributes that a method sets on its object."""
    arguments = [*method.args.posonlyargs, *method.args.args]
    if not arguments:
        return set()
    known = getattr(method, "_set_on_self", None)
    if known is None:
        known = {
            node.attr
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == arguments[0].arg
            and node.value.id not in ("cls", "s")
        }
        method._set_on_self = known  # type: ignore[union-attr]
    return set(known)


def makes_generator(pack: Pack, thing: Thing, name: str) -> bool:
    """Whether a method of a class gives its object a generator of random numbers of its own, by this name."""
    methods = (
        method for base in pack.base_classes(thing) for method in pack.files[base.path].methods(base.name).values()
    )
    return any(
        isinstance(node, ast.Assign)
        and last_name(getattr(node.value, "func", node.value)) in GENERATORS
        and any(isinstance(target, ast.Attribute) and target.attr == name for target in node.targets)
        for method in methods
        for node in ast.walk(method)
    )


def set_by_methods(pack: Pack, thing: Thing) -> bool:
    """Whether methods of a class, besides `__init__`, change its objects."""
    for base in pack.base_classes(thing):
        for name, method in pack.files[base.path].methods(base.name).items():
            if name != "__init__" and (set_on_self(method) or _mutates_self(method)):
                return True
    return False


def _mutates_self(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    for node in ast.walk(method):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self")), attr=verb)):
                if changes_its_object(verb):
                    return True
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id="self")), ctx=ast.Store() | ast.Del()):
                return True
    return False
