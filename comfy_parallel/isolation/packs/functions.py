"""What functions keep from one call to the next: in the defaults of parameters, and in the function around them."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from comfy_parallel.isolation.packs.expressions import (
    changes_its_arguments,
    changes_its_object,
    defaults,
    last_name,
    lies_in,
)
from comfy_parallel.isolation.packs.scopes import FUNCTIONS, SCOPES, scope_of

Function = ast.FunctionDef | ast.AsyncFunctionDef
_MAKERS = {"dict", "list", "set", "OrderedDict", "defaultdict", "deque", "Counter"}


def caching(function: Function) -> set[str]:
    """Parameters whose default is a container that the function changes, lets go or passes on."""
    found = {argument.arg for argument, default in defaults(function.args) if _is_container(default)}
    return found & _used_as_stores(function) if found else found


def keeping(function: Function) -> set[str]:
    """Names of a function that functions in it change, or may change."""
    inner = [node for node in ast.walk(function) if isinstance(node, SCOPES) and node is not function]
    if not any(isinstance(node, FUNCTIONS) for node in inner):
        return set()
    scope = scope_of(function)
    plain = scope.bound - set(_bound_otherwise(function))
    rebound = {name for node in inner for name in scope_of(node).outer}
    stores = {name for node in inner if not isinstance(node, ast.ClassDef) for name in _used_as_stores(node)}
    return plain & (rebound | (stores & _containers_of(function)))


def _is_container(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return last_name(value.func) in _MAKERS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def _containers_of(function: ast.AST) -> set[str]:
    """Names that are given a container, or anything else that a call makes."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and (
            _is_container(node.value) or isinstance(node.value, ast.Call)
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _bound_otherwise(function: Function) -> Iterator[str]:
    """Names that are bound by something else than an assignment, which an attribute cannot stand in for."""
    for node in ast.walk(function):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name
            case ast.MatchMapping(rest=str(name)) | ast.NamedExpr(target=ast.Name(id=name)):
                yield name


def _used_as_stores(function: ast.AST) -> set[str]:
    """Names on whose objects the function, or one in it, calls what changes them, or sets items or attributes."""
    found: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if changes_its_object(attr):
                found |= _root(value)
            case ast.Call(func=func, args=args) if changes_its_arguments(last_name(func)):
                found |= {name for argument in args for name in _root(argument)}
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                found |= _root(value)
            case ast.Attribute(value=value, ctx=ast.Store() | ast.Del()):
                found |= _root(value)
    return found


def _root(node: ast.expr) -> set[str]:
    inner: ast.expr | None = node
    while inner is not None:
        if isinstance(inner, ast.Name):
            return {inner.id}
        inner = lies_in(inner)
    return set()
