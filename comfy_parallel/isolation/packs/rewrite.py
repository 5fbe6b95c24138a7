"""Rewrite a module's syntax tree so that its functions ask for the calling slot's values of some names.

Line numbers stay. Code at module level, which runs at import, stays nearly as it is.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field

from comfy_parallel.isolation.packs.expressions import defaults
from comfy_parallel.isolation.packs.keep import keep
from comfy_parallel.isolation.packs.scopes import SCOPES, Scope, is_global, outer_parts, scope_of
from comfy_parallel.slots.own_names import ACCESSOR

OWNER = "__comfy_parallel_owner__"
PER_SLOT_CACHE = "__comfy_parallel_cache__"
SET = "__comfy_parallel_set__"
NAMESPACE = "__comfy_parallel_vars__"
GLOBALS = "__comfy_parallel_globals__"
SET_RAW = "__comfy_parallel_set_raw__"
CALLS = {"setattr": "__comfy_parallel_setattr__", "delattr": "__comfy_parallel_delattr__"}
_CACHES = ("lru_cache", "cache")


@dataclass
class Plan:
    """What to rewrite in one file.

    Args:
        names: the module's global names that slots have their own of.
        attributes: class -> its attributes that slots start with a copy of; they need no rewriting.
        imported: names that were imported at module level -> the accessor's global name, and the name there.
        accessors: line-independent import statements: (level, module) -> accessors to import from there, with the
            names they get.
        shared: names that must stay one.
        functions: function or `Class.method` -> what it keeps from one call to the next: its variables that functions
            in it change, and parameters whose defaults it changes.
        is_needed: whether anything in the file may have to be rewritten.
        is_pack: whether the file is a pack's, whose writes to others are the slot's own.
    """

    names: set[str] = field(default_factory=set)
    attributes: Mapping[str, set[str]] = field(default_factory=dict)
    imported: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    accessors: Mapping[tuple[int, str], Mapping[str, str]] = field(default_factory=dict)
    is_pack: bool = True
    shared: set[str] = field(default_factory=set)
    functions: Mapping[str, set[str]] = field(default_factory=dict)
    is_needed: bool = True


def rewrite(tree: ast.Module, plan: Plan) -> bool:
    """Change the tree as planned; whether that changed anything."""
    rewriter = _Rewriter(plan)
    rewriter.visit(tree)
    if rewriter.has_changed:
        ast.fix_missing_locations(tree)
    return rewriter.has_changed


class _Rewriter(ast.NodeTransformer):
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._scopes: list[Scope] = []
        self._is_in_function = False
        self._classes: list[str] = []
        self.has_changed = False

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, SCOPES):
            return self._scope(node)
        visited: ast.AST = super().visit(node)
        return visited

    def _scope(self, node: ast.AST) -> ast.AST:
        """Parts that run around a scope are visited outside of it."""
        if not self._scopes and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and self._plan.is_pack:
            self._keep(node)
        if isinstance(node, ast.ClassDef):
            self._classes.append(node.name)
        outer = {id(part) for part in outer_parts(node)}
        done = {id(part): self.visit(part) for part in outer_parts(node)}
        was_in_function = self._is_in_function
        is_code = was_in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        self._is_in_function = is_code
        if is_code:
            self._scopes.append(scope_of(node))
        _replace_children(node, lambda child: done[id(child)] if id(child) in outer else self.visit(child))
        if is_code:
            self._scopes.pop()
        self._is_in_function = was_in_function
        if isinstance(node, ast.ClassDef):
            self._classes.pop()
        return self._defined(node)

    def _keep(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        kept = self._plan.functions.get(".".join((*self._classes, node.name)), set())
        names = {*self._plan.names, *self._plan.imported}
        shared = {argument.arg for argument, default in defaults(node.args) if getattr(default, "id", None) in names}
        if kept or shared:
            self.has_changed = True
            keep(node, kept, shared)

    def _defined(self, node: ast.AST) -> ast.AST:
        if self._scopes or not self._plan.is_pack:
            return node
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [
                self._call(PER_SLOT_CACHE, [decorator], decorator) if _is_cache(decorator) else decorator
                for decorator in node.decorator_list
            ]
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        """The accessor comes with the names that need it."""
        if self._scopes:
            return node
        wanted = self._plan.accessors.get((node.level, node.module or ""), {})
        if not wanted:
            return node
        self.has_changed = True
        aliases = [ast.alias(name, as_name) for name, as_name in sorted(wanted.items())]
        return [node, ast.copy_location(ast.ImportFrom(node.module, aliases, node.level), node)]

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not self._is_in_function or not is_global(node.id, self._scopes):
            return node
        if node.id in CALLS and self._plan.is_pack and isinstance(node.ctx, ast.Load):
            self.has_changed = True
            return ast.copy_location(ast.Name(CALLS[node.id], ast.Load()), node)
        if node.id in self._plan.names:
            return self._attribute(ACCESSOR, node.id, node)
        if node.id in self._plan.imported and isinstance(node.ctx, ast.Load):
            return self._attribute(*self._plan.imported[node.id], node)
        return node

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.AST:
        """An attribute cannot stand in `(name := value)`."""
        name = node.target.id
        node.value = self._expression(node.value)
        if not self._is_in_function or not is_global(name, self._scopes) or name not in self._plan.names:
            return node
        accessor = ast.copy_location(ast.Name(ACCESSOR, ast.Load()), node)
        return self._call(SET, [accessor, ast.Constant(name), node.value], node)

    def _expression(self, node: ast.expr) -> ast.expr:
        visited = self.visit(node)
        assert isinstance(visited, ast.expr)
        return visited

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Store | ast.Del) and self._may_be_of_others(node.value):
            node.value = self._call(OWNER, [node.value], node.value)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """`vars(module)["name"] = …`"""
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Store | ast.Del) or _is_globals(node.value):
            node.value = self._namespace(node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not self._plan.is_pack:
            return node
        if not self._is_in_function:
            if _is_cache(node.func) and (isinstance(node.func, ast.Call) or _wraps(node)):
                node.func = self._call(PER_SLOT_CACHE, [node.func], node.func)
            return node
        match node.func:
            case ast.Attribute(value=ast.Name(id="type" | "object") as kind, attr="__setattr__"):
                self.has_changed = True
                node.func = ast.copy_location(ast.Name(SET_RAW, ast.Load()), node.func)
                node.args.insert(0, kind)
            case ast.Attribute(value=value, attr="update" | "setdefault" | "pop" | "get" | "__setitem__" as attr) if (
                attr != "get" or _is_globals(value)
            ):
                node.func.value = self._namespace(value)
        return node

    def _namespace(self, node: ast.expr) -> ast.expr:
        if not self._plan.is_pack or not self._is_in_function:
            return node
        if _is_globals(node) and is_global("globals", self._scopes):
            return self._call(GLOBALS, [], node)
        match node:
            case (
                ast.Call(func=ast.Name(id="vars"), args=[owner], keywords=[])
                | ast.Attribute(value=owner, attr="__dict__")
            ) if not (isinstance(owner, ast.Name) and owner.id == "self"):
                return self._call(NAMESPACE, [owner], node)
        return node

    def _may_be_of_others(self, owner: ast.expr) -> bool:
        return self._plan.is_pack and not (isinstance(owner, ast.Name) and owner.id == "self")

    def _attribute(self, accessor: str, name: str, node: ast.Name) -> ast.AST:
        self.has_changed = True
        owner = ast.copy_location(ast.Name(accessor, ast.Load()), node)
        return ast.copy_location(ast.Attribute(owner, name, node.ctx), node)

    def _call(self, name: str, arguments: list[ast.expr], node: ast.AST) -> ast.Call:
        self.has_changed = True
        function = ast.copy_location(ast.Name(name, ast.Load()), node)
        return ast.copy_location(ast.Call(function, arguments, []), node)


def _is_globals(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="globals"), args=[], keywords=[]):
            return True
    return False


def _is_cache(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _CACHES


def _wraps(call: ast.Call) -> bool:
    """Whether it is `lru_cache(function)`: neither a decorator with options, nor a decorator's result."""
    return len(call.args) == 1 and not call.keywords and isinstance(call.args[0], ast.Name | ast.Attribute | ast.Lambda)


def _replace_children(node: ast.AST, visit: object) -> None:
    assert callable(visit)
    for name, old in ast.iter_fields(node):
        if isinstance(old, list):
            new = []
            for child in old:
                made = visit(child) if isinstance(child, ast.AST) else child
                new.extend(made if isinstance(made, list) else [made])
            setattr(node, name, new)
        elif isinstance(old, ast.AST):
            setattr(node, name, visit(old))
