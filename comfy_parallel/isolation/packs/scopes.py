"""Which names in a function are the module's: Python's rules, applied to a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (*FUNCTIONS, *_COMPREHENSIONS, ast.ClassDef)


@dataclass
class Scope:
    """Names that a function, class body or comprehension binds, or takes from the module or from around it."""

    node: ast.AST
    bound: set[str] = field(default_factory=set)
    declared: set[str] = field(default_factory=set)
    outer: set[str] = field(default_factory=set)

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)


def scope_of(node: ast.AST) -> Scope:
    """The scope that a function, class or comprehension opens."""
    scope = Scope(node)
    if isinstance(node, FUNCTIONS):
        scope.bound |= {argument.arg for argument in _arguments(node.args)}
    for leaf in own_nodes(node):
        _bind(scope, leaf)
    scope.bound -= scope.declared | scope.outer
    return scope


def is_global(name: str, scopes: list[Scope]) -> bool:
    """Whether a name, used in the innermost of these scopes, is the module's."""
    for scope in reversed(scopes):
        if scope.is_class and scope is not scopes[-1]:
            continue
        if name in scope.declared:
            return True
        if name in scope.bound:
            return False
    return True


def outer_parts(node: ast.AST) -> list[ast.AST]:
    """The parts of a function, class or comprehension that run in the scope around it."""
    match node:
        case ast.Lambda():
            return [*node.args.defaults, *(default for default in node.args.kw_defaults if default is not None)]
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            arguments = [argument.annotation for argument in _arguments(node.args) if argument.annotation is not None]
            defaults = [*node.args.defaults, *(default for default in node.args.kw_defaults if default is not None)]
            return [*node.decorator_list, *defaults, *arguments, *([node.returns] if node.returns else [])]
        case ast.ClassDef():
            return [*node.decorator_list, *node.bases, *node.keywords]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            return [node.generators[0].iter]
    return []


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    several = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *several]


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes in a scope, without those of the scopes within it."""
    outer = set(map(id, outer_parts(node)))
    waiting = [child for child in ast.iter_child_nodes(node) if id(child) not in outer]
    while waiting:
        child = waiting.pop()
        yield child
        inner = outer_parts(child) if isinstance(child, SCOPES) else ast.iter_child_nodes(child)
        waiting.extend(inner)


def _bind(scope: Scope, node: ast.AST) -> None:
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            scope.bound.add(name)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            scope.bound.add(name)
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            scope.bound |= {alias.asname or alias.name.partition(".")[0] for alias in names}
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            scope.bound.add(name)
        case ast.MatchMapping(rest=str(name)):
            scope.bound.add(name)
        case ast.Global(names=names):
            scope.declared |= set(names)
        case ast.Nonlocal(names=names):
            scope.outer |= set(names)
