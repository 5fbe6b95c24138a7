"""Rewrite functions so that what they keep from one call to the next is the calling slot's.

A variable that functions inside change becomes an attribute of a box, which the function makes when it is called; a
parameter whose default it changes gets the slot's copy of that default.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import cast

from comfy_parallel.isolation.packs.expressions import defaults
from comfy_parallel.isolation.packs.scopes import SCOPES, Scope, outer_parts, scope_of

DEFAULT = "__comfy_parallel_default__"  # remembers a default
OWN_DEFAULT = "__comfy_parallel_own_default__"
BOX = "__comfy_parallel_box__"
_KEEPS = "__comfy_parallel_kept__"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def keep(function: Function, kept: set[str], shared: set[str]) -> None:
    """Change a function's tree. `shared` are parameters whose default is a name that slots have their own of."""
    with_default = {argument.arg for argument, _ in defaults(function.args)} & (kept | shared)
    _remember(function, with_default)
    boxed = kept & (scope_of(function).bound) - with_default
    statements = [_parsed(f"{name} = {OWN_DEFAULT}({name})") for name in sorted(with_default)]
    if boxed:
        parameters = boxed & _parameters(function)
        _Boxing(function, boxed).run()
        statements.append(_parsed(f"{_KEEPS} = {BOX}()"))
        statements += [_parsed(f"{_KEEPS}.{name} = {name}") for name in sorted(parameters)]
    place = 1 if ast.get_docstring(function, clean=False) is not None else 0
    for statement in statements:
        for node in ast.walk(statement):
            ast.copy_location(node, function.body[0])
    function.body[place:place] = statements


def _remember(function: Function, names: set[str]) -> None:
    arguments = function.args
    placed = [*arguments.posonlyargs, *arguments.args][-len(arguments.defaults) :] if arguments.defaults else []
    _wrap(arguments.defaults, placed, names)
    _wrap(arguments.kw_defaults, arguments.kwonlyargs, names)


def _wrap(values: list[ast.expr] | list[ast.expr | None], parameters: Iterable[ast.arg], names: set[str]) -> None:
    for position, parameter in enumerate(parameters):
        value = values[position]
        if parameter.arg in names and value is not None:
            call = ast.Call(ast.copy_location(ast.Name(DEFAULT, ast.Load()), value), [value], [])
            values[position] = ast.copy_location(call, value)


def _parameters(function: Function) -> set[str]:
    arguments = function.args
    several = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *several)}


def _parsed(text: str) -> ast.stmt:
    return ast.parse(text).body[0]


class _Boxing(ast.NodeTransformer):
    """Turns names of the function, in it and in what is defined in it, into attributes of the box."""

    def __init__(self, function: Function, names: set[str]) -> None:
        self._function, self._names = function, names
        self._scopes: list[Scope] = []

    def run(self) -> None:
        self._function.body = [cast(ast.stmt, self.visit(statement)) for statement in self._function.body]

    def visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, SCOPES):
            visited: ast.AST = super().visit(node)
            return visited
        outer = {id(part): self.visit(part) for part in outer_parts(node)}
        self._scopes.append(scope_of(node))
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, name, [self._child(child, outer) for child in value])
            elif isinstance(value, ast.AST):
                setattr(node, name, self._child(value, outer))
        self._scopes.pop()
        return node

    def _child(self, child: object, outer: dict[int, ast.AST]) -> object:
        if isinstance(child, ast.arguments):
            return self._arguments(child, outer)
        if id(child) in outer:
            return outer[id(child)]
        return self.visit(child) if isinstance(child, ast.AST) else child

    def _arguments(self, arguments: ast.arguments, outer: dict[int, ast.AST]) -> ast.arguments:
        """Defaults and annotations belong to the scope around."""
        arguments.defaults = [outer.get(id(value), value) for value in arguments.defaults]  # type: ignore[misc]
        arguments.kw_defaults = [outer.get(id(value), value) for value in arguments.kw_defaults]  # type: ignore[misc]
        return arguments

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self._names or not self._is_the_function_s(node.id):
            return node
        box = ast.copy_location(ast.Name(_KEEPS, ast.Load()), node)
        return ast.copy_location(ast.Attribute(box, node.id, node.ctx), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.target, ast.Attribute):
            node.simple = 0
            if node.value is None:
                return ast.copy_location(ast.Pass(), node)
        return node

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.AST:
        names = [name for name in node.names if name not in self._names or not self._is_the_function_s(name)]
        return ast.copy_location(ast.Nonlocal(names) if names else ast.Pass(), node)

    def _is_the_function_s(self, name: str) -> bool:
        for scope in reversed(self._scopes):
            if scope.is_class and scope is not self._scopes[-1]:
                continue
            if name in scope.bound | scope.declared and name not in scope.outer:
                return False
        return True
